"""Triton kernels: cache_score scores a plan, dense_values sums value rows, aot compiles both without a GPU.

Importing this module needs neither Triton nor PyTorch nor a GPU; its submodules need the first two.
"""

from __future__ import annotations

import os
from importlib.util import find_spec


def unavailable_reason() -> str | None:
    """Why the Triton kernels can't run here, or None where they can.

    They need Triton, PyTorch and a CUDA device; under TRITON_INTERPRET=1, Triton's interpreter, any device will do.
    """
    for module, extra in (("triton", "triton"), ("torch", "train")):
        if find_spec(module) is None:
            return f"{module} is not installed; pip install 'iosr_fast[{extra}]' brings it"
    # Triton reads the variable the same way, when a kernel is defined.
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "y", "yes", "on", "true"):
        return None
    import torch

    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device; TRITON_INTERPRET=1 in the environment runs the kernels on the CPU, slowly"
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA GPUs and this PyTorch is built for ROCm"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"a GPU of compute capability 8.0 or later is needed, got {torch.cuda.get_device_name()}"
    return None
