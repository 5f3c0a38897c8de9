"""`iosr-fast fit` and `iosr-fast optimize` on the demo's engines, which are built, timed and judged here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iosr_fast import Classifier
from iosr_fast.backbones.demo.pictures import load_pictures
from iosr_fast.backbones.load import load_clip
from iosr_fast.delivery import engine_judge
from iosr_fast.export.build import write_engine
from iosr_fast.export.source import source_of
from tests.cli.runs import refused, run
from tests.interpreter import printed

pytestmark = pytest.mark.slow

GIVEN = ("--method", "tip-adapter++", "--alpha", "3", "--beta", "7")
ALL = {(r, p) for r in ("openvino", "onnxruntime") for p in ("fp32", "int8")} | {("openvino", "bf16")}


@pytest.fixture(autouse=True)
def _cache(demo_cache: Path, exports_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOSR_FAST_CACHE", str(demo_cache))
    monkeypatch.setattr(engine_judge, "_TIMING_S", 0.1)


@pytest.fixture(scope="module")
def support(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six classes of four pictures."""
    folder = tmp_path_factory.mktemp("support")
    pictures = load_pictures("held-out", min_styles=5)
    for concept in range(0, 60, 10):
        for i in np.flatnonzero(pictures.concepts == concept)[:4]:
            path = folder / pictures.names[concept].replace(" ", "_") / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(pictures.images[i]).save(path)
    return folder


