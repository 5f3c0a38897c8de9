"""The Classifier on the demo's real engine, its folder on disk, and every bad input it has to name."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iosr_fast import Classifier
from iosr_fast.backbones.demo.pictures import load_pictures
from iosr_fast.encoders.opened_model import OpenedModel
from iosr_fast.methods import METHODS
from tests.store.live_parts import refit

pytestmark = pytest.mark.slow


ROOT = str(Path(__file__).parents[1])
CLASSES = 12
GIVEN = {"method": "tip-adapter++", "alpha": 3.0, "beta": 7.0}  # where no choice is tested


@pytest.fixture(scope="module")
def clip(demo_cache: Path) -> OpenedModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IOSR_FAST_CACHE", str(demo_cache))
        return Classifier("demo", runtime="onnxruntime")._open()


@pytest.fixture
def fresh(clip: OpenedModel, demo_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Classifier:
    """Unfitted, on an engine and a CLIP that are opened once."""
    monkeypatch.setenv("IOSR_FAST_CACHE", str(demo_cache))
    return Classifier._with_clip(clip)


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Support images and labels, query images and labels, class names."""
    all_of_them = load_pictures("held-out", min_styles=5)
    chosen = np.linspace(0, len(all_of_them.names) - 1, CLASSES).astype(int)  # neighbours in Unicode look alike
    rows = [np.flatnonzero(all_of_them.concepts == c) for c in chosen]
    support, queries = np.concatenate([r[:3] for r in rows]), np.concatenate([r[3:] for r in rows])
    images, labels = all_of_them.images, np.searchsorted(chosen, all_of_them.concepts)
    names = [all_of_them.names[c] for c in chosen]
    return images[support], labels[support], images[queries], labels[queries], names


@pytest.fixture
def folder(tmp_path: Path, pictures) -> Path:
    images, labels, _, _, names = pictures
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = tmp_path / "images" / names[label].replace(" ", "_")
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path / f"{i}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("method", sorted(METHODS))
def test_classifies_far_above_chance(fresh: Classifier, pictures, method: str) -> None:
    images, labels, queries, truth, names = pictures
    assert refit(fresh, images, [names[c] for c in labels], class_names=names, method=method) is fresh
    assert fresh.classes_.tolist() == names and fresh.method_ == method
    accuracy = fresh.score(queries, truth)
    assert accuracy > (0.4 if METHODS[method].needs_support else 1.5 / CLASSES)
    assert accuracy == np.mean(fresh.predict(queries) == np.array(names)[truth])


@pytest.mark.usefixtures("fresh")
def test_the_script_that_type_checkers_read_runs(folder: Path) -> None:
    runpy.run_path(f"{ROOT}/tests/typed_script.py")["main"](folder, next(folder.iterdir()), folder.parent)


def test_many_images_are_encoded_in_chunks(fresh: Classifier, pictures) -> None:
    images, labels, queries, _, names = pictures
    refit(fresh, images, labels, class_names=names, **GIVEN)
    many = np.concatenate([queries] * (320 // len(queries) + 1))[:320]
    logits = fresh.decision_function(many)
    assert logits.shape == (320, CLASSES)
    np.testing.assert_allclose(logits[len(queries) : 2 * len(queries)], logits[: len(queries)], rtol=1e-5, atol=1e-3)
    with pytest.raises(ValueError, match=r"number 301: expected shape"):
        fresh.predict([*many[:301], np.zeros((3, 3, 7), np.uint8)])


def test_a_folder_is_fitted_saved_and_loaded_without_torch(fresh: Classifier, folder: Path, pictures) -> None:
    names, queries = sorted(pictures[-1], key=lambda name: name.replace(" ", "_")), pictures[2]
    fresh.set_params(**GIVEN).fit_folder(folder)
    assert fresh.classes_.tolist() == names and len(fresh.support_.embeddings) == 3 * CLASSES
    for _ in range(2):  # the second time over the first
        fresh.save(folder.parent / "saved")
    loaded = Classifier.load(folder.parent / "saved")
    np.testing.assert_allclose(loaded.decision_function(queries), fresh.decision_function(queries), atol=1e-5)
    again = loaded.set_params(alpha=2.0).fit_folder(folder)  # by the saved text encoder
    fresh.set_params(alpha=2.0).fit_folder(folder)  # by that of the whole CLIP
    np.testing.assert_allclose(again.decision_function(queries), fresh.decision_function(queries), atol=1e-3)
    np.save(folder.parent / "queries.npy", queries[:3])
    program = (
        "import sys, numpy as np; from iosr_fast import Classifier; c = Classifier.load('saved');"
        "print(*c.predict(np.load('queries.npy')), sep='|'); q = np.load('queries.npy');"
        "c.add_class('new', q, descriptions=['a', 'b']);"
        "assert 'torch' not in sys.modules and 'open_clip' not in sys.modules, 'torch was imported'"
    )
    options = {"capture_output": True, "text": True, "cwd": folder.parent, "env": {**os.environ, "PYTHONPATH": ROOT}}
    done = subprocess.run([sys.executable, "-c", program], check=False, **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().split("|") == Classifier.load(folder.parent / "saved").predict(queries[:3]).tolist()


def test_engine_or_adapter_of_another_clip_is_refused(clip: OpenedModel, demo_cache: Path, monkeypatch) -> None:
    monkeypatch.setenv("IOSR_FAST_CACHE", str(demo_cache))
    from iosr_fast.export.pretrained import DEMO_ADAPTER

    for message, parameters in {
        "expected the CLIP that the engine was built from": {
            "pretrained": "none",
            "adapter": None,
            "engine": clip.engine,
        },
        "trained for another CLIP": {"pretrained": "none", "adapter": DEMO_ADAPTER},
        "use 'tip-adapter'": {"adapter": None, "runtime": "torch", "method": "tip-adapter++"},
    }.items():
        with pytest.raises(ValueError, match=message):
            Classifier("demo", **parameters).fit(["a.jpg", "b.jpg"], ["a", "b"])
