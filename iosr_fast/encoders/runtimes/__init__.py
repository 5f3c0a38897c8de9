"""Execute an engine folder in ONNX Runtime, OpenVINO, PyTorch, TensorRT or TensorRT-RTX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iosr_fast.encoders.runtimes.engine import choose_runtime, open_engine

__all__ = ["choose_runtime", "open_engine"]


def __getattr__(name: str) -> Any:
    """Import `engine` on first use: it needs msgspec, which CUDA graphs and single runtimes don't need."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from iosr_fast.encoders.runtimes import engine

    return getattr(engine, name)
