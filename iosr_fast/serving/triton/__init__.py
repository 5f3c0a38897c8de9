"""Exports a saved classifier as a model repository of NVIDIA Triton Inference Server (extra triton-server)."""

from iosr_fast.serving.triton.repository import export_triton

__all__ = ["export_triton"]
