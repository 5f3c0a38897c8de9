"""Encoders as ONNX: a small graph, and the weights beside it, which runtimes map into memory. torch exports alone.

The plain graph is an engine's without its adapted stream, for classifiers that compare plain embeddings only. Both
graphs read one weights file. From the first adapted block on a dual encoder has a batch of 2B; the first half is the
plain stream (backbones.dual_encoder). Two changes keep this half alone, in every precision, quantised or not:

    Concat(plain, adapted)      ->  plain
    Reshape(x, (2, -1, ...))    ->  Reshape(x, (1, -1, ...)), whose first and only part is the whole batch

What no longer leads to the output "plain" is dropped. So the plain embeddings of both graphs are equal up to rounding.
"""

from __future__ import annotations

import contextlib
import io
import logging
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iosr_fast.encoders.engine_folder import ONNX_FILE, PLAIN_FILE, WEIGHTS_SUFFIX
from iosr_fast.encoders.runtimes.onnxruntime import open_session
from iosr_fast.exceptions import IosrFastError, UnavailableError
from iosr_fast.sealed.verified_folder import VerifiedFolder
from iosr_fast.utils.require import require

if TYPE_CHECKING:
    import torch

    from iosr_fast.backbones.dual_encoder import DualEncoder
    from iosr_fast.backbones.plain_encoder import PlainEncoder

OPSET, IR = 20, 10  # the first opset with Gelu as one operator, and the version of files that exporters write for it
EXTERNAL = 1024  # bytes; smaller tensors stay in the graph, for shape inference and constant folding


def export_onnx(encoder: DualEncoder | PlainEncoder, path: Path) -> None:
    """Write `encoder` as ONNX, opset 20: "pixels" uint8 (batch, S, S, 3) -> "plain" and "adapted" (batch, D) fp32.

    The batch is dynamic; the weights, in the encoder's precision and of any size, are in a second file, which the graph
    names: `path`.with_suffix(".weights"). Replaces existing files. Raises RuntimeError if the exported graph has a
    fixed batch.
    """
    torch = require("torch", "cpu")
    pixels = torch.zeros(2, encoder.image_size, encoder.image_size, 3, dtype=torch.uint8)
    batch = {0: torch.export.Dim("batch", min=1)}
    model = to_onnx(encoder, pixels, "pixels", encoder.outputs, batch, path.with_suffix(WEIGHTS_SUFFIX))
    require("onnx", "cpu").save_model(model, str(path))


def to_onnx(
    module: torch.nn.Module,
    example: torch.Tensor,
    name: str,
    outputs: Sequence[str],
    dynamic: Mapping[int, Any],
    weights: Path | None = None,
) -> Any:
    """A module with one input as an onnx.ModelProto of opset 20.

    `example` is an input; `name` the input's name; `dynamic` has the torch.export.Dim of each dynamic axis. Tensors
    above 1 KiB are written to the file `weights`, one after the other, so that the model may exceed 2 GB; None leaves
    them in the model. Raises UnavailableError for a module that PyTorch can't export, RuntimeError if one of these
    axes, or the first axis of an output, was exported with a fixed size.
    """
    torch = require("torch", "cpu")
    require("onnxscript", "cpu")
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=[name],
                output_names=list(outputs),
                dynamic_shapes=(dict(dynamic),),
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise UnavailableError(
            f"PyTorch {torch.__version__} can't export this model as ONNX: {reason}; an image encoder that another "
            "exporter writes can be the model: FILE.onnx"
        ) from error
    if weights is None:
        model = program.model_proto
    else:
        ir = require("onnx_ir", "cpu")
        ir.external_data.unload_from_model(program.model, weights.parent, weights.name, size_threshold_bytes=EXTERNAL)
        model = ir.to_proto(program.model)
    for item in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        item.ClearField("metadata_props")  # the exporter leaves stack traces with local paths there
    axes = {name: dynamic} | {value.name: (0,) for value in model.graph.output}
    for value in (*model.graph.input, *model.graph.output):
        if not all(value.type.tensor_type.shape.dim[axis].dim_param for axis in axes[value.name]):
            raise RuntimeError(f"expected {value.name} to be exported with a dynamic shape, got a fixed one")
    return model


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Suppress the exporter's progress and warnings about its internals; errors are still raised."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def save_onnx(model: Any, path: Path) -> None:
    """Write an onnx.ModelProto: its graph to `path`, tensors of 1 KiB or more to `path`.with_suffix(".weights").

    The graph names the weights file beside it, so both files move together. Replaces existing files.
    """
    onnx = require("onnx", "cpu")
    weights = path.with_suffix(WEIGHTS_SUFFIX)
    weights.unlink(missing_ok=True)  # onnx appends
    onnx.save_model(model, str(path), save_as_external_data=True, location=weights.name, size_threshold=EXTERNAL)
    if weights.exists():  # a graph may have no large tensor
        weights.chmod(0o644)  # onnx makes it readable for its owner only


def engine_graph(engine: VerifiedFolder) -> Any:
    """The onnx.ModelProto of an engine's encoder.onnx without its large weights."""
    return require("onnx", "cpu").load_from_string(engine.read(ONNX_FILE))


def session_of(model: Any, folder: Path) -> Any:
    """An ONNX Runtime session of a ModelProto on the CPU; `folder` has the file of its weights. New large constants are
    moved out of the model, because protobuf's limit is 2 GB."""
    path = folder / f"{uuid.uuid4().hex}.onnx"  # beside the weights, which the graph names by a relative path
    try:
        save_onnx(model, path)
        return open_session(path)
    finally:
        for file in (path, path.with_suffix(WEIGHTS_SUFFIX)):
            file.unlink(missing_ok=True)


def write_plain_graph(folder: Path) -> bool:
    """Write plain.onnx beside the encoder.onnx of an engine folder; returns False if that has one stream only.

    Reads the graph, not the weights. Raises ValueError for a graph with two outputs that is not of export_onnx.
    """
    onnx = require("onnx", "cpu")
    model = onnx.load(folder / ONNX_FILE, load_external_data=False)
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
    nodes, read = leading_to(graph.node, "plain")
    outputs = [output for output in graph.output if output.name == "plain"]
    for field, values in (
        (graph.node, nodes),
        (graph.initializer, [tensor for name, tensor in constants.items() if name in read]),
        (graph.output, outputs),
        (graph.value_info, []),  # the shapes of both streams
    ):
        del field[:]
        field.extend(values)
    return model


def leading_to(nodes: Sequence[Any], output: str) -> tuple[list[Any], set[str]]:
    """Those of a graph's nodes that `output` depends on, in their order, and all names that they read."""
    read = {output}
    chosen = []
    for node in reversed(nodes):
        if read.intersection(node.output):
            read.update(node.input)
            chosen.append(node)
    return chosen[::-1], read
