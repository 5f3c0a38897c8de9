"""iosr-fast build-engine from the command line, on the demo's CLIP."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from tests import ROOT

pytest.importorskip("open_clip")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from iosr_fast.cli import build_engine
from iosr_fast.encoders.engine_folder import ONNX_RUNTIMES
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.export import build
from iosr_fast.utils import machine
from iosr_fast.utils.command import command_app
from iosr_fast.utils.manifest import read_manifest
from tests.demo_cache import export_once

pytestmark = pytest.mark.slow


def run_command(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> Result:
    """In this process, which has imported torch already."""
    monkeypatch.chdir(folder)
    return CliRunner().invoke(command_app(build_engine.build_engine), ["--out", "engine", *options])


def test_it_runs_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "build_engine.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--first-adapted-block" in done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which the demo with a random adapter was built for ONNX Runtime, and what was printed."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "export_onnx", export_once)
        options = ("--first-adapted-block", "4", "--runtime", "onnxruntime", "--max-batch", "5")
        done = run_command(patch, folder, *options)
    assert done.exit_code == 0, done.output
    return folder, done.stdout


def test_a_random_adapter_is_named_and_the_numbers_are_printed(built: tuple[Path, str]) -> None:
    folder, stdout = built
    for words in ("RANDOM adapter", "3 random pictures: max error", "8 real pictures", "engine/encoder.onnx"):
        assert words in stdout
    manifest = json.loads((folder / "engine" / "manifest.json").read_text())
    assert (manifest["model"], manifest["adapter"], manifest["first_adapted_block"]) == ("demo", "random", 4)
    assert str(folder) not in json.dumps(manifest)
    encoder = open_engine(folder / "engine")
    size = encoder.image_size
    embeddings = encoder.encode(np.full((6, size, size, 3), 77, np.uint8))
    assert embeddings.adapted is not None and embeddings.adapted.shape == (6, encoder.width)


def test_a_plan_is_added_to_an_engine(built: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(machine, "this_gpu", lambda: None)
    shutil.copytree(built[0] / "engine", tmp_path / "engine")
    for options, message in (
        (["--runtime", "torch"], "expected one of ['tensorrt', 'tensorrt_rtx'] and an engine with encoder.onnx"),
        (["--runtime", "tensorrt_rtx", "--adapter", "none"], "leave model and adapter out"),
    ):
        refused = run_command(monkeypatch, tmp_path, "--add-plan", *options)
        assert refused.exit_code != 0 and message in " ".join(refused.output.replace("│", " ").split())
    done = run_command(monkeypatch, tmp_path, "--add-plan", "--runtime", "tensorrt_rtx")
    assert done.exit_code == 0, done.output
    assert "tensorrt_rtx not run: no GPU for it here" in done.stdout
    assert "MB, for any GPU with tensorrt_rtx" in done.stdout
    (plan,) = (tmp_path / "engine" / "plans").iterdir()
    assert read_manifest(tmp_path / "engine", "engine")["plans"][f"plans/{plan.name}"]["gpu"] is None
    assert open_engine(tmp_path / "engine").runtime in ONNX_RUNTIMES


def test_without_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run_command(monkeypatch, tmp_path, "--adapter", "none", "--runtime", "torch")
    assert done.exit_code == 0, done.output
    assert "plain embeddings only" in done.stdout and "adapted " not in done.stdout
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
def test_refusals_are_one_line(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run_command(monkeypatch, tmp_path, *options)
    assert done.exit_code != 0 and isinstance(done.exception, SystemExit)
    assert message in " ".join(done.output.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []
