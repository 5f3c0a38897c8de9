"""make gpu-bundle: what a machine without a network needs, with stand-ins for pip and the build."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from iosr_fast.benchmarks import gpu, gpu_bundle, gpu_parts  # noqa: E402

THIS = f"{sys.version_info[0]}.{sys.version_info[1]}"


class Commands:
    """In place of subprocess.run: pip and the build leave files in the folders that their options name."""

    def __init__(self, module_bytes: int = 10) -> None:
        self.lines: list[list[str]] = []
        self.environments: list[dict[str, str]] = []
        self.module_bytes = module_bytes

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.lines.append([str(word) for word in command])
        self.environments.append(options.get("env") or {})
        if "--target" in command:
            (Path(command[command.index("--target") + 1]) / "ftfy-6.3.1.dist-info").mkdir(parents=True)
        if "--build-lib" in command:
            folder = Path(command[command.index("--build-lib") + 1]) / "iosr_fast"
            folder.mkdir(parents=True)
            for name in ("_C", "_C_cuda"):
                (folder / f"{name}.cpython-312-x86_64-linux-gnu.so").write_bytes(bytes(self.module_bytes))
        return subprocess.CompletedProcess(command, 0, stdout="3.12\n")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree, and a machine with nvcc and without Python 3.12."""
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    (tmp_path / "iosr_fast").mkdir()
    there = {"nvcc": "/usr/bin/nvcc"}
    monkeypatch.setattr(gpu_bundle.shutil, "which", there.get)
    monkeypatch.setattr(gpu_bundle, "commit", lambda: "abc")
    return tmp_path


def test_a_bundle_is_for_another_python_than_this_one(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands()
    monkeypatch.setattr(gpu_bundle.subprocess, "run", commands)
    folder = gpu_bundle.make(tree, "3.12", "/opt/python3.12")
    _version, install, _venv, _needs, build = commands.lines
    assert {"--python-version", "3.12", "cp312", "manylinux_2_28_x86_64", *gpu_bundle.PACKAGES} <= set(install)
    assert "CMAKE_CUDA_ARCHITECTURES='80-real;90'" in commands.environments[-1]["CMAKE_ARGS"]
    assert build[1] == "setup.py" and commands.environments[-1]["IOSR_FAST_CUDA"] == "1"
    facts = json.loads((folder / "bundle.json").read_text())
    assert facts["python"] == "3.12" and facts["packages"] == ["ftfy-6.3.1", "iosr_fast-1.2.3"]
    assert [name.split(".")[0] for name in facts["modules"]] == ["_C", "_C_cuda"] and facts["left_out"] == []


def test_a_bundle_without_its_python_says_what_is_missing(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_bundle.subprocess, "run", Commands())
    monkeypatch.setattr(gpu_bundle.Path, "home", lambda: tree)
    facts = json.loads((gpu_bundle.make(tree) / "bundle.json").read_text())
    assert facts["modules"] == [] and "left out: extension modules: no python3.12 is found" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"expected a Python 3.13 to build modules with, got /opt/python, which is 3.12"
    ):
        gpu_bundle.make(tree, "3.13", "/opt/python")
    monkeypatch.setattr(gpu_bundle.subprocess, "run", Commands(module_bytes=11_000_000))
    with pytest.raises(ValueError, match=r"at most 20 MB, got 22.0; the largest file is modules/_C"):
        gpu_bundle.make(tree, "3.12", "/opt/python3.12")


def test_a_shim_that_does_not_run_is_passed_over(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyenv puts a python3.12 on PATH that fails unless that version is selected."""
    shim, real = tree / "shim", tree / ".pyenv" / "versions" / "3.12.1" / "bin" / "python3.12"
    real.parent.mkdir(parents=True)
    for path, line in ((shim, "exit 127"), (real, "echo 3.12")):
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
    monkeypatch.setattr(gpu_bundle.Path, "home", lambda: tree)
    monkeypatch.setattr(gpu_bundle.shutil, "which", lambda name: str(shim))
    assert gpu_bundle._find("3.12") == str(real) and gpu_bundle._find("3.13") is None


def test_a_bundle_is_used_by_its_own_python_alone(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_bundle.use(tree) == {"used": False} and gpu_bundle.import_path(tree) == []
    folder = tree / gpu_bundle.FOLDER
    (folder / "modules").mkdir(parents=True)
    module, there = folder / "modules" / "_C.so", tree / "iosr_fast" / "_C.so"
    module.write_text("new")
    for version, used in (("2.7", False), (THIS, True)):
        (folder / "bundle.json").write_text(json.dumps({"python": version}))
        assert gpu_bundle.use(tree) == {"python": version, "used": used} and there.exists() == used
        assert gpu_bundle.import_path(tree) == [str(folder / "site")] * used
    assert f"it is for Python 2.7, and this is {THIS}" in capsys.readouterr().out
    there.write_text("built here since")
    gpu_bundle.use(tree)
    assert there.read_text() == "built here since"


def test_the_build_takes_nvcc_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts.shutil, "which", lambda name: sys.executable)
    monkeypatch.setenv("CMAKE_ARGS", "-DMINE=1")
    environment = gpu_parts.build_environment()
    assert environment["CMAKE_ARGS"].split() == ["-DMINE=1", "-DCMAKE_CUDA_ARCHITECTURES=native"]
    assert environment["IOSR_FAST_CUDA"] == "1" and environment["CUDACXX"] == sys.executable
    monkeypatch.setattr(gpu_parts.shutil, "which", lambda name: "/nowhere/nvcc")
    assert gpu_parts.build_environment() == {"IOSR_FAST_CUDA": "0"}


def test_modules_that_can_not_be_loaded_are_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {"iosr_fast._C": None, "iosr_fast._C_cuda": None}

    def load(name: str) -> None:
        if modules[name] is not None:
            raise ImportError("version `GLIBC_2.41' not found")

    monkeypatch.setattr(gpu_parts.importlib, "import_module", load)
    build = gpu_parts.parts(False, "tables")[1]
    assert gpu._left_out(build, False) == "both extension modules for this Python are there"
    modules["iosr_fast._C_cuda"] = "too new"  # type: ignore[assignment]
    assert gpu._left_out(build, False) is None
