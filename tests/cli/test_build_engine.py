"""iosr-fast build-engine from the command line, on the demo's CLIP."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.export import build
from tests.cli.runs import done, refused
from tests.demo_cache import export_once

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo with a random adapter, built for ONNX Runtime, and what was printed."""
    folder = tmp_path_factory.mktemp("built") / "engine"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "export_onnx", export_once)
        options = ("--first-adapted-block", "4", "--runtime", "onnxruntime", "--max-batch", "5")
        return folder, done("build-engine", "--out", folder, *options)


def test_a_random_adapter_is_named_and_the_numbers_are_printed(built: tuple[Path, str]) -> None:
    folder, stdout = built
    for words in ("RANDOM adapter", "3 random pictures: max error", "8 real pictures", "engine/encoder.onnx"):
        assert words in stdout
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["model"], manifest["adapter"], manifest["first_adapted_block"]) == ("demo", "random", 4)
    assert str(folder) not in json.dumps(manifest)
    encoder = open_engine(folder)
    embeddings = encoder.encode(np.full((6, encoder.image_size, encoder.image_size, 3), 77, np.uint8))
    assert embeddings.adapted is not None and embeddings.adapted.shape == (6, encoder.width)


def test_an_engine_without_an_adapter_has_plain_embeddings(tmp_path: Path) -> None:
    shown = done("build-engine", "--out", tmp_path / "engine", "--adapter", "none", "--runtime", "torch")
    assert "plain embeddings only" in shown and "adapted " not in shown
    assert json.loads((tmp_path / "engine" / "manifest.json").read_text())["first_adapted_block"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "a.safetensors", "--first-adapted-block", "3"], "knows its own blocks"),
        (["--adapter", "a.safetensors"], "no adapter at a.safetensors"),
        (["--model", "ViT-B-17"], "ViT-B-17"),
        (["--first-adapted-block", "99"], "got 99"),
        (["--adapter", "none", "--precision", "int4"], "got 'int4'"),
        (["--adapter", "none", "--runtime", "tvm"], "got 'tvm'"),
        (["--calibration", "photos"], "--calibration is for int8 and fp8, got --precision fp32"),
        (["--precision", "int8", "--calibration", "photos"], "found no folder photos"),
        (["--model", "RN50", "--pretrained", "none", "--precision", "int8"], "RN50"),
    ],
)
def test_wrong_options_are_refused_before_the_work(options: list[str], message: str, tmp_path: Path) -> None:
    said = refused("build-engine", "--out", tmp_path / "engine", *options)
    assert message in " ".join(said.split()) and list(tmp_path.iterdir()) == []
