"""The CUDA module emulated on the CPU, and PyTorch on one thread."""

from __future__ import annotations

import importlib.util
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.scoring.build_cache import CSRC, build_once, cpp_compiler, version_of


@pytest.fixture(scope="session")
def emulation() -> Any:
    """_C_cuda for host memory: the CUDA module with its block programs run thread by thread on the CPU."""
    pybind11 = pytest.importorskip("pybind11")
    compiler, name = cpp_compiler(), f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", '-DIOSR_FAST_VERSION="emulation"']
    flags += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]

    def build(folder: Path) -> None:
        objects = [folder / "bindings.o", folder / "host_launch.o"]
        compilers = [
            subprocess.Popen([compiler, *flags[:3], *flags[4:], "-c", "-o", out, CSRC / "cuda" / f"{out.stem}.cpp"])
            for out in objects
        ]
        assert [process.wait() for process in compilers] == [0, 0]
        subprocess.run([compiler, "-shared", "-o", folder / name, *objects], check=True)

    facts = [*flags, version_of(compiler), pybind11.__version__]
    binary = build_once("emulation", [CSRC / "cuda", Path(__file__)], facts, build) / name
    spec = importlib.util.spec_from_file_location("_C_cuda", binary)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """Thousands of tiny products: PyTorch's threads would spend their time on waiting for each other."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
