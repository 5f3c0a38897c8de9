"""Joint prediction by Classifier, of folders and on the command line: one result, and what is refused."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from iosr_fast.classifier import Classifier
from iosr_fast.cli import app
from iosr_fast.clip.demo.pictures import load_pictures
from iosr_fast.exceptions import BadImageError
from iosr_fast.methods import joint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of the demo's held-out concepts, most of them of the bundle's classes."""
    names = set(Classifier.load(bundle).classes_)
    pictures = load_pictures("held-out", min_styles=5)
    folder = tmp_path_factory.mktemp("joint")
    for i, (image, concept) in enumerate(zip(pictures.images, pictures.concepts, strict=True)):
        if pictures.names[concept] in names:
            Image.fromarray(image).save(folder / f"{i:04}.png")
    return folder


def classify(bundle: Path, *words: object) -> Result:
    return CliRunner().invoke(app, ["classify", str(bundle), *map(str, words), "--joint", "--threads", "1"])


@pytest.mark.parametrize("refused", [False, True])
def test_one_result_by_every_way(
    refused: bool, bundle: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As many left-out images are right together as alone: the log-loss decides, if it is asked.
    monkeypatch.setattr(joint, "is_level", lambda *_: refused)
    losses = iter([1.0, 2.0] * 9)
    monkeypatch.setattr(joint, "fit_factor", lambda *_: (1.0, next(losses)))
    classifier = Classifier.load(bundle, threads=1)
    found = classifier.predict_folder(folder, joint=True, batch=16, threads=1)
    assert found.joint is not None and len(found) >= 30 and found.paths == sorted(found.paths)
    direct = classifier.predict_jointly(found.paths)
    np.testing.assert_allclose(found.joint.probabilities, direct.probabilities, atol=1e-3)
    assert found.joint.refused == direct.refused and found.joint.left_out == direct.left_out == 24
    np.testing.assert_array_equal(found.labels, direct.labels)
    np.testing.assert_array_equal(found.probabilities, found.joint.probabilities.max(1))
    assert bool(direct.refused) == refused
    if refused:
        np.testing.assert_allclose(direct.probabilities, classifier.predict_proba(found.paths), atol=1e-3)

    out = tmp_path / "labels.csv"
    written = classify(bundle, folder, "--out", out, "--top", 2)
    assert written.exit_code == 0 and found.joint.summary() in written.stderr
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [str(path) for path in found.paths]
    assert [row["label"] for row in rows] == found.labels.tolist()
    np.testing.assert_allclose([float(row["probability"]) for row in rows], found.probabilities, atol=2e-3)
    assert all(row["label_2"] != row["label"] and not row["error"] for row in rows)
    printed = classify(bundle, folder)
    assert [row["label"] for row in csv.DictReader(printed.stdout.splitlines())] == found.labels.tolist()


def test_unreadable_images_are_raised_or_left_out(bundle: Path, folder: Path, tmp_path: Path) -> None:
    for path in sorted(folder.iterdir())[:12]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    bad = tmp_path / "0000a.png"
    bad.write_bytes(b"no picture")
    classifier = Classifier.load(bundle, threads=1)
    with pytest.raises(BadImageError, match=bad.name):
        classifier.predict_folder(tmp_path, joint=True)
    found = classifier.predict_folder(tmp_path, joint=True, skip_bad=True)
    assert [error.path for error in found.errors] == [bad] and len(found) == 12 and bad not in found.paths
    assert classify(bundle, tmp_path, "--out", tmp_path / "a.csv").exit_code != 0
    assert classify(bundle, tmp_path, "--out", tmp_path / "a.csv", "--skip-bad").exit_code == 0
    rows = {row["path"]: row for row in csv.DictReader((tmp_path / "a.csv").read_text().splitlines())}
    assert len(rows) == 13 and rows[str(bad)]["error"] and not rows[str(bad)]["label"]


def test_an_empty_folder(bundle: Path, tmp_path: Path) -> None:
    found = Classifier.load(bundle).predict_folder(tmp_path, joint=True)
    assert len(found) == 0 and found.joint is not None
    assert found.joint.refused == "there are no images to classify" and found.probabilities.shape == (0,)


def test_parts_and_interrupted_runs_are_refused(bundle: Path, folder: Path, tmp_path: Path) -> None:
    parts = classify(bundle, folder, "--out", tmp_path / "parts")
    assert "expected a file for --out with --joint, got the folder" in parts.stderr
    (tmp_path / "b.csv.journal").write_bytes(b"")
    resumed = classify(bundle, folder, "--out", tmp_path / "b.csv")
    assert "holds an interrupted run without --joint" in resumed.stderr
    assert not (tmp_path / "b.csv").exists()
