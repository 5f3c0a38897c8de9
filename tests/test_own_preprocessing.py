"""A CLIP with preprocessing of its own, from open_clip's configuration through engine and bundle to every caller."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
from open_clip import pretrained
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

from benchmarks.photographs import photograph
from iosr_fast import Classifier
from iosr_fast.backbones.demo.pictures import FOLDER, load_pictures
from iosr_fast.backbones.load import LoadedModel, load_clip
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.export.build import write_engine
from iosr_fast.export.source import EngineSource, source_of
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.preprocess import decode_pixels
from iosr_fast.sealed.manifest import MANIFEST
from iosr_fast.serving.batching import BatchingClassifier
from iosr_fast.store.description import describe
from tests.store.manifests import rewrite_manifest

pytestmark = pytest.mark.slow

SQUASH = Geometry(64, "squash", "bilinear")
DEFAULT = {
    "mean": OPENAI_DATASET_MEAN,
    "std": OPENAI_DATASET_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
TAGS = {
    "iosr-squash": {"one": {**DEFAULT, "interpolation": "bilinear", "resize_mode": "squash"}},
    "iosr-default": {"one": DEFAULT},
}


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tiny models with tags, which say how their weights were trained. Nothing is downloaded."""
    folder, patch = tmp_path_factory.mktemp("models"), pytest.MonkeyPatch()
    config = json.loads((FOLDER / "iosr-fast-demo.json").read_text())
    config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 2
    for name, tags in TAGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")
        patch.setitem(pretrained._PRETRAINED, name, tags)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def clip() -> LoadedModel:
    return load_clip("iosr-squash", "none")


@pytest.fixture(scope="module")
def engine(clip: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "squash"
    write_engine(source_of(clip), folder, "onnxruntime")
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Wide, tall and large ones, for which another geometry gives other pixels."""
    folder, pictures = tmp_path_factory.mktemp("photographs"), load_pictures("held-out").images
    shapes = [(300, 100), (90, 250), (900, 500), (64, 200), (400, 399), (150, 70)]
    paths = [folder / f"{i}.{'jpg' if i % 2 else 'png'}" for i in range(len(shapes))]
    for i, path in enumerate(paths):
        photograph(pictures[60 * i], *shapes[i], seed=i).save(path)
    return paths


def test_an_engine_keeps_the_geometry(engine: Path, tmp_path: Path) -> None:
    manifest = json.loads((engine / MANIFEST).read_text())
    assert (manifest["image_size"], manifest["resize_mode"], manifest["interpolation"]) == (64, "squash", "bilinear")
    assert "fill" not in manifest and open_engine(engine).geometry == SQUASH
    write_engine(EngineSource(engine), tmp_path / "openvino", "openvino", "fp32")
    assert open_engine(tmp_path / "openvino").geometry == SQUASH


def test_an_older_manifest_is_the_shorter_side(engine: Path, tmp_path: Path) -> None:
    write_engine(source_of(load_clip("iosr-default", "none")), tmp_path / "engine", "onnxruntime")
    manifest = json.loads((tmp_path / "engine" / MANIFEST).read_text())
    assert manifest["interpolation"] == "bicubic" and not {"resize_mode", "fill"} & set(manifest)
    assert open_engine(tmp_path / "engine").geometry == Geometry(64)
    for wrong in ({"resize_mode": "stretch"}, {"interpolation": "nearest"}, {"resize_mode": "longest", "fill": 256}):
        rewrite_manifest(tmp_path / "engine", **wrong)
        with pytest.raises(ValueError, match=r"manifest\.json"):
            open_engine(tmp_path / "engine")
        rewrite_manifest(tmp_path / "engine", remove=list(wrong), interpolation="bicubic")
    rewrite_manifest(tmp_path / "engine", resize_mode="longest", fill=7)
    assert open_engine(tmp_path / "engine").geometry == Geometry(64, "longest", fill=7)


def test_every_caller_of_a_classifier_uses_the_same_pixels(
    engine: Path, photographs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"class {i % 3}" for i in range(len(photographs))]
    classifier = Classifier(
        "iosr-squash", pretrained="none", adapter=None, engine=engine, method="tip-adapter", alpha=1.0, beta=5.0
    ).fit(photographs, names)
    classifier.save(tmp_path / "bundle")
    facts = json.loads((tmp_path / "bundle" / MANIFEST).read_text())["preprocessing"]
    expected_facts = {"image_size": 64, "interpolation": "bilinear", "resize_mode": "squash"}
    assert {key: facts[key] for key in expected_facts} == expected_facts
    assert ", 64 pixels (resize_mode squash, interpolation bilinear), 128 channels" in describe(tmp_path / "bundle")
    loaded = Classifier.load(tmp_path / "bundle")
    assert loaded.encoder.geometry == SQUASH

    encoded: list[np.ndarray] = []
    encode = type(loaded.encoder).encode_on_device
    monkeypatch.setattr(
        type(loaded.encoder), "encode_on_device", lambda self, pixels: (encoded.extend(pixels), encode(self, pixels))[1]
    )
    expected = np.stack([decode_pixels(path, SQUASH) for path in photographs])

    def pixels() -> np.ndarray:
        """Of the pictures that were encoded since the last call, in the order of `expected`."""
        rows = {row.tobytes(): row for row in encoded}
        encoded.clear()
        return np.stack([rows[row.tobytes()] for row in expected])

    labels = list(loaded.predict(photographs))
    np.testing.assert_array_equal(pixels(), expected)
    assert loaded.predict_folder(photographs[0].parent).labels.tolist() == labels
    np.testing.assert_array_equal(pixels(), expected)
    for isolated in (False, True):
        encoded.clear()
        with BatchingClassifier(loaded, decode_threads=1, isolated=isolated) as batching:
            answers = batching.submit_many([path.read_bytes() for path in photographs])
            assert [answer.result(60).label for answer in answers] == labels
        np.testing.assert_array_equal(pixels(), expected)
    loaded.add_examples(names[0], [photographs[0]])
    np.testing.assert_array_equal(encoded[-1], expected[0])

    rewrite_manifest(tmp_path / "bundle", preprocessing={**facts, "resize_mode": "shortest"})
    with pytest.raises(ValueError, match="expected the engine's resize_mode, squash, got shortest"):
        Classifier.load(tmp_path / "bundle")
