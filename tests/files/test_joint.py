"""Joint prediction by Classifier, of folders and on the command line: one result, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iosr_fast.backbones.demo.pictures import load_pictures
from iosr_fast.classifier import Classifier
from iosr_fast.exceptions import BadImageError
from iosr_fast.methods import joint
from tests.files.runs import classify, done, load_images, read_rows, refused

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


@pytest.mark.parametrize("harmful", [False, True])
def test_every_way_gives_one_result(
    harmful: bool, bundle: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As many left-out images are right together as alone: the log-loss decides, if it is asked.
    monkeypatch.setattr(joint, "is_level", lambda *_: harmful)
    losses = iter([1.0, 2.0] * 9)
    monkeypatch.setattr(joint, "fit_factor", lambda *_: (1.0, next(losses)))
    classifier = Classifier.load(bundle, threads=1)
    found = classifier.predict_folder(folder, joint=True, batch=16, threads=1)
    assert found.joint is not None and len(found) >= 30 and found.paths == sorted(found.paths)
    direct = classifier.predict_jointly(found.paths)
    np.testing.assert_allclose(found.joint.probabilities, direct.probabilities, atol=1e-3)
    assert found.joint.refused == direct.refused and bool(direct.refused) == harmful
    np.testing.assert_array_equal(found.labels, direct.labels)
    if harmful:
        np.testing.assert_allclose(direct.probabilities, classifier.predict_proba(found.paths), atol=1e-3)

    out = tmp_path / "labels.csv"
    assert found.joint.summary() in done(classify(bundle, folder, "--joint", "--out", out, "--top", 2))
    rows = read_rows(out)
    assert [row["path"] for row in rows] == [str(path) for path in found.paths]
    assert [row["label"] for row in rows] == found.labels.tolist()
    np.testing.assert_allclose([float(row["probability"]) for row in rows], found.probabilities, atol=2e-3)
    assert all(row["label_2"] != row["label"] and not row["error"] for row in rows)
    printed = classify(bundle, folder, "--joint", "--top", 2)
    assert [row["label"] for row in read_rows(printed.stdout)] == found.labels.tolist()


def test_unreadable_and_unknown_images_are_left_out(bundle: Path, folder: Path, tmp_path: Path) -> None:
    for path in sorted(folder.iterdir())[:12]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for i in range(100, 1300, 100):
        Image.fromarray(load_images()[i]).save(tmp_path / f"x{i}.png")
    bad = tmp_path / "0000a.png"
    bad.write_bytes(b"no picture")
    classifier = Classifier.load(bundle, threads=1)
    with pytest.raises(BadImageError, match=bad.name):
        classifier.predict_folder(tmp_path, joint=True)
    reject = {"skip_bad": True, "unknown": "reject", "unknown_label": "?", "keep": 0.9}
    alone, found = (classifier.predict_folder(tmp_path, joint=joint, **reject) for joint in (False, True))
    assert [error.path for error in found.errors] == [bad] and len(found) == 24 and bad not in found.paths
    np.testing.assert_array_equal(found.labels == "?", alone.labels == "?")
    kept = [path for path, label, _ in found if label != "?"]
    assert 0 < len(kept) < 24
    np.testing.assert_allclose(found.joint.probabilities, classifier.predict_jointly(kept).probabilities, atol=1e-3)
    words = ("--joint", "--skip-bad", "--reject-unknown", "--unknown-label", "?", "--keep", "0.9")
    said = done(classify(bundle, tmp_path, *words, "--out", tmp_path / "a.csv"))
    assert f"rejected {24 - len(kept)} of 24 images as '?'" in said
    rows = {row["path"]: row for row in read_rows(tmp_path / "a.csv")}
    assert len(rows) == 25 and rows[str(bad)]["error"] and not rows[str(bad)]["label"]


def test_an_empty_folder_has_no_predictions(bundle: Path, tmp_path: Path) -> None:
    found = Classifier.load(bundle).predict_folder(tmp_path, joint=True)
    assert len(found) == 0 and found.joint is not None
    assert found.joint.refused == "there are no images to classify" and found.probabilities.shape == (0,)


def test_parts_promises_and_interrupted_runs_are_refused(bundle: Path, folder: Path, tmp_path: Path) -> None:
    parts = refused(classify(bundle, folder, "--joint", "--out", tmp_path / "parts"))
    assert "expected a file for --out with --joint, got the folder" in parts
    promised = refused(classify(bundle, folder, "--joint", "--max-error", "20%"))
    assert "the promise rests on support images that are classified alone" in re.sub(r"\s+", " ", promised)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    refused(classify(bundle, folder, tmp_path / "bad.png", "--out", tmp_path / "b.csv"))
    said = refused(classify(bundle, folder, tmp_path / "bad.png", "--joint", "--out", tmp_path / "b.csv"))
    assert "another run, which differs in joint (there False, now True)" in said and not (tmp_path / "b.csv").exists()
