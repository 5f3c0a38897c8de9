"""The C++ module and, with nvcc, the CUDA module for this GPU's architecture, into the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec

import torch

from tools.gpu.machine import nvcc
from tools.gpu.parts import ROOT
from tools.gpu.report import Report, Setting

LOADS = "import iosr_fast.{0} as module; print('iosr_fast.{0}', module.version)"


def say(*arguments: str, **environment: str) -> bool:
    """Run this Python in the source tree, its words among this process's; whether it went well."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=False).returncode == 0


def run(report: Report, setting: Setting) -> None:
    if setting.tiny:
        report.skip("both extensions: a trial leaves the source tree as it is")
        return
    if shutil.which("cmake") is None and find_spec("cmake") is None:
        report.skip("both extensions: cmake is not installed")
        return
    compiler = nvcc()
    architecture = "".join(map(str, torch.cuda.get_device_capability()))  # "90" on an H100
    if compiler is None:
        report.skip("the CUDA module: nvcc is neither on PATH nor in /usr/local/cuda/bin")
    arguments = f"{os.environ.get('CMAKE_ARGS', '')} -DCMAKE_CUDA_ARCHITECTURES={architecture}"
    # The tree's metadata tells the package its version, which the extensions must match.
    if not say("setup.py", "-q", "egg_info"):
        report.fail("setup.py egg_info failed; the last lines tell why")
    build = ("setup.py", "-q", "build_ext", "--inplace")
    started = time.monotonic()
    cuda = {} if compiler is None else {"IOSR_FAST_CUDA": "1", "CMAKE_ARGS": arguments, "CUDACXX": compiler}
    built = say(*build, **(cuda or {"IOSR_FAST_CUDA": "0"}))
    report.fact(architecture=architecture, nvcc=compiler, seconds=round(time.monotonic() - started, 1))
    if not built:
        report.fail(f"the build {'with CUDA' if cuda else 'of the C++ module'} failed; the last lines tell why")
        if cuda and not say(*build, IOSR_FAST_CUDA="0"):
            report.fail("the build of the C++ module alone failed, too")
    for module in ("_C", "_C_cuda") if cuda and built else ("_C",):
        if not say("-c", LOADS.format(module)):
            report.fail(f"iosr_fast.{module} was built and can't be imported")
