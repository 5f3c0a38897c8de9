"""iosr-fast classify --sort: what stands in which folder, and that nothing else changes."""

from __future__ import annotations

import csv
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from iosr_fast import Classifier
from iosr_fast.exceptions import IosrFastError
from iosr_fast.files.sort import class_folders, sort_images
from iosr_fast.files.tables import Labelled
from tests.files.runs import classify, done, refused
from tests.store.live_parts import random_head, with_tree

PROMISE = ("--max-error", "50%", "--sort")


def held(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_class_has_a_folder_whose_name_gives_the_class() -> None:
    names = ["a/b", "..", ".hidden", "look", "Look", "sorted.csv", "cat", "Cat", "CAT", "x.", "=1", "C:", "%41", "Ä 2"]
    names.append("(group)")
    head = random_head(np.random.default_rng(0), len(names), 1)  # earlier versions took names that differ in case
    folders = class_folders(replace(head, class_names=tuple(names)))
    assert [unquote(folder) for folder in folders.values()] == [*folders] == names
    assert len({folder.casefold() for folder in folders.values()} | {"look", "sorted.csv", "(group)"}) == len(names) + 3
    assert {folder for folder in folders.values() if Path("a", folder).resolve().parent != Path("a").resolve()} == set()
    assert [folders[name] for name in ("cat", "Ä 2", "Cat", "a/b")] == ["cat", "Ä 2", "%43%61%74", "a%2Fb"]
    with pytest.raises(IosrFastError, match="folders of at most 255 bytes, got '////"):
        class_folders(replace(head, class_names=("/" * 86, *names[1:])))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["linked", "copied", "tree"])
def test_accepted_images_are_in_class_folders_and_a_list_undoes_it(
    way: str, bundle: Path, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier, folder, before = Classifier.load(bundle, threads=1), tmp_path / "sorted", held(tmp_path / "in")
    if way == "tree":
        with_tree(classifier, [(f"<{c // 4}>", f"pair {c // 2}") for c in range(8)]).save(bundle := tmp_path / "saved")
    if way == "copied":
        monkeypatch.setattr(os, "link", lambda *_: os.readlink("/"))  # an OSError
    expected = {}
    for path, answer in zip(pictures, classifier.explain(pictures, max_error=0.5), strict=True):
        group = ("(group)",) * (way == "tree" and bool(answer.level))  # apart from its classes' own
        names = (*answer.path, answer.label, *group) if way == "tree" else (answer.label,)
        place = "/".join(names).replace("<", "%3C").replace(">", "%3E") if answer.accepted else "look"
        expected[f"{place}/{path.relative_to(tmp_path / 'in')}"] = path
    assert "sorted 30 images into" in done(classify(bundle, tmp_path / "in", *PROMISE, folder))
    once = held(folder)
    assert once == {target: path.read_bytes() for target, path in expected.items()} | {"sorted.csv": once["sorted.csv"]}
    assert [os.path.samefile(folder / target, path) for target, path in expected.items()] == [way != "copied"] * 30
    said = done(classify(bundle, tmp_path / "in", *PROMISE, folder, "--out", tmp_path / "labels.parquet"))
    assert "sorted 0 images" in said and "30 were there" in said and held(folder) == once

    with (folder / "sorted.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["target"], Path(row["source"])) for row in rows] == [*expected.items()]
    for row in rows:
        (folder / row["target"]).unlink()
    assert [*held(folder)] == ["sorted.csv"] and held(tmp_path / "in") == before
    (mine := folder / rows[-1]["target"]).write_bytes(b"mine")
    assert f"expected no other image at {mine}" in refused(classify(bundle, tmp_path / "in", *PROMISE, folder))
    assert held(folder) == {"sorted.csv": once["sorted.csv"], rows[-1]["target"]: b"mine"}


def test_an_image_has_one_place_and_a_killed_run_has_listed_what_it_made(
    pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, folder, link = random_head(np.random.default_rng(0), 3, 1), tmp_path / "sorted", os.link
    head = replace(head, class_names=("c0", "b", "c"), paths=(("a",), ("a",), ("d",)))

    def sort(label: str, some: list[Path], accepted: bool = True) -> None:
        rows = [Labelled(str(path), label, 1.0, math.nan, "", accepted) for path in some]
        sort_images(rows, folder, [str(tmp_path / "in")], class_folders(head))

    monkeypatch.setattr(os, "link", lambda *paths: link(*paths) or sys.exit())
    with pytest.raises(SystemExit):
        sort("b", pictures)
    made = f"a/b/{pictures[0].relative_to(tmp_path / 'in')}"
    before = held(folder)
    assert before.keys() == {"sorted.csv", made} and made in (folder / "sorted.csv").read_text()
    monkeypatch.setattr(os, "link", link)
    for label, accepted in (("b", False), ("a", True)):  # a stricter promise, another answer
        with pytest.raises(IosrFastError, match=rf"an earlier run has it at .*{made}, and sorted none"):
            sort(label, pictures, accepted)
    sort("a", pictures[1:3])
    sort("b", pictures[:1])
    assert held(folder).keys() == {"sorted.csv", made, "a/(group)/c0/0003.png", "a/(group)/c0/0006.png"}
    (folder / made).unlink()  # undone
    sort("b", pictures[:1], accepted=False)
    assert (folder / "look/c0/0000.png").samefile(pictures[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["in", "--sort", "sorted"], "expected --max-error, and .csv or .parquet"),
        (["in", *PROMISE, "sorted", "--out", "parts"], "expected --max-error, and .csv or .parquet"),
        (["in", *PROMISE, "in/sorted"], "a --sort outside of their folders"),
        (["boxes.csv", *PROMISE, "sorted"], "expected whole images, no boxes"),
        (["in", *PROMISE, "none/sorted"], "expected a folder to write"),
        (["in", *PROMISE, "mine"], "expected nothing or the list of --sort at mine/sorted.csv"),
    ],
)
def test_wrong_options_are_refused_before_an_image_is_read(
    words: list[str], message: str, bundle: Path, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/sorted.csv").write_text("path,label\n")
    Path("boxes.csv").write_text("path,x,y,width,height\nin/c0/0000.png,0,0,8,8\n")
    before = held(tmp_path)
    assert message in refused(classify(bundle, *words)) and held(tmp_path) == before
