"""torch modules as ONNX files: a small graph, and the weights beside it, which runtimes map into memory."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from iosr_fast.export.onnx_files import EXTERNAL, WEIGHTS_SUFFIX
from iosr_fast.utils.require import require

if TYPE_CHECKING:
    from iosr_fast.clip.dual_encoder import DualEncoder
    from iosr_fast.clip.plain_encoder import PlainEncoder

OPSET = 20  # the first with Gelu as one operator
LARGEST_FILE = 2**31 - 2**24  # of one file with its weights: protobuf's limit, minus room for the graph


def export_onnx(encoder: DualEncoder | PlainEncoder, path: Path) -> None:
    """Write `encoder` as ONNX, opset 20: "pixels" uint8 (batch, S, S, 3) -> "plain" and "adapted" (batch, D) fp32.

    The batch is dynamic; the weights, in the encoder's precision and of any size, are in a second file, which the graph
    names: `path`.with_suffix(".weights"). Replaces existing files. Raises RuntimeError if the exported graph has a
    fixed batch.
    """
    size, weights = encoder.image_size, path.with_suffix(WEIGHTS_SUFFIX)
    pixels = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    batch = {0: torch.export.Dim("batch", min=1)}
    model = to_onnx(encoder, pixels, "pixels", encoder.outputs, batch, weights)
    require("onnx", "cpu").save_model(model, str(path))


def to_onnx(
    module: nn.Module,
    example: torch.Tensor,
    name: str,
    outputs: Sequence[str],
    dynamic: Mapping[int, Any],
    weights: Path | None = None,
) -> Any:
    """A module with one input as an onnx.ModelProto of opset 20.

    `example` is an input; `name` the input's name; `dynamic` has the torch.export.Dim of each dynamic axis. Tensors
    above 1 KiB are written to the file `weights`, one after the other, so that the model may exceed 2 GB; None leaves
    them in the model. Raises RuntimeError if one of these axes, or the first axis of an output, was exported with a
    fixed size.
    """
    require("onnxscript", "cpu")
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
    assert program is not None
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


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


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
