"""Values of an ONNX graph whose operators append nodes to it, so that code reads like the formula."""

from __future__ import annotations

from functools import partialmethod
from typing import Any, TypeAlias

import numpy as np

from iosr_fast.utils.require import require

Operand: TypeAlias = "Value | float | list[int] | np.ndarray"
_TYPES: dict[str, Any] = {"Shape": np.int64, "ArgMax": np.int64}
_TYPES |= dict.fromkeys(("Less", "GreaterOrEqual", "Greater", "Equal", "And", "Or", "Not"), np.bool_)


class Value:
    """A value by its name and dtype in `graph`, an onnx.GraphProto. Anything else in an operation becomes a constant:
    lists and arrays of integers in int64, numbers and other arrays in the dtype of the values beside them."""

    prefix = "one_file/"  # of the names of nodes and constants

    def __init__(self, graph: Any, name: str, dtype: Any) -> None:
        self.graph, self.name, self.dtype = graph, name, np.dtype(dtype)

    def op(self, operator: str, *others: Operand, name: str | None = None, **attributes: Any) -> Value:
        """The output of a new node, whose first input is this value."""
        values = [self, *(other for other in others if isinstance(other, Value))]
        dtype = next((value.dtype for value in values if value.dtype != np.bool_), self.dtype)
        inputs = [self.name, *(self._operand(other, dtype).name for other in others)]
        name = name or f"{self.prefix}{operator}_{len(self.graph.node)}"
        node = require("onnx", "cpu").helper.make_node(operator, inputs, [name], name=name, **attributes)
        self.graph.node.append(node)
        return type(self)(self.graph, name, _TYPES.get(operator, dtype))

    __add__ = partialmethod(op, "Add")
    __sub__ = partialmethod(op, "Sub")
    __mul__ = partialmethod(op, "Mul")
    __truediv__ = partialmethod(op, "Div")
    __matmul__ = partialmethod(op, "MatMul")
    __lt__ = partialmethod(op, "Less")
    __ge__ = partialmethod(op, "GreaterOrEqual")
    __and__ = partialmethod(op, "And")

    def cast(self, dtype: Any) -> Value:
        value = self.op("Cast", to=_element_type(dtype))
        value.dtype = np.dtype(dtype)
        return value

    def _operand(self, operand: Operand, dtype: np.dtype) -> Value:
        if isinstance(operand, Value):
            return operand
        integers = isinstance(operand, list) or (isinstance(operand, np.ndarray) and operand.dtype.kind == "i")
        return self.constant(np.asarray(operand, np.int64 if integers else dtype))

    def constant(self, array: np.ndarray) -> Value:
        """A constant of the same graph."""
        name = f"{self.prefix}constant_{len(self.graph.initializer)}"
        self.graph.initializer.append(require("onnx", "cpu").numpy_helper.from_array(array, name))
        return type(self)(self.graph, name, array.dtype)

    def info(self, *shape: int | str) -> Any:
        """A batch of such tensors, as an input or output of the graph."""
        helper = require("onnx", "cpu").helper
        return helper.make_tensor_value_info(self.name, _element_type(self.dtype), ["batch", *shape])


def _element_type(dtype: Any) -> int:
    number: int = require("onnx", "cpu").helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return number
