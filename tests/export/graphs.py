"""The element types in an exported graph."""

from __future__ import annotations

from pathlib import Path

import onnx

FLOAT, FLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
UINT8, INT64, BOOL = onnx.TensorProto.UINT8, onnx.TensorProto.INT64, onnx.TensorProto.BOOL


def element_types(path: Path) -> dict[str, int]:
    """{tensor: its element type}, of inputs, constants, outputs and everything between."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    values = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    return values | {tensor.name: tensor.data_type for tensor in graph.initializer}
