"""Facts for a bug report: versions, implementations and why one is unavailable, the processor."""

from __future__ import annotations

import os
import platform
from typing import Any

from iosr_fast.methods import METHODS
from iosr_fast.scoring import dispatch
from iosr_fast.utils.machine import cpu_model, package_version, usable_threads

OPTIONAL_PACKAGES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "torch",
    "torchvision",
    "open_clip_torch",
    "onnx",
    "onnxscript",
    "tensorrt",
    "tensorrt-rtx",
    "triton",
)


def info() -> dict[str, Any]:
    """Versions, implementations, SIMD paths, processor and threads, as JSON-ready values.

    Optional packages are looked up by their metadata; a missing one has the version None. None is imported, except
    PyTorch if NVIDIA's driver is installed: only it can tell whether the GPU is supported.
    """
    return {
        "iosr_fast": package_version("iosr_fast"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: package_version(name) for name in ("numpy", "pillow", "safetensors", *OPTIONAL_PACKAGES)},
        "implementations": {
            backend.name: {
                "devices": list(dispatch.devices_of(backend)),
                "unavailable_reason": backend.unavailable_reason(),
            }
            for backend in dispatch.BACKENDS
        },
        "simd_paths": simd_paths(),
        "methods": list(METHODS),
        "environment": {name: os.environ[name] for name in ("IOSR_FAST_IMPL", "IOSR_FAST_SIMD") if name in os.environ},
        "cpu": cpu_model(),
        "threads": usable_threads(),
    }


def format_info() -> str:
    """info() as text."""
    facts = info()
    lines = [f"iosr_fast {facts['iosr_fast']}, Python {facts['python']}, {facts['platform']}"]
    lines.append(f"cpu: {facts['cpu']}, {facts['threads']} threads")
    lines.append("scoring backends, best first for each device:")
    for name, row in facts["implementations"].items():
        available = "yes" if row["unavailable_reason"] is None else f"no: {row['unavailable_reason']}"
        lines.append(f"  {name:<12} {', '.join(row['devices']):<10} {available}")
    paths = [name if supported else f"{name} (this processor can't)" for name, supported in facts["simd_paths"].items()]
    lines.append(f"SIMD paths of cpp: {', '.join(paths) or 'none'}")
    lines += [f"{name}={value}" for name, value in facts["environment"].items()]
    lines.append(f"methods: auto, {', '.join(facts['methods'])}")
    lines.append("packages:")
    lines += [f"  {name:<18} {version or 'not installed'}" for name, version in facts["packages"].items()]
    return "\n".join(lines)


def simd_paths() -> dict[str, bool]:
    """Compiled paths of the C++ kernels, best first, and whether this processor can run each."""
    if next(one for one in dispatch.BACKENDS if one.name == "cpp").unavailable_reason() is not None:
        return {}
    from iosr_fast import _C

    return dict(_C.simd_paths())
