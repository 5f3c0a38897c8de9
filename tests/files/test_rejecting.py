"""Pictures of none of the classes in a folder: rejected by every way alike, counted, wrong options refused early."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from iosr_fast.classifier import Classifier
from iosr_fast.cli import app
from iosr_fast.exceptions import IosrFastError
from iosr_fast.files.ray_workers import Worker, row_of
from iosr_fast.files.sources import folder_source
from iosr_fast.images.preprocess import to_pixels
from iosr_fast.methods.joint import predict_jointly
from tests.files.runs import classified, load_images, part_bytes, read_all, run
from tools.demo.bundle import held_out_queries

pytestmark = pytest.mark.slow

KNOWN = 10


@pytest.fixture(scope="module")
def folder(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of the bundle's classes, of others, and one that can't be read."""
    folder = tmp_path_factory.mktemp("folder")
    known, _ = held_out_queries(8, 3)
    for i, image in enumerate([*known[:: max(1, len(known) // KNOWN)][:KNOWN], *load_images()[100:1300:100]]):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    (folder / "99.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def expected(bundle: Path, folder: Path) -> list[tuple[str, str, float]]:
    """Of each readable picture its name, its label and its score, by Classifier."""
    classifier = Classifier.load(bundle, threads=1)
    paths = sorted(folder.glob("[0-8]*.png"))
    labels = classifier.predict(paths, unknown="reject", unknown_label="?", keep=0.9).tolist()
    rows = list(zip([path.name for path in paths], labels, classifier.unknown_score(paths).tolist(), strict=True))
    assert 4 <= labels.count("?") <= len(labels) - 4
    return rows


def classify(bundle: Path, *words: object) -> Result:
    return CliRunner().invoke(app, ["classify", str(bundle), *map(str, words), "--threads", "1"])


REJECT = ("--reject-unknown", "--unknown-label", "?", "--keep", "0.9", "--skip-bad")


def test_a_folder(bundle: Path, folder: Path, expected: list[tuple[str, str, float]]) -> None:
    classifier = Classifier.load(bundle, threads=1)
    found = classifier.predict_folder(folder, skip_bad=True, unknown="reject", unknown_label="?", keep=0.9)
    assert [(path.name, label) for path, label, _ in found] == [row[:2] for row in expected]
    scores = [one.score for one in found.rejections]
    np.testing.assert_allclose(scores, [row[2] for row in expected], atol=1e-3)
    assert [one.rejected for one in found.rejections] == [label == "?" for label in found.labels]
    np.testing.assert_allclose(found.probabilities, classifier.predict_proba(found.paths).max(1), atol=1e-3)
    assert classifier.predict_folder(folder, skip_bad=True).rejections is None


def test_tables(bundle: Path, folder: Path, expected: list[tuple[str, str, float]], tmp_path: Path) -> None:
    out = tmp_path / "labels.csv"
    done = classify(bundle, folder, *REJECT, "--top", "2", "--out", out)
    rejected = sum(label == "?" for _, label, _ in expected)
    assert done.exit_code == 0, done.output
    assert f"rejected {rejected} of {len(expected)} images as '?'" in done.stderr
    with out.open(newline="", encoding="utf-8") as file:
        *rows, bad = csv.DictReader(file)
    assert list(bad)[-2:] == ["unknown_score", "error"] and bad["error"] and not bad["unknown_score"] + bad["label"]
    assert [(Path(row["path"]).name, row["label"]) for row in rows] == [row[:2] for row in expected]
    np.testing.assert_allclose([float(row["unknown_score"]) for row in rows], [row[2] for row in expected], atol=1e-3)
    printed = classify(bundle, folder, *REJECT)
    *lines, unread = csv.DictReader(printed.stdout.splitlines())
    assert [(row["label"], row["unknown_score"]) for row in lines] == [(r["label"], r["unknown_score"]) for r in rows]
    assert unread["error"] == bad["error"] and f"rejected {rejected} of" in printed.stderr

    pq = pytest.importorskip("pyarrow.parquet")
    assert classify(bundle, folder, *REJECT, "--out", tmp_path / "labels.parquet").exit_code == 0
    table = pq.read_table(tmp_path / "labels.parquet")
    assert table.column_names == ["path", "label", "probability", "top", "unknown_score", "error"]
    assert table["label"].to_pylist() == [*(label for _, label, _ in expected), None]
    assert "?" not in [classes[0]["label"] for classes in table["top"].to_pylist()[:-1]]
    assert table["unknown_score"].to_pylist()[-1] is None


def test_another_option_is_another_job(bundle: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels.csv"
    assert classify(bundle, folder, *REJECT[:-1], "--out", out).exit_code == 2  # stops at the unreadable picture
    before = (tmp_path / "labels.csv.journal").read_bytes()
    for words in ((), REJECT[:1], (*REJECT[:3], "--keep", "0.8")):
        other = classify(bundle, folder, *words, "--out", out)
        assert other.exit_code == 2 and "another run, which differs in unknown (there {'label': '?'" in other.output
    assert (tmp_path / "labels.csv.journal").read_bytes() == before
    assert classify(bundle, folder, *REJECT, "--out", out).exit_code == 0


def test_parts(bundle: Path, folder: Path, expected: list[tuple[str, str, float]], tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    out = tmp_path / "out"
    table = classified(bundle, folder, out, *REJECT, "--chunk", "8", "--batch", "3")
    own = ["key", "label", "class_id", "probability", "zero_shot", "cache", "adapter", "top", "unknown_score", "error"]
    assert table.column_names == own
    rows = table.to_pylist()
    assert [(row["key"], row["label"]) for row in rows[:-1]] == [row[:2] for row in expected]
    for row, (_, _, score) in zip(rows[:-1], expected, strict=True):
        rejected = row["label"] == "?"
        assert (row["class_id"] is None) == rejected and row["unknown_score"] == pytest.approx(score, abs=1e-3)
        assert row["probability"] == row["top"][0]["probability"]
        assert rejected or row["class_id"] == row["top"][0]["class_id"]
    assert rows[-1]["error"] and rows[-1]["unknown_score"] is rows[-1]["label"] is None
    again = run("classify", bundle, folder, out, *REJECT, "--chunk", "8", "--batch", "3")
    count = sum(label == "?" for _, label, _ in expected)
    assert "all 3 parts exist" in again.output and f"1 unreadable; {count} rejected as '?'" in again.output
    other = run("classify", bundle, folder, out, "--skip-bad", "--chunk", "8", "--batch", "3")
    assert other.exit_code == 2 and "differs in unknown_label (there ?, now None); keep (there 0.9" in other.output
    (out / "part-00001.parquet").write_bytes(b"")
    classified(bundle, folder, out, *REJECT, "--chunk", "8", "--batch", "3")
    assert read_all(out).equals(table)


def test_a_worker_of_ray_writes_the_same_part(bundle: Path, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    out = tmp_path / "out"
    classified(bundle, folder, out, *REJECT, "--chunk", "8", "--batch", "3")
    whole, plan = part_bytes(out), (out / "plan.json").read_text()
    (out / "part-00001.parquet").unlink()
    worker = Worker(str(bundle), "classifications", plan, str(out), 1, True)
    assert worker(row_of(folder_source(folder).cut(8)[1]))["images"] == 8
    assert part_bytes(out) == whole


def test_together(bundle: Path, folder: Path, expected: list[tuple[str, str, float]], tmp_path: Path) -> None:
    classifier = Classifier.load(bundle, threads=1)
    options = {"skip_bad": True, "unknown": "reject", "unknown_label": "?", "keep": 0.9}
    found = classifier.predict_folder(folder, joint=True, **options)
    marked = [label == "?" for _, label, _ in expected]
    assert [label == "?" for label in found.labels] == marked
    kept = [path for path, out in zip(found.paths, marked, strict=True) if not out]
    head = classifier.snapshot()
    queries = classifier.encoder.encode(to_pixels(kept, classifier.encoder.geometry))
    alone = predict_jointly(head.support, head.plan, head.out_of_fold, queries)
    np.testing.assert_allclose(found.joint.probabilities, alone.probabilities, atol=1e-3)
    written = classify(bundle, folder, *REJECT, "--joint", "--out", tmp_path / "a.csv")
    assert written.exit_code == 0 and f"rejected {sum(marked)} of {len(expected)} images" in written.stderr
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [row["label"] for row in rows[:-1]] == found.labels.tolist() and rows[-1]["error"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*REJECT[:1], "--keep", "0.99"), "needs at least 99 support images that can be left out, got 24"),
        ((*REJECT[:1], "--keep", "1"), "expected keep above 0 and below 1, like 0.95, got 1"),
        (("--keep", "0.9"), "expected --unknown-label and --keep only with --reject-unknown"),
    ],
)
@pytest.mark.parametrize("out", [None, "labels.csv", "parts"])
def test_what_can_not_be_is_refused_before_an_image_is_read(
    out: str | None, words: tuple[str, ...], message: str, bundle: Path, folder: Path, tmp_path: Path
) -> None:
    refused = classify(bundle, folder, *words, *([] if out is None else ["--out", tmp_path / out]))
    assert refused.exit_code == 2 and message in refused.output  # and not that 99.png can't be read
    assert not list(tmp_path.iterdir())


def test_a_class_is_not_unknown(bundle: Path, folder: Path) -> None:
    classifier = Classifier.load(bundle, threads=1)
    name = str(classifier.classes_[0])
    with pytest.raises(IosrFastError, match=f"that no class has, got '{name}'; choose another word"):
        classifier.predict_folder(folder, unknown="reject", unknown_label=name)
    with pytest.raises(IosrFastError, match="unknown pictures, got ' unknown', which has blanks around it"):
        classifier.predict_folder(folder, unknown="reject", unknown_label=" unknown")
    with pytest.raises(IosrFastError, match="expected unknown to be 'reject' or None, got 'yes'"):
        classifier.predict_folder(folder, unknown="yes")  # type: ignore[arg-type]
    with pytest.raises(IosrFastError, match="expected unknown_label to be a text"):
        classifier.predict_folder(folder, unknown="reject", unknown_label=None)  # type: ignore[arg-type]
