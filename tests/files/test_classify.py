"""iosr-fast classify and embed: the content of tables, parts and standard output, in one process."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import Result

from iosr_fast.classifier import Classifier
from iosr_fast.files.embedding_files import iterate_parts, read_embeddings
from iosr_fast.sealed.manifest import read_manifest
from iosr_fast.store.head_files import fingerprint
from tests.files.runs import (
    assert_answers,
    assert_encodes,
    classify,
    done,
    embed,
    load_images,
    logged,
    read_parts,
    read_rows,
    refused,
)
from tests.store.live_parts import with_tree
from tools.demo.bundle import held_out_queries

pytestmark = pytest.mark.slow

UNREAD = "it is not an image of a known format"


def assert_rows(bundle: Path, rows: list[dict[str, str]], paths: list[Path], top: int) -> None:
    classifier = Classifier.load(bundle)
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    for row, expected in zip(rows, classifier.predict_proba(paths), strict=True):
        for place, best in enumerate(np.argsort(-expected)[:top], start=1):
            suffix = "" if place == 1 else f"_{place}"
            assert row[f"label{suffix}"] == classifier.classes_[best] and row["error"] == ""
            assert abs(float(row[f"probability{suffix}"]) - expected[best]) < 2e-4
    assert len(rows[0]) == 2 + 2 * top


def test_csv_has_the_labels_of_the_classifier(bundle: Path, pictures: list[Path], tmp_path: Path) -> None:
    done(classify(bundle, tmp_path / "in", "--out", tmp_path / "labels.csv", "--top", "3"))
    assert_rows(bundle, read_rows(tmp_path / "labels.csv"), pictures, top=3)
    done(classify(bundle, pictures[3], pictures[1], "--out", tmp_path / "all.csv", "--top", "100"))
    assert_rows(bundle, read_rows(tmp_path / "all.csv"), [pictures[3], pictures[1]], top=8)
    printed = classify(bundle, tmp_path / "labels.csv", "--top", "3")  # a list of paths is an input, too
    assert printed.stdout == (tmp_path / "labels.csv").read_text()


def test_a_folder_of_parts_has_ids_and_parts_of_logits(bundle: Path, pictures: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done(classify(bundle, tmp_path / "in", "--out", out, "--chunk", "8", "--batch", "3", "--top", "4"))
    table = read_parts(out)
    assert table["path"].to_pylist() == [path.relative_to(tmp_path / "in").as_posix() for path in pictures]
    assert_answers(bundle, table, pictures, top=4)
    manifest, classifier = read_manifest(out, "classifications"), Classifier.load(bundle)
    assert (manifest["images"], manifest["classified"], manifest["errors"], manifest["top"]) == (30, 30, 0, 4)
    assert manifest["classifier"] == fingerprint(classifier.snapshot()) and manifest["classes"] == 8
    assert manifest["method"] == classifier.method_ and manifest["engine"] == classifier.encoder.fingerprint


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_embeddings_are_those_of_the_encoder(bundle: Path, pictures: list[Path], tmp_path: Path, dtype: str) -> None:
    out, before = tmp_path / "out", os.umask(0o022)
    try:
        done(embed(bundle, tmp_path / "in", out, "--dtype", dtype, "--chunk", "8", "--batch", "3"))
    finally:
        os.umask(before)
    part = read_embeddings(out)
    assert part.keys == [path.relative_to(tmp_path / "in").as_posix() for path in pictures]
    assert str(part.embeddings.plain.dtype) == str(part.embeddings.adapted.dtype) == dtype
    assert_encodes(bundle, part, pictures, 1e-5 if dtype == "float32" else 1e-3)
    assert [len(one.keys) for one in iterate_parts(out)] == [8, 8, 8, 6]
    manifest = read_manifest(out, "embeddings")
    assert (manifest["images"], manifest["embedded"], manifest["errors"]) == (30, 30, 0)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}, "others can read it"


@pytest.mark.parametrize("command", ["embed", "parts", "labels.csv"])
def test_an_unreadable_image_stops_a_run_or_is_a_row_with_its_error(
    command: str, bundle: Path, pictures: list[Path], tmp_path: Path
) -> None:
    def start(*words: str) -> Result:
        if command == "embed":
            return embed(bundle, tmp_path / "in", out, "--chunk", "5", *words)
        return classify(bundle, tmp_path / "in", "--out", out, "--chunk", "5", *words)

    out, good = tmp_path / command, pictures[17].read_bytes()
    parts = tmp_path / "labels.csv.parts" if command == "labels.csv" else out
    pictures[17].write_bytes(good[:40])
    for _ in range(2):
        said = refused(start())
        assert f"can't read image {pictures[17]}: " in said and "the finished parts are kept" in said
        assert len(logged(parts)) == 3 and not (out / "manifest.json").exists()
    said = done(start("--skip-bad"))
    assert "15 of 30 images are done already" in said and "could not read 1 of 30 images" in said
    if command == "embed":
        part = read_embeddings(out)
        assert [i for i, error in enumerate(part.errors) if error] == [17]
        for array in (part.embeddings.plain, part.embeddings.adapted):
            assert np.isnan(array[17]).all() and np.isfinite(np.delete(array, 17, axis=0)).all()
    elif command == "parts":
        table = read_parts(out)
        rest = [i for i in range(30) if i != 17]
        assert_answers(bundle, table.take(rest), [pictures[i] for i in rest])
        bad = table.slice(17, 1).to_pylist()[0]
        assert bad.pop("error") and bad.pop("path") and set(bad.values()) == {None}
    else:
        assert [bool(row["error"]) for row in read_rows(out)].index(True) == 17
        return
    assert "is computed again: 1 of its images could not be read" in refused(start())
    pictures[17].write_bytes(good)
    done(start())
    assert command != "embed" or not any(read_embeddings(out).errors)


# Pictures of none of the classes


@pytest.fixture(scope="module")
def folder(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of the bundle's classes, of others, and one that can't be read."""
    folder = tmp_path_factory.mktemp("folder")
    known, _ = held_out_queries(8, 3)
    for i, image in enumerate([*known[:: max(1, len(known) // 10)][:10], *load_images()[100:1300:100]]):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    (folder / "99.png").write_bytes(b"no picture")
    return folder


REJECT = ("--reject-unknown", "--unknown-label", "?", "--keep", "0.9", "--skip-bad")


def test_unknown_pictures_are_rejected_alike_everywhere(bundle: Path, folder: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    classifier = Classifier.load(bundle, threads=1)
    paths = sorted(folder.glob("[0-8]*.png"))
    labels = classifier.predict(paths, unknown="reject", unknown_label="?", keep=0.9).tolist()
    scores = classifier.unknown_score(paths)
    assert 4 <= labels.count("?") <= len(labels) - 4

    found = classifier.predict_folder(folder, skip_bad=True, unknown="reject", unknown_label="?", keep=0.9)
    assert found.labels.tolist() == labels and found.paths == paths
    np.testing.assert_allclose([one.score for one in found.rejections], scores, atol=1e-3)
    np.testing.assert_allclose(found.probabilities, classifier.predict_proba(found.paths).max(1), atol=1e-3)

    said = done(classify(bundle, folder, *REJECT, "--top", "2", "--out", tmp_path / "labels.csv"))
    assert f"rejected {labels.count('?')} of {len(labels)} images as '?'" in said
    *rows, bad = read_rows(tmp_path / "labels.csv")
    assert list(bad)[-2:] == ["unknown_score", "error"] and bad["error"] and not bad["unknown_score"] + bad["label"]
    assert [row["label"] for row in rows] == labels
    np.testing.assert_allclose([float(row["unknown_score"]) for row in rows], scores, atol=1e-3)
    assert classify(bundle, folder, *REJECT, "--top", "2").stdout == (tmp_path / "labels.csv").read_text()

    for name in ("labels.parquet", "parts"):
        done(classify(bundle, folder, *REJECT, "--out", tmp_path / name))
        table = pq.read_table(tmp_path / name) if name.endswith("parquet") else read_parts(tmp_path / name)
        assert table.column_names[-3:] == ["top", "unknown_score", "error"]
        assert len(table.column_names) == 10
        assert table["label"].to_pylist() == [*labels, None]
        assert "?" not in [classes[0]["label"] for classes in table["top"].to_pylist()[:-1]]
        np.testing.assert_allclose(table["unknown_score"].to_pylist()[:-1], scores, atol=1e-3)
    assert [row is None for row in table["class_id"].to_pylist()] == [label == "?" for label in labels] + [True]
    assert read_manifest(tmp_path / "parts", "classifications")["rejected"] == labels.count("?")


@pytest.mark.parametrize("tree", [False, True])
def test_labels_are_accepted_by_a_promise_alike_everywhere(
    tree: bool, bundle: Path, folder: Path, tmp_path: Path
) -> None:
    """By a classifier with a tree their nodes, with level and path."""
    import pyarrow.parquet as pq

    classifier, reject = Classifier.load(bundle, threads=1), {"unknown": "reject", "keep": 0.9}
    if tree:
        with_tree(classifier, [(f"<{c // 4}>", f"pair {c // 2}") for c in range(8)]).save(bundle := tmp_path / "saved")
    columns = ["accepted", *["level", "label_path"] * tree, "error"]
    found = classifier.predict_folder(folder, skip_bad=True, unknown_label="?", max_error=0.5, **reject)
    expected = classifier.explain(found.paths, max_error=0.5, **reject)
    accepted = [one.accepted for one in expected]
    assert 2 <= sum(accepted) <= len(accepted) - 2 and found.accepted.tolist() == accepted
    assert found.labels.tolist() == [one.label or "?" for one in expected]
    np.testing.assert_allclose(found.probabilities, [one.probability for one in expected], atol=1e-5)
    alone = classifier.predict_folder(folder, skip_bad=True, max_error=0.5)
    assert (alone.accepted & (found.labels != "?")).tolist() == accepted and alone.rejections is None

    words = (*REJECT, "--max-error", "50%", "--out")
    said = done(classify(bundle, folder, *words, tmp_path / "labels.csv", "--html", tmp_path / "page.html"))
    assert f"accepted {sum(accepted)} of {len(accepted)} labels; {len(accepted) - sum(accepted)} need a look" in said
    assert all(f"{bundle}: {doubt}" in said for doubt in classifier.snapshot().doubts)
    *rows, bad = read_rows(tmp_path / "labels.csv")
    assert [row["accepted"] for row in rows] == [str(one).lower() for one in accepted] and bad["accepted"] == ""
    assert [row["label"] for row in rows] == found.labels.tolist() and list(bad)[-len(columns) :] == columns
    assert all(f">{escape(label)}</td>" in (tmp_path / "page.html").read_text() for label in found.labels)
    assert classify(bundle, folder, *words[:-1]).stdout == (tmp_path / "labels.csv").read_text()
    for name in ("labels.parquet", "parts"):
        done(classify(bundle, folder, *words, tmp_path / name))
        table = pq.read_table(tmp_path / name) if name.endswith("parquet") else read_parts(tmp_path / name)
        assert table["accepted"].to_pylist() == [*accepted, None] and str(table["accepted"].type) == "bool"
        assert table["label"].to_pylist() == [*found.labels, None] and table.column_names[-len(columns) :] == columns
    manifest = read_manifest(tmp_path / "parts", "classifications")
    assert (manifest["max_error"], manifest["accepted"]) == (0.5, sum(accepted))
    other = refused(classify(bundle, folder, *REJECT, "--max-error", "0.55", "--out", tmp_path / "parts"))
    assert "differs in max_error (there 0.5, now 0.55)" in other
    if tree:
        levels = [None if one.label is None else one.level for one in expected]
        above = [None if one.label is None else " > ".join([*one.path, one.label]) for one in expected]
        assert {0, None} < {*levels} <= {0, 1, 2, None} and not any(one.level for one in expected if not one.accepted)
        texts = [("", "") if path is None else (str(level), path) for level, path in zip(levels, above, strict=True)]
        assert [(row["level"], row["label_path"]) for row in rows] == texts
        assert table["level"].to_pylist() == [*levels, None] and table["label_path"].to_pylist() == [*above, None]
        nodes = [one.class_id is None for one in expected]
        assert [row is None for row in table["class_id"].to_pylist()] == [*nodes, True] and bad["level"] == ""
        classifier.move_class("~0", ())
        classifier.save(tmp_path / "moved")
        assert "differs in classifier" in refused(classify(tmp_path / "moved", folder, *words, tmp_path / "parts"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*REJECT[:1], "--keep", "0.99"), "left-out support images, got 24"),
        (("--max-error", "1%"), "needs at least 299 left-out support images, got 24"),
        (("--max-error", "100%"), "expected a share above 0 and below 1, like 0.01 or 1%, got '100%'"),
        ((*REJECT[:1], "--keep", "1"), "expected keep above 0 and below 1, like 0.95, got 1"),
        (("--keep", "0.9"), "expected --unknown-label and --keep only with --reject-unknown"),
        (("--top", "0"), "'--top': "),
        (("--gpus", "1"), "expected --workers, --gpus and --address only with --ray"),
        (("--chunk", "0"), "expected --chunk from 1 to 65536, got 0"),
        (("--runtime", "abacus"), "expected runtime 'auto' or one of"),
    ],
)
@pytest.mark.parametrize("out", ["labels.csv", "parts"])
def test_wrong_options_are_refused_before_an_image_is_read(
    out: str, words: tuple[str, ...], message: str, bundle: Path, folder: Path, tmp_path: Path
) -> None:
    assert message in refused(classify(bundle, folder, *words, "--out", tmp_path / out))
    assert not list(tmp_path.iterdir())


def test_files_that_are_there_are_not_replaced(bundle: Path, pictures: list[Path], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "mine.csv").write_text("mine")
    assert "holds other files than a run's parts" in refused(embed(bundle, tmp_path / "in", tmp_path / "mine"))
    assert "exists already" in refused(classify(bundle, tmp_path / "in", "--out", tmp_path / "mine.csv"))
    assert "exists already" in refused(classify(bundle, tmp_path / "in", "--out", tmp_path / "mine.csv", "--joint"))
    assert "expected a folder for --out" in refused(embed(bundle, tmp_path / "in", tmp_path / "a.csv"))
    assert "expected --out, and no --joint, with --ray" in refused(classify(bundle, tmp_path / "in", "--chunk", 3))
    assert (tmp_path / "mine.csv").read_text() == (tmp_path / "mine" / "notes.txt").read_text() == "mine"
