"""The ONNX graph of a dual encoder for quantisation: its products, their activations, inserted Q/DQ nodes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.export.onnx import open_session
from iosr_fast.export.quantize.values import Quantised, QuantisedGroup
from iosr_fast.utils.require import require

PRODUCTS = ("MatMul", "Gemm")
SAMPLED_ROWS = 512
PIXELS = 2**18  # per batch while activations are measured; bounds their memory


@dataclass
class Product:
    """A MatMul or Gemm, x @ W + bias, with a constant W."""

    node: Any
    name: str
    stored: Callable[[], np.ndarray]  # reads the constant, because all at once may take gigabytes
    transposed: bool  # the graph stores W'
    size: int

    @property
    def weight(self) -> np.ndarray:
        """(inputs, outputs) in float32."""
        weight = self.stored()
        return np.asarray(weight.T if self.transposed else weight, np.float32)


@dataclass
class Group:
    """Products that read one activation. `norm`: the LayerNormalization before it, if nothing else reads its output."""

    tensor: str
    products: list[Product] = field(default_factory=list)
    norm: Any | None = None

    @property
    def weight(self) -> np.ndarray:
        """(inputs, outputs of all products)."""
        return np.concatenate([product.weight for product in self.products], axis=1)

    @property
    def size(self) -> int:
        """Of `weight`, without reading it."""
        return sum(product.size for product in self.products)


@dataclass(frozen=True)
class Activation:
    """The values of one tensor (..., channels) on the calibration pictures."""

    rows: np.ndarray  # (about SAMPLED_ROWS, channels) float32: the first token of each picture, and others at random
    low: np.ndarray  # (channels,), over all rows
    high: np.ndarray


class EncoderGraph:
    """A ModelProto, changed in place, with its constants, readers and producers by name.

    `folder` has the file of the weights, if they are not in the model; they are read from it one by one.
    """

    def __init__(self, model: Any, folder: Path | None = None) -> None:
        self._onnx = require("onnx", "cpu")
        self.model = model
        self.folder = folder
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._readers: dict[str, list[Any]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._producer = {name: node for node in model.graph.node for name in node.output}
        self._before: dict[str, list[Any]] = {}

    def groups(self) -> tuple[list[Group], dict[str, str]]:
        """Products with a constant matrix, grouped by input in the graph's order; and the others, {name: reason}."""
        groups: dict[str, Group] = {}
        others: dict[str, str] = {}
        attention = 0
        for node in self.model.graph.node:
            if node.op_type not in PRODUCTS:
                continue
            if node.input[1] not in self.constants:
                attention += 1
            elif len(dims := self.constants[name := node.input[1]].dims) != 2:
                others[name] = "a matrix for each head, for one token alone"
            else:
                transposed = any(a.name == "transB" and a.i == 1 for a in node.attribute)
                product = Product(node, self._name(node), partial(self.value, name), transposed, math.prod(dims))
                groups.setdefault(node.input[0], Group(node.input[0])).products.append(product)
        for group in groups.values():
            group.norm = self._norm(group)
        if attention:
            others["attention"] = f"no constant factor ({attention} products)"
        return list(groups.values()), others

    def count_products(self) -> int:
        """The number of matrix products, those of attention among them."""
        return sum(node.op_type in PRODUCTS for node in self.model.graph.node)

    def value(self, name: str) -> np.ndarray:
        """The constant of this name."""
        array: np.ndarray = self._onnx.numpy_helper.to_array(self.constants[name], str(self.folder or ""))
        return array

    def dtype(self, group: Group) -> Any:
        """The dtype of a group's products, float32 or float16."""
        weight = self.constants[group.products[0].node.input[1]]
        return self._onnx.helper.tensor_dtype_to_np_dtype(weight.data_type)

    def activations(self, tensors: list[str], pictures: np.ndarray) -> dict[str, Activation]:
        """The values of `tensors` while ONNX Runtime executes the graph on `pictures`.

        The graph reduces each tensor to its range and its sampled tokens, so that whole activations are never returned.
        """
        rng = np.random.default_rng(0)
        shapes = {value.name: value.type.tensor_type.shape.dim for value in self.model.graph.value_info}
        probe = self._onnx.ModelProto()
        probe.CopyFrom(self.model)
        sampled = -(-SAMPLED_ROWS // len(pictures))
        added: list[str] = []

        def add(op: str, name: str, result: str, second: np.ndarray, **attributes: int) -> None:
            constant = self._onnx.numpy_helper.from_array(second.astype(np.int64), f"{name}_{result}_constant")
            probe.graph.initializer.append(constant)
            inputs, outputs = [name, constant.name], [f"{name}_{result}"]
            probe.graph.node.append(self._onnx.helper.make_node(op, inputs, outputs, **attributes))
            added.append(outputs[0])

        for name in tensors:
            axes = np.arange(len(shapes[name]) - 1)
            add("ReduceMin", name, "low", axes, keepdims=0)
            add("ReduceMax", name, "high", axes, keepdims=0)
            if len(axes) > 1:
                places = int(np.prod([dim.dim_value for dim in shapes[name][1:-1]]))
                if len(axes) > 2:
                    add("Reshape", name, "places", np.array([0, -1, shapes[name][-1].dim_value]))
                    name = added.pop()
                others = 1 + rng.permutation(places - 1)[:sampled]
                add("Gather", name, "rows", np.concatenate([[0], others]), axis=1)
            else:
                added.append(name)  # one token a picture and stream
        probe.graph.output.extend(map(self._onnx.helper.make_empty_tensor_value_info, added))
        session, batch = open_session(probe, self.folder), max(1, PIXELS // (pictures.shape[1] * pictures.shape[2]))
        parts: list[list[np.ndarray]] = [[] for _ in added]
        for start in range(0, len(pictures), batch):
            values = session.run(added, {"pixels": np.ascontiguousarray(pictures[start : start + batch])})
            for part, value in zip(parts, values, strict=True):
                part.append(value.reshape(-1, value.shape[-1]).astype(np.float32))
        return {
            name: Activation(np.concatenate(rows), np.concatenate(low).min(0), np.concatenate(high).max(0))
            for name, low, high, rows in zip(tensors, parts[::3], parts[1::3], parts[2::3], strict=True)
        }

    def insert(self, group: Group, by: QuantisedGroup, gate: str | None = None) -> None:
        """Insert Q/DQ on the activation, one pair for all readers, and DQ on each product's quantised matrix.

        The divisor goes into the LayerNormalization before the group, otherwise into a Mul. With a `gate`, the name of
        a boolean, the products in float stay beside the quantised ones, and the gate selects.
        """
        name = group.tensor
        if by.divisor is not None and group.norm is not None and gate is None:
            self._divide(group.norm, by.divisor)
        elif by.divisor is not None:
            name = self._multiplied(name, (1 / by.divisor).astype(self.dtype(group)))
        pair = self._pair(name, by.activation)
        for product, weight in zip(group.products, by.weights, strict=True):
            node = product.node
            if gate is not None:
                node = self._gated(node, gate)
            node.input[0], node.input[1] = pair, self._pair(f"{product.node.name}_matrix", weight)

    def finish(self) -> Any:
        """The model with the new nodes in topological order and without unused constants."""
        graph = self.model.graph
        nodes: list[Any] = []

        def place(node: Any) -> None:
            for name in node.input:
                for other in self._before.pop(name, ()):
                    place(other)
            nodes.append(node)

        for node in graph.node:
            place(node)
        del graph.node[:]
        graph.node.extend(nodes)
        read = {name for node in nodes for name in node.input}
        del graph.initializer[:]
        graph.initializer.extend(tensor for name, tensor in self.constants.items() if name in read)
        return self.model

    def load(self) -> Any:
        """`finish`, with the constants in the model."""
        model = self.finish()
        if self.folder is not None:
            self._onnx.load_external_data_for_model(model, str(self.folder))
        return model

    def add_gates(self, count: int) -> list[str]:
        """Add the input "gates", bool (count,), and return the name of each of its values."""
        onnx = self._onnx
        self.model.graph.input.append(onnx.helper.make_tensor_value_info("gates", onnx.TensorProto.BOOL, [count]))
        names = [f"gate_{i}" for i in range(count)]
        for i, name in enumerate(names):
            index = self._add(f"{name}_index", np.asarray(i, np.int64))
            self._before[name] = [onnx.helper.make_node("Gather", ["gates", index], [name], name)]
        return names

    def _divide(self, norm: Any, by: np.ndarray) -> None:
        """Divide the output of a LayerNormalization, channel by channel."""
        for i in (1, 2):
            value = self.value(norm.input[i])
            # As a separate constant: the exporter stores equal constants once, so other nodes may read this one.
            norm.input[i] = self._add(f"{norm.name}_{i}_divided", (value / by).astype(value.dtype))

    def _multiplied(self, name: str, by: np.ndarray) -> str:
        result = f"{name}_smoothed"
        factor = self._add(f"{name}_factor", by)
        self._before[result] = [self._onnx.helper.make_node("Mul", [name, factor], [result], result)]
        return result

    def _gated(self, node: Any, gate: str) -> Any:
        """A copy of a product, for other inputs; where `gate` is true its output replaces the product's."""
        result, copied = node.output[0], type(node)()
        copied.CopyFrom(node)
        copied.name, copied.output[0], node.output[0] = f"{node.name}_gated", f"{result}_narrow", f"{result}_float"
        chosen = self._onnx.helper.make_node("Where", [gate, copied.output[0], node.output[0]], [result], result)
        self._before[result] = [copied, chosen]
        return copied

    def _pair(self, name: str, tensor: Quantised) -> str:
        """Add the nodes; returns the name of the dequantised tensor."""
        producer = self._producer.get(name)
        if producer is not None and producer.op_type == "Relu" and tensor.zero.dtype.kind not in "iu":
            # ONNX Runtime 1.32 drops a float32 Relu before Q to fp8, as if zero point 0 excluded negative values.
            producer.op_type = "Max"
            producer.input.append(self._add(f"{name}_least", np.zeros((), tensor.scale.dtype)))
        result = f"{name}_dequantized"
        parameters = [self._add(f"{name}_scale", tensor.scale), self._add(f"{name}_zero", tensor.zero)]
        quantised = f"{name}_quantized"
        axis = {} if tensor.axis is None else {"axis": tensor.axis}
        node = self._onnx.helper.make_node
        self._before[result] = []
        if tensor.values is None:
            self._before[result].append(node("QuantizeLinear", [name, *parameters], [quantised], f"{name}_Q"))
        else:
            quantised = self._add(quantised, tensor.values)
        self._before[result].append(node("DequantizeLinear", [quantised, *parameters], [result], f"{name}_DQ", **axis))
        return result

    def _add(self, name: str, value: np.ndarray) -> str:
        while name in self.constants:
            name += "_"
        self.constants[name] = self._onnx.numpy_helper.from_array(np.asarray(value, order="C"), name)
        return name

    def _norm(self, group: Group) -> Any | None:
        """The LayerNormalization before a group, in fp16 behind a Cast; None if anything else reads its output."""
        name, readers = group.tensor, {product.node.name for product in group.products}
        while (producer := self._producer.get(name)) is not None:
            if {node.name for node in self._readers[name]} != readers:
                return None
            if producer.op_type == "LayerNormalization":
                return producer
            if producer.op_type != "Cast":
                return None
            name, readers = producer.input[0], {producer.name}
        return None

    def _name(self, node: Any) -> str:
        """The layer that the product's weight or bias belongs to; the node's name if both are shared."""
        readers = self._readers.get(node.output[0], [])
        added = [name for reader in readers if reader.op_type == "Add" for name in reader.input]
        for name in (*node.input[1:], *added):
            if name in self.constants and len(self._readers[name]) == 1 and name.endswith((".weight", ".bias")):
                return name.rpartition(".")[0]
        return str(node.name)
