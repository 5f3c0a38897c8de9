"""torch modules as ONNX files: a small graph, and the weights beside it, which runtimes map into memory."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from iosr_fast.clip.dual_encoder import DualEncoder
from iosr_fast.exceptions import IosrFastError
from iosr_fast.export.onnx_files import save_onnx
from iosr_fast.utils.require import require

OPSET = 20  # the first with Gelu as one operator
LARGEST_FILE = 2**31 - 2**24  # protobuf's limit, minus room for the graph


def export_onnx(encoder: DualEncoder, path: Path) -> None:
    """Write `encoder` as ONNX, opset 20: "pixels" uint8 (batch, S, S, 3) -> "plain" and "adapted" (batch, D) fp32.

    The batch is dynamic; the weights, in the encoder's precision, are in a second file (`save_onnx`). Raises ValueError
    for weights of 2 GB or more, RuntimeError if the exported graph has a fixed batch.
    """
    size = module_bytes(encoder)
    if size > LARGEST_FILE:
        raise IosrFastError(
            f"expected weights under 2 GB, the limit of one ONNX file, got {size / 1e9:.1f} GB; "
            "export in fp16, or use the torch runtime"
        )
    shapes = encoder.shapes
    outputs = ["plain"] if shapes.first_adapted_block is None else ["plain", "adapted"]
    pixels = torch.zeros(2, shapes.image_size, shapes.image_size, 3, dtype=torch.uint8)
    save_onnx(to_onnx(encoder, pixels, "pixels", outputs, {0: torch.export.Dim("batch", min=1)}), path)


def to_onnx(
    module: nn.Module, example: torch.Tensor, name: str, outputs: Sequence[str], dynamic: Mapping[int, Any]
) -> Any:
    """A module with one input as an onnx.ModelProto of opset 20.

    `example` is an input; `name` the input's name; `dynamic` has the torch.export.Dim of each dynamic axis. Raises
    RuntimeError if one of these axes, or the first axis of an output, was exported with a fixed size.
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
    model = program.model_proto
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
