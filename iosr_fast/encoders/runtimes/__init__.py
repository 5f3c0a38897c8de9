"""Execute an engine folder of tools/build_engine.py in ONNX Runtime, OpenVINO, PyTorch, TensorRT or TensorRT-RTX."""

from iosr_fast.encoders.runtimes.engine import choose_runtime, open_engine

__all__ = ["choose_runtime", "open_engine"]
