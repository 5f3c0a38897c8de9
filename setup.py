"""Metadata stands in pyproject.toml; this file says where packages lie and has CMake build the extension."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_namespace_packages, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
# The CUDA module is an add-on: `IOSR_FAST_CUDA=1 pip install .` builds it, which takes nvcc but no GPU.
CUDA = os.environ.get("IOSR_FAST_CUDA", "0") not in ("", "0")
# Without a compiler the package installs without its C++ kernels, unless make or CI builds it, or CUDA is asked for.
OPTIONAL = not CUDA and os.environ.get("IOSR_FAST_EXTENSION") != "required"


class CMakeExtension(Extension):
    """An extension whose sources and flags are CMakeLists.txt's business."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[], optional=OPTIONAL)


class CMakeBuild(build_ext):
    """Configure and build with CMake; CMAKE_ARGS from the environment come last and so win.

    A missing compiler is a CompileError, which an optional extension may have; a build that fails is an error always.
    """

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        # A kept cache may name the generator and the pybind11 of a build environment that is gone by now.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        cmake = [shutil.which("cmake")] if shutil.which("cmake") else [sys.executable, "-m", "cmake"]
        configure = [
            *cmake,
            f"-S{ROOT}",
            f"-B{build}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DIOSR_FAST_VERSION={self.distribution.get_version()}",
            f"-DIOSR_FAST_CUDA={'ON' if CUDA else 'OFF'}",
        ]
        if shutil.which("ninja"):
            configure.append("-GNinja")
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        configured = subprocess.run(configure, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        missing = "No CMAKE_CXX_COMPILER could be found", "CMAKE_CXX_COMPILER not set"  # a compiler; make
        if any(words in configured.stdout for words in missing):
            raise CompileError(
                "no C++ compiler and make were found: install them (Debian: apt-get install build-essential; Fedora: "
                "dnf install gcc-c++ make) and run pip again; without them scoring takes PyTorch or NumPy, and longer"
            )
        print(configured.stdout, flush=True)
        configured.check_returncode()
        target = ["--target", ext.name.rpartition(".")[2]]
        subprocess.run([*cmake, "--build", str(build), *target, "--config", "Release", "--parallel"], check=True)


# An editable install finds the modules of tools/ and benchmarks/, too; a wheel has only the package.
BESIDE = ["tools", "tools.*", "benchmarks"]
TOOLS = find_namespace_packages(include=BESIDE) if "editable_wheel" in sys.argv else []

setup(
    packages=[*find_packages(include=["iosr_fast", "iosr_fast.*"]), "iosr_fast.kernels", *TOOLS],
    package_dir={"iosr_fast.kernels": "kernels"},
    ext_modules=[CMakeExtension("iosr_fast._C"), *([CMakeExtension("iosr_fast._C_cuda")] if CUDA else [])],
    cmdclass={"build_ext": CMakeBuild},
)
