"""Parts of pictures in the commands: CSV columns and fragments, from one command's file to the next."""

from __future__ import annotations

import csv
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iosr_fast import Classifier, labelled_images
from iosr_fast.backbones.demo.pictures import load_pictures
from iosr_fast.files.embedding_files import read_embeddings
from iosr_fast.images.crop import Crop
from tests.cli.runs import done as command
from tests.files.runs import classify, done, embed, read_rows, refused


def write_table(file: str, rows: Sequence[Sequence[Any]], columns: str = "path,label,x,y,width,height") -> Path:
    with open(file, "w", newline="") as opened:
        csv.writer(opened).writerows([columns.split(","), *rows])
    return Path(file)


@pytest.fixture
def scenes(
    tmp_path: Path, demo_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[list[Any]], list[str], np.ndarray]:
    """6 files of three pictures side by side, one of each class: the rows of their boxes, their texts, and the pictures
    alone."""
    monkeypatch.setenv("IOSR_FAST_CACHE", str(demo_cache))
    monkeypatch.chdir(tmp_path)
    shown = load_pictures("held-out", min_styles=5)
    order = np.argsort(shown.concepts[:18], kind="stable").reshape(3, 6).T
    rows = []
    for k, places in enumerate(order.tolist()):
        Image.fromarray(np.concatenate(shown.images[places], axis=1)).save(f"{k}.png")
        rows += [[f"{k}.png", shown.names[shown.concepts[i]], 64 * j, 0, 64, 64] for j, i in enumerate(places)]
    return rows, [f"{row[0]}#xywh={row[2]},0,64,64" for row in rows], shown.images[order.ravel()]


def test_a_box_counts_as_the_picture_in_it(scenes: Any) -> None:
    rows, texts, pictures = scenes
    labels = [row[1] for row in rows]
    classifier = Classifier("demo", method="tip-adapter").fit_folder(write_table("support.csv", rows[:12]))
    alone = Classifier("demo", method="tip-adapter").fit(pictures[:12], labels[:12])
    expected = alone.predict_proba(pictures[12:])
    crops = [Crop(row[0], row[2:]) for row in rows[12:]]
    in_shares = [f"{row[0]}#xywh=percent:{row[2] / 1.92},0,{64 / 1.92},100" for row in rows[12:]]
    for given in (texts[12:], crops, in_shares, [Crop(Image.open(crop.source), crop.box) for crop in crops]):
        np.testing.assert_allclose(classifier.predict_proba(given), expected, atol=1e-5)
    measured = classifier.evaluate(crops, labels[12:])
    assert measured.images == [Path(text) for text in texts[12:]] and len(measured.labels) == 6
    classifier.save("m")
    answers = read_rows(done(classify(Path("m"), write_table("new.csv", rows[12:]))))
    assert [row["path"] for row in answers] == texts[12:]
    assert [row["label"] for row in answers] == alone.predict(pictures[12:]).tolist()
    assert "margin" not in json.loads(Path("m/manifest.json").read_text())["views"]


def test_labels_of_boxes_go_from_one_command_to_the_next(scenes: Any, tmp_path: Path) -> None:
    rows, texts, _ = scenes
    Classifier("demo", method="tip-adapter").fit_folder(write_table("support.csv", rows[:12])).save("m")
    write_table("new.csv", rows[12:])
    command("suggest", "m", "new.csv", "-n", 4, "--out", "labels.csv", "--html", "suggest.html")
    suggested = [row["path"] for row in read_rows(Path("labels.csv"))]
    assert len(suggested) == 4 and set(suggested) <= {f"{tmp_path}/{text}" for text in texts}
    page = Path("suggest.html").read_text()
    assert [html.unescape(path) for path in re.findall('data-path="(.*?)"', page)] == suggested
    assert page.count("<img ") == 4
    write_table("labels.csv", [[path, "new"] for path in suggested], "path,label")
    stored = sorted(Classifier.load("m").snapshot().examples.paths)
    assert stored == sorted(f"{tmp_path}/{text}" for text in texts[:12])
    Path("link.png").symlink_to("0.png")
    corrected = [stored[0], texts[1].replace("0.png", "link.png")]  # as the page of an audit writes it
    write_table("audit.csv", [[path, "other"] for path in corrected], "path,label")
    paths, labels, names, *_ = labelled_images("support.csv", "new.csv", "labels.csv", "audit.csv")
    assert list(map(str, paths)) == texts and labels.count("new") == 4 and labels[:2] == ["other"] * 2
    assert Classifier("demo", method="tip-adapter").fit(paths, labels).classes_.tolist() == names
    write_table("two.csv", [rows[0], [*rows[0][:1], "other", *rows[0][2:]]])
    with pytest.raises(ValueError, match=r"one label for a file of two\.csv, .* for 0\.png#xywh=0,0,64,64"):
        labelled_images("two.csv")


def test_parts_of_a_picture_and_class_are_left_out_together(scenes: Any) -> None:
    """Those of other classes are not: look-alikes would join all pictures."""
    rows, _, pictures = scenes
    classifier = Classifier("demo", method="tip-adapter").fit_folder(write_table("support.csv", rows[:15]))
    alone = Classifier("demo", method="tip-adapter").fit(pictures[:15], [row[1] for row in rows[:15]])
    assert classifier.automation().images == alone.automation().images > 0
    for places in ((0, 10, 20), (30, 40)):  # as parts that are added at once
        classifier.add_examples(rows[0][1], [f"5.png#xywh={x},0,64,64" for x in places])
    assert sorted(np.bincount(classifier.snapshot().examples.groups)[15:]) == [2, 3]


def test_support_images_and_queries_have_one_margin(scenes: Any) -> None:
    rows, texts, pictures = scenes
    inner = [[*row[:2], row[2] + 16, 16, 32, 32] for row in rows]
    classifier = Classifier("demo", method="tip-adapter", margin=0.5).fit_folder(write_table("support.csv", inner[:12]))
    alone = Classifier("demo", method="tip-adapter").fit(pictures[:12], [row[1] for row in rows[:12]])
    np.testing.assert_allclose(classifier.support_.embeddings.plain, alone.support_.embeddings.plain, atol=1e-6)
    classifier.save("m")
    loaded = Classifier.load("m")
    assert loaded.get_params()["margin"] == 0.5
    write_table("new.csv", inner[12:])
    table = read_rows(done(classify(Path("m"), "new.csv")))
    found = loaded.predict([row["path"] for row in table])
    assert found.tolist() == [row["label"] for row in table] == alone.predict(pictures[12:]).tolist()
    loaded.add_examples(rows[0][1], [table[0]["path"]])
    added = alone.encoder.encode(pictures[12:13]).plain[0]
    assert (loaded.support_.embeddings.plain @ added).max() > 1 - 1e-5
    done(embed(Path("m"), Path("new.csv"), Path("parts"), "--margin", 0.5))
    part = read_embeddings("parts")
    assert part.keys == [row["path"] for row in table]
    np.testing.assert_allclose(part.embeddings.plain, alone.encoder.encode(pictures[12:]).plain, atol=1e-6)
    assert "differs in margin" in refused(embed(Path("m"), Path("new.csv"), Path("parts")))
    for margin in (-0.1, 6, float("nan"), "wide"):
        with pytest.raises(ValueError, match="expected margin "):
            Classifier("demo", margin=margin).fit(pictures, texts)