@pytest.fixture(scope="module")
def plain(support: Path, demo_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier in fp32, fitted on `support`."""
    folder = tmp_path_factory.mktemp("plain") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IOSR_FAST_CACHE", str(demo_cache))
        done = run("fit", support, "--model", "demo", "--out", folder, *GIVEN, "--precision", "fp32")
    assert done.exit_code == 0 and "chosen for" not in done.output, done.output
    return folder


def test_fit_chooses_an_engine(support: Path, tmp_path: Path) -> None:
    done = run("fit", support, "--model", "demo", "--out", tmp_path / "bundle", *GIVEN)
    assert done.exit_code == 0 and ", chosen for latency on " in done.output, done.output
    loaded = Classifier.load(tmp_path / "bundle")
    choice = loaded.engine_choice_
    assert choice is not None and {(row.runtime, row.precision) for row in choice.candidates} <= ALL
    assert {row.verdict for row in choice.candidates} <= {"chosen", "accepted", "not judged", "rejected", "left out"}
    assert choice.judged == choice.calibrated == 24 and loaded.version == 1
    assert loaded.encoder.runtime == choice.chosen.runtime
    assert loaded.encoder.source.manifest["precision"] == choice.chosen.precision
    shown = run("info", tmp_path / "bundle").output
    assert "\n".join(choice.lines()) in shown and "\n".join(choice.lines()) in done.output


def test_an_engine_of_optimize_lives_as_long_as_its_classifier(tmp_path: Path) -> None:
    pictures = load_pictures("held-out", min_styles=5)
    images, labels = pictures.images[:20], [pictures.names[c] for c in pictures.concepts[:20]]
    options = {"method": "tip-adapter++", "alpha": 3.0, "beta": 7.0}
    exact, classifier = (Classifier("demo", **options).fit(images, labels) for _ in range(2))
    choice = classifier.optimize(images, labels, objective="size")
    assert exact.engine_choice_ is None and choice.chosen.precision == "int8"
    built = classifier.engine_.parent
    assert built.name.startswith(".optimize.") and built.is_dir()
    cosines = (classifier.support_.embeddings.plain * exact.support_.embeddings.plain).sum(1)
    assert 0.99 < cosines.min() < 1.0
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    assert classifier.predict_folder(tmp_path).labels.tolist() == classifier.predict(images[:1]).tolist()
    classifier.save(tmp_path / "bundle")
    assert Classifier.load(tmp_path / "bundle").score(images, labels) == classifier.score(images, labels)
    del classifier
    assert not built.exists()


def test_an_engine_of_small_batches_is_timed_with_its_own(tmp_path: Path) -> None:
    write_engine(source_of(load_clip("demo")), tmp_path / "engine", "onnxruntime", max_batch=3)
    pictures = load_pictures("held-out", min_styles=5)
    images, labels = pictures.images[:20], [pictures.names[c] for c in pictures.concepts[:20]]
    classifier = Classifier("demo", engine=tmp_path / "engine", method="tip-adapter", alpha=3.0, beta=7.0)
    choice = classifier.fit(images, labels).optimize(images, labels, precision="fp32")
    assert choice.batch == 3 and {row.verdict for row in choice.candidates} <= {"chosen", "accepted", "not judged"}


def test_optimize_later(plain: Path, support: Path, tmp_path: Path) -> None:
    few = ("--images", support, "--runtime", "onnxruntime")
    done = run("optimize", plain, *few, "--objective", "size", "--out", tmp_path / "small")
    assert done.exit_code == 0 and "int8, chosen for size" in done.output, done.output
    old, new = Classifier.load(plain), Classifier.load(tmp_path / "small")
    assert new.version == old.version + 1 and new.classes_.tolist() == old.classes_.tolist()
    assert [new.examples(name) for name in new.classes_] == [old.examples(name) for name in old.classes_]
    assert new.picture("e0") == old.picture("e0") is not None
    assert 0.99 < (old.support_.embeddings.adapted * new.support_.embeddings.adapted).sum(1).min() < 1.0
    assert new.parameters_ == old.parameters_ and old.engine_choice_ is None
    # An engine in int8 keeps its precision, unless the CLIP is named.
    done = run("optimize", tmp_path / "small", *few)
    assert done.exit_code == 0 and "an engine in int8 can't be made more exact" in done.output, done.output
    assert Classifier.load(tmp_path / "small").version == new.version
    words = ("--images", support, "--precision", "fp32", "--pretrained", "demo", "--out", tmp_path / "exact")
    done = run("optimize", tmp_path / "small", *words)
    assert done.exit_code == 0, done.output
    exact = Classifier.load(tmp_path / "exact")
    assert exact.encoder.fingerprint == old.encoder.fingerprint
    np.testing.assert_allclose(exact.support_.embeddings.plain, old.support_.embeddings.plain, atol=1e-4)
    assert "expected the adapter that the engine was built from" in refused(
        "optimize", *words[:0], tmp_path / "small", *words, "--adapter", "none"
    )


def test_smaller_images(plain: Path, support: Path, tmp_path: Path) -> None:
    assert "name its weights by --pretrained" in refused("optimize", plain, "--images", support, "--smaller-images")
    words = ("--images", support, "--smaller-images", "--pretrained", "demo", "--tolerance", "100")
    only = ("--precision", "fp32", "--runtime", "openvino")
    done = run("optimize", plain, *words, *only, "--out", tmp_path / "out")
    assert done.exit_code == 0 and "fp32 56 pixels" in done.output, done.output
    loaded = Classifier.load(tmp_path / "out")
    choice = loaded.engine_choice_
    forms = {tuple((row.tokens or {}).items()): row for row in choice.candidates}
    assert set(forms) == {(), (("image_size", 56),), (("image_size", 48),)}
    assert all(row.verdict in ("chosen", "accepted", "not judged") for row in choice.candidates), choice.lines()
    assert loaded.encoder.image_size == (choice.chosen.tokens or {}).get("image_size", 64)
    paths = sorted(support.rglob("*.png"))
    assert loaded.score(paths, [path.parent.name.replace("_", " ") for path in paths]) > 0.5


def test_optimize_needs_no_torch(plain: Path, support: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\nfrom iosr_fast.cli import app\n"
        "from iosr_fast.delivery import engine_judge; engine_judge._TIMING_S = 0.1\n"
        f"app(['optimize', {str(plain)!r}, '--images', {str(support)!r}, '--out', {str(tmp_path / 'out')!r}])"
    )
    shown = printed(code)
    assert "chosen for latency" in shown and "int8" in shown and "failed" not in shown, shown


def test_mistakes_are_named_before_the_work(plain: Path, support: Path, tmp_path: Path) -> None:
    assert "tolerance of 0 to 100" in refused("optimize", plain, "--images", support, "--tolerance", "101")
    assert "found no folder" in refused("optimize", plain, "--images", tmp_path / "nowhere")
    assert "latency" in refused("optimize", plain, "--images", support, "--objective", "speed")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert "did not write" in refused("optimize", plain, "--images", support, "--out", tmp_path / "mine")
