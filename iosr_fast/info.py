"""Facts for a bug report: versions, implementations and why one is unavailable, the processor."""

from __future__ import annotations

import os
import platform

from iosr_fast.methods import METHODS
from iosr_fast.scoring import dispatch
from iosr_fast.utils.machine import cpu_model, package_version, usable_threads

PACKAGES = (
    *("numpy", "pillow", "safetensors", "onnxruntime", "onnxruntime-gpu", "openvino", "torch", "torchvision"),
    *("open_clip_torch", "onnx", "onnxscript", "tensorrt", "tensorrt-rtx", "triton"),
)


def format_info() -> str:
    """Versions, scoring backends, SIMD paths, processor and threads, as text.

    Packages are looked up by their metadata. None is imported, except PyTorch if NVIDIA's driver is installed: only it
    can tell whether the GPU is supported.
    """
    lines = [f"iosr_fast {package_version('iosr_fast')}, Python {platform.python_version()}, {platform.platform()}"]
    lines.append(f"cpu: {cpu_model()}, {usable_threads()} threads")
    lines.append("scoring backends, best first for each device:")
    for backend in dispatch.BACKENDS:
        reason = backend.unavailable_reason()
        available = "yes" if reason is None else f"no: {reason}"
        lines.append(f"  {backend.name:<12} {', '.join(dispatch.devices_of(backend)):<10} {available}")
    paths = [name if supported else f"{name} (this processor can't)" for name, supported in simd_paths().items()]
    lines.append(f"SIMD paths of cpp: {', '.join(paths) or 'none'}")
    lines += [f"{name}={os.environ[name]}" for name in ("IOSR_FAST_IMPL", "IOSR_FAST_SIMD") if name in os.environ]
    lines.append(f"methods: auto, {', '.join(METHODS)}")
    lines.append("packages:")
    lines += [f"  {name:<18} {package_version(name) or 'not installed'}" for name in PACKAGES]
    return "\n".join(lines)


def simd_paths() -> dict[str, bool]:
    """Compiled paths of the C++ kernels, best first, and whether this processor can run each."""
    if next(one for one in dispatch.BACKENDS if one.name == "cpp").unavailable_reason() is not None:
        return {}
    from iosr_fast import _C

    return dict(_C.simd_paths())
