"""tools/reproduce_paper.py: nothing stale is read, nothing good is thrown away, and what OUT belongs to."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.tools.test_reproduce import (  # the fixtures too
    CLASSES,
    Main,
    Pictures,
    engines,  # noqa: F401
    loaded,
    no_more_encoding,
    posed,  # noqa: F401
    rows_of,
    run,  # noqa: F401
    tiny,
)
from tests.tools.test_reproduce_parts import model, wanted
from tools.reproduction import cells, models, problems, store
from tools.reproduction.problems import OwnSet, Problem, pose
from tools.reproduction.store import Store, Wanted


def dtd(root: Path) -> Path:
    """DTD in CoOp's layout, of tiny's pictures as bitmaps: all files are of one size."""
    parts: dict[str, list[list[Any]]] = {}
    for split, held in tiny().splits.items():
        parts[split] = []
        for row, label in enumerate(held.labels.tolist()):
            place = f"class{label}/{split}{row}.bmp"
            (root / "dtd/images" / place).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(held.images[row]).save(root / "dtd/images" / place)
            parts[split].append([place, label, f"class {label}"])
    (root / "dtd/split_zhou_DescribableTextures.json").write_text(json.dumps(parts))
    return root


def test_an_image_that_changes_is_encoded_again_though_its_size_is_the_same(
    run: Main,  # noqa: F811
    posed: list[Problem],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = dtd(tmp_path / "data")
    real = problems_opened(root)
    posed[:] = [real()]
    words = ("--methods", "tip-adapter", "--shots", "1", "--seeds", "1")
    before = rows_of(run(*words))
    rows = posed[0].support(1, 1)[0]
    split = posed[0].source.splits["train"]
    for row in rows:  # every picture of the support becomes another class's
        path = split.folder / split.keys[row]
        size, late = path.stat().st_size, path.stat().st_mtime_ns + 10**9
        other = tiny().splits["train"].images[(row + 3) % (3 * CLASSES)]
        Image.fromarray(other).save(path)
        os.utime(path, ns=(late, late))
        assert path.stat().st_size == size
    fingerprint, posed[:] = posed[0].source.fingerprint, [real()]
    assert posed[0].source.fingerprint == fingerprint, "which has no times in it"
    encoded: list[str] = []
    encode = store.encode
    monkeypatch.setattr(store, "encode", lambda part, *more: (encoded.append(part.split), encode(part, *more))[1])
    after = rows_of(run(*words))
    assert encoded == ["train"], "validation and test images have not changed"
    assert after[0]["accuracies"] != before[0]["accuracies"]


def problems_opened(root: Path) -> Any:
    from iosr_fast.training.data.evaluation_sets import open_evaluation_set

    return lambda: pose(open_evaluation_set("dtd", root))


def test_one_clip_called_in_two_ways_is_one_run(
    run: Main,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(models, "load_model", lambda name, _, *more: loaded(name, None, *more))
    run("--methods", "zero-shot", "--pretrained", "weights.safetensors")
    no_more_encoding(monkeypatch)
    out = run("--methods", "zero-shot", "--pretrained", str(tmp_path / "weights.safetensors"))
    assert rows_of(out)[0]["pretrained"] == str(tmp_path / "weights.safetensors")


def test_what_can_not_be_is_told_before_any_data_set_is_opened(
    run: Main,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(problems, "open_problems", lambda *_: pytest.fail("a large set was looked through"))
    for words, told in (
        (["--methods", "tip"], "expected --methods"),
        (["--reducers", "middle"], "expected a reducer"),
        (["--runtime", "fast"], "expected runtime"),
        (["--shots", "0"], "expected --shots and --views"),
        (["--seeds", "-1"], "--seeds of at least 0"),
    ):
        with pytest.raises(SystemExit):
            run(*words)
        assert told in capsys.readouterr().err


def uneven() -> OwnSet:
    """tiny with one training picture of its first class, two of its second, three of the others."""
    data = tiny()
    train = data.splits["train"]
    kept = np.array([row for row in range(len(train)) if row not in (1, 2, 5)])
    cut = Pictures(train.images[kept], train.labels[kept], [train.keys[row] for row in kept])
    return replace(data, splits={**data.splits, "train": cut}, fingerprint="uneven")


@pytest.mark.parametrize("validation", [True, False])
def test_fewer_images_than_shots_are_refused_or_all_taken(
    run: Main,  # noqa: F811
    posed: list[Problem],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    validation: bool,
) -> None:
    data = uneven()
    if not validation:
        data = replace(data, splits={name: split for name, split in data.splits.items() if name != "val"})
    posed[:] = [pose(data)]
    words = ("--methods", "all", "--shots", "1", "3", "--seeds", "1")
    with pytest.raises(SystemExit):
        run(*words)
    assert "got 3: tiny has 1. --fewer lets" in capsys.readouterr().err
    out = run(*words, "--fewer")
    assert {row["shots"] for row in rows_of(out)} == {1, 3}
    assert "2 of 5 classes have fewer than 3 images to draw from (1 and more)" in (out / "results.md").read_text()
    drawn = np.concatenate(posed[0].support(3, 1))
    assert sorted(drawn) == list(range(3 * CLASSES - 3))
    with pytest.raises(SystemExit):
        run(*words[:2], "--shots", "4", "--fewer")
    assert "of the largest class and none without, got 4: tiny has 3" in capsys.readouterr().err


def test_no_test_image_of_the_demo_becomes_support_for_want_of_others() -> None:
    problem = problems.demo()
    assert problem.most_shots(fewer=True) == problem.most_shots() == problem.apart


def test_a_class_without_images_is_refused_in_any_case() -> None:
    data = tiny()
    train = data.splits["train"]
    kept = np.flatnonzero(train.labels != 2)
    cut = Pictures(train.images[kept], train.labels[kept], [train.keys[row] for row in kept])
    assert pose(replace(data, splits={**data.splits, "train": cut})).most_shots(fewer=True) == 0


def test_embeddings_that_can_not_be_read_for_another_reason_are_not_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from iosr_fast.encoders.encoder import Embeddings

    rows = np.ones((6, 2), np.float32)
    monkeypatch.setattr(store, "encode", lambda *_: Embeddings(rows, rows))
    Store(tmp_path, model()).embeddings(wanted())

    def no_more_files(*_: Any) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(store, "read_manifest", no_more_files)
        with pytest.raises(OSError, match="Too many open files"):
            Store(tmp_path, model()).embeddings(wanted())
    no_more_encoding(monkeypatch)
    assert Store(tmp_path, model()).embeddings(wanted()).plain.shape == (6, 2)


def test_what_another_run_has_removed_meanwhile_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Store(tmp_path / "embeddings", model())
    gone = tmp_path / "embeddings" / "gone"
    monkeypatch.setattr(type(gone), "exists", lambda _: True)
    assert held._read(gone, store.KIND, {}, ("plain",), 1) is None
    made = cells.Cells(tmp_path / "cells")
    cell = cells.Cell("tiny", "tip-x", "none", 1, 1, {})
    made.path(cell).parent.mkdir()
    made.path(cell).write_text("{")
    made.tell = lambda _: made.path(cell).unlink()  # as the other does
    assert made.read(cell) is None


def test_a_file_in_the_place_of_embeddings_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="expected a folder for embeddings, got the file"):
        Store(tmp_path / "file", model())
    assert (tmp_path / "file").read_text() == "mine"


def test_few_images_wait_at_their_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "usable_threads", lambda: 2)
    data = tiny()
    for views, most in ((1, 15), (3, 2 + 4)):
        with store.Ahead(Wanted(data, "train", np.arange(15), views), 8, lambda _: None) as images:
            assert len(images[0:2]) == 2
            assert len(images._waiting) == most - 2
