"""Nodes and constants that are appended to an ONNX graph."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from iosr_fast.utils.require import require

Value: TypeAlias = str | float | np.ndarray | np.generic


class Nodes:
    """Appends to `graph`, an onnx.GraphProto, nodes with one output each. An input is the name of a value, or an array,
    which becomes a constant; a Python float one in float32."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self._count = 0
        self._onnx = require("onnx", "cpu")

    def add(self, operator: str, *inputs: Value, output: str | None = None, **attributes: Any) -> str:
        """Append a node; the name of its output, a new one where none is given."""
        names = [one if isinstance(one, str) else self.constant(one) for one in inputs]
        output = output or self._new_name(operator)
        node = self._onnx.helper.make_node(operator, names, [output], name=output, **attributes)
        self.graph.node.append(node)
        return output

    def constant(self, value: float | np.ndarray | np.generic) -> str:
        """The name of a new constant."""
        name = self._new_name("constant")
        array = np.float32(value) if type(value) is float else value
        self.graph.initializer.append(self._onnx.numpy_helper.from_array(np.array(array), name))
        return name

    def cast(self, value: str, dtype: type) -> str:
        return self.add("Cast", value, to=self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def declare(self, name: str, dtype: type, *shape: int | str) -> Any:
        """An input or output of a graph: its name, type and shape."""
        element = self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self._onnx.helper.make_tensor_value_info(name, element, shape)

    def _new_name(self, kind: str) -> str:
        self._count += 1
        return f"one_file/{kind}_{self._count}"


def axes(*numbers: int) -> np.ndarray:
    """Axes, sizes or positions as operators take them."""
    return np.array(numbers, np.int64)
