"""A small builder of ONNX graphs with named constants and nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.require import require

OPSET = 20  # as in the encoder
IR_VERSION = 9  # the oldest with this opset, for older servers
MAX_FILE_BYTES = 2**31 - 2**24  # the limit of protobuf, with room for the graph

Dims = Sequence[int | str]


class Graph:
    """Nodes in the order in which they are added; values are identified by name.

    `inputs` are (dtype, dims) by name; a dynamic dim is a string. Needs the package onnx.
    """

    def __init__(self, inputs: Mapping[str, tuple[Any, Dims]]) -> None:
        self._onnx = require("onnx", "triton-server")
        self._inputs = [self._value(name, dtype, dims) for name, (dtype, dims) in inputs.items()]
        self._nodes: list[Any] = []
        self._constants: dict[str, Any] = {}
        self._bytes = 0

    def constant(self, name: str, value: Any, dtype: Any) -> str:
        """Add a constant, `value` as `dtype` ("bfloat16": value has its bits as uint16); returns the name."""
        if dtype == "bfloat16":
            array, kind = np.ascontiguousarray(value, np.dtype("<u2")), self._onnx.TensorProto.BFLOAT16
        else:
            array = np.asarray(value, np.dtype(dtype).newbyteorder("<"), order="C")
            kind = self._kind(dtype)
        assert name not in self._constants
        self._bytes += array.nbytes
        if self._bytes <= MAX_FILE_BYTES:  # beyond that `model` raises, with the total size
            self._constants[name] = self._onnx.TensorProto(
                name=name, data_type=kind, dims=array.shape, raw_data=array.tobytes()
            )
        return name

    def add(self, op: str, *inputs: str, name: str, more: Sequence[str] = (), **attributes: Any) -> str:
        """Add a node with the output `name`, and others with the names `more`; returns the name. An omitted input is
        ""."""
        self._nodes.append(self._onnx.helper.make_node(op, inputs, [name, *more], name=name, **attributes))
        return name

    def cast(self, value: str, dtype: Any, name: str) -> str:
        return self.add("Cast", value, name=name, to=self._kind(dtype))

    def model(self, name: str, outputs: Mapping[str, tuple[Any, Dims]]) -> bytes:
        """The bytes of the checked ONNX file. `outputs` as `inputs`.

        Raises ValueError if the constants take 2 GB or more.
        """
        if self._bytes > MAX_FILE_BYTES:
            raise IosrFastError(
                f"expected a {name} graph under 2 GB, the limit of one ONNX file, got {self._bytes / 1e9:.1f} GB; "
                "fit with key_precision='int8' or 'fp16', or with fewer keys (GDA and zero-shot keep none)"
            )
        helper = self._onnx.helper
        values = [self._value(output, dtype, dims) for output, (dtype, dims) in outputs.items()]
        graph = helper.make_graph(self._nodes, name, self._inputs, values, list(self._constants.values()))
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="iosr_fast")
        self._onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString(deterministic=True)

    def _kind(self, dtype: Any) -> int:
        return self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def _value(self, name: str, dtype: Any, dims: Dims) -> Any:
        return self._onnx.helper.make_tensor_value_info(name, self._kind(dtype), dims)
