"""Small image encoders in ONNX files, as another exporter would write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE, WIDTH = 16, 12
FACTS: dict[str, Any] = {"image_size": SIZE, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
SHAPE = ["B", 3, SIZE, SIZE]
LAYERS = ("Conv", "Relu", "GlobalAveragePool", "Flatten", "MatMul", "Relu", "MatMul", "Relu", "MatMul")


def encoder_model(layers: tuple[str, ...] = LAYERS, shape: Any = SHAPE, opset: int = 20) -> Any:
    """An onnx.ModelProto of `layers` with random weights, whose input and output have the names of an engine's."""
    rng, nodes, constants, name = np.random.default_rng(0), [], [], "pixels"
    for i, layer in enumerate(layers):
        inputs, after = [name], f"{layer}{i}" if i + 1 < len(layers) else "plain"
        if layer in ("Conv", "MatMul"):
            sides = (WIDTH, 3, 4, 4) if layer == "Conv" else (WIDTH, WIDTH)
            constants.append(numpy_helper.from_array(rng.standard_normal(sides).astype(np.float32), f"weight{i}"))
            inputs.append(f"weight{i}")
        options = {"pads": [2, 2, 2, 2], "strides": [2, 2]} if layer == "Conv" else {}
        nodes.append(helper.make_node(layer, inputs, [after], **options))
        name = after
    source = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, shape)
    output = helper.make_tensor_value_info("plain", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "encoder", [source], [output], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def write_encoder(path: Path, model: Any = None, facts: Any = FACTS, **options: Any) -> Path:
    """The model and its facts in files; `options` of onnx.save_model."""
    onnx.save_model(encoder_model() if model is None else model, str(path), **options)
    path.with_suffix(".json").write_text(json.dumps(facts))
    return path
