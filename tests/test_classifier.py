"""The Classifier on the demo's real engine, its folder on disk, and every bad input it has to name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iosr_fast import Classifier
from iosr_fast.clip.demo.pictures import load_pictures
from iosr_fast.encoders.opened_clip import OpenedClip
from iosr_fast.methods import METHODS
from tests.store.live_parts import refit

pytestmark = pytest.mark.slow

pytest.importorskip("open_clip", reason="open_clip comes with the cpu extra")
pytest.importorskip("onnxruntime", reason="onnxruntime comes with the cpu extra")

CLASSES = 12
GIVEN = {"method": "tip-adapter++", "alpha": 3.0, "beta": 7.0, "views": 1}  # where no choice is tested


@pytest.fixture(scope="module")
def clip(demo_cache: Path) -> OpenedClip:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IOSR_FAST_CACHE", str(demo_cache))
        return Classifier("demo", runtime="onnxruntime")._open()


@pytest.fixture
def fresh(clip: OpenedClip, demo_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Classifier:
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
    assert refit(fresh, images, [names[c] for c in labels], class_names=names, method=method, views=1) is fresh
    assert fresh.classes_.tolist() == names and fresh.method_ == method
    accuracy = fresh.score(queries, truth)
    assert accuracy > (0.4 if METHODS[method].needs_support else 1.5 / CLASSES)
    assert accuracy == np.mean(fresh.predict(queries) == np.array(names)[truth])
    assert accuracy == fresh.score(queries, [names[c] for c in truth])


def test_many_images_are_encoded_in_chunks(fresh: Classifier, pictures, monkeypatch) -> None:
    images, labels, queries, _, names = pictures
    refit(fresh, images, labels, class_names=names, **GIVEN)
    many = np.concatenate([queries] * (320 // len(queries) + 1))[:320]
    logits = fresh.decision_function(many)
    assert logits.shape == (320, CLASSES)
    np.testing.assert_allclose(logits[len(queries) : 2 * len(queries)], logits[: len(queries)], rtol=1e-5, atol=1e-3)
    # An array of the right size goes to the encoder as it is.
    monkeypatch.setattr("iosr_fast.images.preprocess.open_image", lambda *_: pytest.fail("a picture was decoded"))
    np.testing.assert_allclose(fresh.decision_function(queries), logits[: len(queries)], rtol=1e-5, atol=1e-3)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"number 301: expected shape"):
        fresh.predict([*many[:301], np.zeros((3, 3, 7), np.uint8)])


def test_fit_folder_and_skip_bad(fresh: Classifier, folder: Path, pictures, caplog: pytest.LogCaptureFixture) -> None:
    names = pictures[-1]
    fresh.set_params(**GIVEN).fit_folder(folder)
    assert fresh.classes_.tolist() == sorted(names, key=lambda name: name.replace(" ", "_"))
    assert len(fresh.support_.embeddings) == 3 * CLASSES
    bad = folder / names[0].replace(" ", "_") / "zz.jpg"
    bad.write_bytes(b"\xff\xd8 not a picture")
    with pytest.raises(ValueError, match=r"zz\.jpg"):
        fresh.fit_folder(folder)
    fresh.set_params(skip_bad=True).fit_folder(folder)
    assert fresh.skipped_ == [str(bad)] and "zz.jpg" in caplog.text
    assert len(fresh.support_.embeddings) == 3 * CLASSES


def test_engine_or_adapter_of_another_clip_is_refused(clip: OpenedClip) -> None:
    with pytest.raises(ValueError, match="expected the CLIP that the engine was built from"):
        Classifier("demo", pretrained="none", engine=clip.engine).fit(["a.jpg", "b.jpg"], ["a", "b"])
    from iosr_fast.export.pretrained import DEMO_ADAPTER

    with pytest.raises(ValueError, match="trained for another CLIP"):
        Classifier("demo", pretrained="none", adapter=DEMO_ADAPTER).fit(["a.jpg", "b.jpg"], ["a", "b"])


def test_without_an_adapter_plus_plus_is_refused(demo_cache: Path, monkeypatch, pictures) -> None:
    monkeypatch.setenv("IOSR_FAST_CACHE", str(demo_cache))
    images, labels, queries, truth, names = pictures
    plain = Classifier("demo", adapter=None, runtime="torch")
    with pytest.raises(ValueError, match="use 'tip-adapter'"):
        refit(plain, images, labels, class_names=names, method="tip-adapter++")
    assert not refit(plain, images, labels, class_names=names, views=1).method_.endswith("++")
    assert refit(plain, images, labels, class_names=names, method="tip-adapter", views=1).score(queries, truth) > 0.5


def test_save_and_load(fresh: Classifier, pictures, tmp_path: Path) -> None:
    images, labels, queries, _, names = pictures
    refit(fresh, images, [names[c] for c in labels], class_names=names, **GIVEN)
    for _ in range(2):  # the second time over the first
        fresh.save(tmp_path / "saved")
    loaded = Classifier.load(tmp_path / "saved")
    np.testing.assert_allclose(loaded.decision_function(queries), fresh.decision_function(queries), atol=1e-5)
    assert loaded.parameters_ == {"alpha": 3.0, "beta": 7.0} and loaded.classes_.tolist() == names
    loaded.save(tmp_path / "again")
    again = Classifier.load(tmp_path / "again")
    given = {**GIVEN, "alpha": 2.0, "class_names": names}
    refit(again, images, labels, **given)  # by the saved text encoder
    refit(fresh, images, labels, **given)  # by that of the whole CLIP
    np.testing.assert_allclose(again.decision_function(queries), fresh.decision_function(queries), atol=1e-3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not delete")
    with pytest.raises(FileExistsError, match="holds files that iosr_fast did not write"):
        fresh.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "do not delete"


def test_loading_needs_no_torch(fresh: Classifier, pictures, tmp_path: Path) -> None:
    images, labels, queries, _, names = pictures
    refit(fresh, images, [names[c] for c in labels], class_names=names, **GIVEN).save(tmp_path / "saved")
    np.save(tmp_path / "queries.npy", queries[:3])
    program = (
        "import sys, numpy as np; from iosr_fast import Classifier;"
        f"c = Classifier.load({str(tmp_path / 'saved')!r});"
        f"print(*c.predict(np.load({str(tmp_path / 'queries.npy')!r})), sep='|');"
        f"c.add_class('new', np.load({str(tmp_path / 'queries.npy')!r})); assert len(c.classes_) == {CLASSES + 1};"
        "assert 'torch' not in sys.modules and 'open_clip' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().split("|") == fresh.predict(queries[:3]).tolist()
