"""Which GPU, driver, CUDA and packages this is."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from iosr_fast.scoring import dispatch
from iosr_fast.utils.machine import cpu_model, package_version, usable_threads
from tools.bench.harness import commit
from tools.gpu.device import name_of
from tools.gpu.report import Report, Setting

PACKAGES = (
    "numpy",
    "torch",
    "triton",
    "pytorch-triton",
    "open_clip_torch",
    "safetensors",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "pytest",
    "hypothesis",
    "pybind11",
    "pillow",
)
WANTED = (
    "torch",
    "triton",
    "open_clip",
    "safetensors",
    "PIL",
    "onnx",
    "onnxscript",
    "tensorrt",
    "tensorrt_rtx",
    "pytest",
    "hypothesis",
    "pybind11",
    "setuptools",
)
# What nvidia-smi is asked for.
ASKED = (
    "driver_version",
    "memory.total",
    "power.limit",
    "power.max_limit",
    "clocks.max.sm",
    "clocks.max.memory",
    "compute_mode",
    "persistence_mode",
    "ecc.mode.current",
    "temperature.gpu",
    "utilization.gpu",
    "mig.mode.current",
)
# Of torch.cuda.get_device_properties, as far as this PyTorch has them.
PROPERTIES = ("total_memory", "multi_processor_count", "L2_cache_size", "clock_rate", "memory_clock_rate")


def nvcc() -> str | None:
    """The CUDA compiler: on PATH, or where NVIDIA's installer puts it."""
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.is_file() else None)


def gpu() -> dict[str, Any]:
    """The GPU in PyTorch's words. Raises RuntimeError where it sees none."""
    if not torch.cuda.is_available():
        raise RuntimeError(f"PyTorch {torch.__version__} sees no NVIDIA GPU here")
    properties = torch.cuda.get_device_properties(0)
    found = {name: getattr(properties, name, None) for name in PROPERTIES}
    return {
        "name": torch.cuda.get_device_name(),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "uuid": str(getattr(properties, "uuid", "")) or None,
        "devices": torch.cuda.device_count(),
        **found,
    }


def output(command: list[str]) -> str:
    """What a program says. Raises OSError or CalledProcessError, TimeoutExpired after 10 s."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout


def ask_driver(uuid: str | None) -> dict[str, str]:
    """nvidia-smi's answers for one GPU, in its own units; those of the first where PyTorch tells no identity."""
    which = f"GPU-{uuid.removeprefix('GPU-')}" if uuid else "0"
    command = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader", "-i", which]
    return dict(zip(ASKED, (value.strip() for value in output(command).splitlines()[0].split(",")), strict=True))


def run(report: Report, setting: Setting) -> None:
    report.fact(
        device=name_of(setting.device) if setting.device == "cpu" or torch.cuda.is_available() else None,
        commit=commit(),
        host={"cpu": cpu_model(), "threads": usable_threads(), "platform": platform.platform()},
        versions={
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **{name: package_version(name) for name in PACKAGES},
        },
        missing=[name for name in WANTED if find_spec(name) is None],
    )
    if setting.device == "cuda":
        report.fact(gpu=gpu())
        try:
            report.fact(driver=ask_driver(report.facts["gpu"]["uuid"]))
        except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
            report.skip(f"driver, clocks and power limit: nvidia-smi does not tell ({error})")
    compiler = nvcc()
    if compiler is None:
        report.skip("nvcc's version: it is neither on PATH nor in /usr/local/cuda/bin")
    else:
        try:
            report.fact(nvcc=output([compiler, "--version"]).strip().splitlines()[-2:])
        except (OSError, subprocess.SubprocessError) as error:
            report.skip(f"nvcc's version: {error}")
    # Before anything was built: what a stranger's checkout can do.
    report.fact(implementations={entry.name: entry.unavailable_reason() for entry in dispatch.REGISTRY})
