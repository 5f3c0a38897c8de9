"""The ONNX graph of an engine without its adapted stream, for classifiers that compare plain embeddings only.

Both graphs read one weights file. From the first adapted block on a dual encoder has a batch of 2B; the first half is
the plain stream (clip.dual_encoder). Two changes keep this half alone, in every precision, quantised or not:

    Concat(plain, adapted)      ->  plain
    Reshape(x, (2, -1, ...))    ->  Reshape(x, (1, -1, ...)), whose first and only part is the whole batch

What no longer leads to the output "plain" is dropped. So the plain embeddings of both graphs are equal up to rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.encoders.runtimes.onnxruntime import FILE, PLAIN_FILE
from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.require import require


def write_plain_graph(folder: Path) -> bool:
    """Write plain.onnx beside the encoder.onnx of an engine folder; returns False if that has one stream only.

    Reads the graph, not the weights. Raises ValueError for a graph with two outputs that is not of export_onnx.
    """
    onnx = require("onnx", "cpu")
    model = onnx.load(folder / FILE, load_external_data=False)
    if [output.name for output in model.graph.output] == ["plain"]:
        return False
    onnx.save_model(plain_graph(model), str(folder / PLAIN_FILE))
    return True


def plain_graph(model: Any) -> Any:
    """The onnx.ModelProto `model` of a dual encoder, changed in place to compute the output "plain" alone."""
    onnx = require("onnx", "cpu")
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    renamed: dict[str, str] = {}
    halves = joins = 0
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        axes = [attribute.i for attribute in node.attribute if attribute.name == "axis"]
        if node.op_type == "Concat" and axes == [0] and not constants.keys() & set(node.input):  # else of a shape
            renamed[node.output[0]] = node.input[0]
            joins += 1
        elif node.op_type == "Reshape" and node.input[1] in constants:
            shape = onnx.numpy_helper.to_array(constants[node.input[1]])
            if shape[:2].tolist() == [2, -1]:
                name = f"{node.input[1]}_of_one_stream"
                if name not in constants:
                    one = np.concatenate([[1], shape[1:]]).astype(np.int64)
                    constants[name] = onnx.numpy_helper.from_array(one, name)
                node.input[1] = name
                halves += 1
    if not joins or not halves:
        raise IosrFastError(
            f"expected an encoder of export_onnx with two streams, got a graph that joins {joins} and splits {halves}"
        )
    read = {"plain"}
    nodes = []
    for node in reversed(graph.node):
        if read.intersection(node.output):
            read.update(node.input)
            nodes.append(node)
    outputs = [output for output in graph.output if output.name == "plain"]
    for field, values in (
        (graph.node, nodes[::-1]),
        (graph.initializer, [tensor for name, tensor in constants.items() if name in read]),
        (graph.output, outputs),
        (graph.value_info, []),  # the shapes of both streams
    ):
        del field[:]
        field.extend(values)
    return model
