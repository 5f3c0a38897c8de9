"""The ONNX graph of a dual encoder for quantisation: its products, their activations, inserted Q/DQ nodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.export.onnx import session_of
from iosr_fast.export.quantize.calibration import PRODUCTS, is_product
from iosr_fast.export.quantize.values import Quantised, QuantisedGroup
from iosr_fast.utils.require import require

SAMPLED_ROWS = 512
PIXELS = 2**16  # of a run, one picture of 224: all activations are kept while they are measured


@dataclass
class Product:
    """A MatMul or Gemm, x @ W + bias, with a constant W."""

    node: Any
    name: str
    transposed: bool  # the graph stores W'


@dataclass
class Group:
    """Products that read one activation. `norm`: the LayerNormalization before it, if nothing else reads its output."""

    tensor: str
    products: list[Product] = field(default_factory=list)
    norm: Any | None = None


@dataclass(frozen=True)
class Activation:
    """The values of one tensor (..., channels) on the calibration pictures."""

    rows: np.ndarray  # (about SAMPLED_ROWS, channels) float32: the first token of each picture, and others at random
    low: np.ndarray  # (channels,), over all rows
    high: np.ndarray


class EncoderGraph:
    """The graph of an ONNX file as a ModelProto, changed in place, with its constants, readers and producers by name.

    The weights stay in the file beside it and are read one by one, because all at once may take gigabytes.
    """

    def __init__(self, source: Path) -> None:
        self._onnx = require("onnx", "cpu")
        self.model = self._onnx.load(source, load_external_data=False)
        self.folder = source.parent
        self.constants = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self._readers: dict[str, list[Any]] = {}
        for node in self.model.graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._producer = {name: node for node in self.model.graph.node for name in node.output}
        self._before: dict[str, list[Any]] = {}

    def groups(self) -> tuple[list[Group], dict[str, str]]:
        """Products with a constant matrix, grouped by input in the graph's order; and the others, {name: reason}."""
        groups: dict[str, Group] = {}
        others: dict[str, str] = {}
        attention = 0
        matrices = {name for name, tensor in self.constants.items() if len(tensor.dims) == 2}
        for node in self.model.graph.node:
            if is_product(node, matrices):
                transposed = any(a.name == "transB" and a.i == 1 for a in node.attribute)
                product = Product(node, self._name(node), transposed)
                groups.setdefault(node.input[0], Group(node.input[0])).products.append(product)
            elif node.op_type in PRODUCTS and node.input[1] in self.constants.keys() - matrices:
                others[node.input[1]] = "a matrix for each head, for one token alone"
            elif node.op_type in PRODUCTS and matrices.intersection(node.input[:2]):
                others[self._name(node)] = "its activation is not the first factor, or it is transposed"
            elif node.op_type in PRODUCTS:
                attention += 1
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
        array: np.ndarray = self._onnx.numpy_helper.to_array(self.constants[name], str(self.folder))
        return array

    def weight(self, product: Product) -> np.ndarray:
        """(inputs, outputs), float32 or float16 as in the graph."""
        stored = self.value(product.node.input[1])
        return stored.T if product.transposed else stored

    def run(self, pictures: np.ndarray) -> list[np.ndarray]:
        """The embeddings of `pictures`, uint8 (N, S, S, 3), by ONNX Runtime."""
        parts = self._batches(pictures, [output.name for output in self.finish().graph.output])
        return [np.concatenate(values) for values in zip(*parts, strict=True)]

    def activations(self, tensors: list[str], pictures: np.ndarray) -> dict[str, Activation]:
        """The values of `tensors` while ONNX Runtime executes the graph on `pictures`."""
        rng, sampled = np.random.default_rng(0), -(-SAMPLED_ROWS // len(pictures))
        parts: dict[str, list[tuple[np.ndarray, ...]]] = {name: [] for name in tensors}
        places: dict[str, np.ndarray] = {}
        for values in self._batches(pictures, tensors):
            for name, value in zip(tensors, values, strict=True):
                value = value.reshape(len(value), -1, value.shape[-1]).astype(np.float32)  # one stream of a picture
                if name not in places:
                    places[name] = np.append(0, 1 + rng.permutation(value.shape[1] - 1)[:sampled])
                rows = value[:, places[name]].reshape(-1, value.shape[-1])
                parts[name].append((rows, value.min((0, 1)), value.max((0, 1))))
        measured = {name: list(zip(*each, strict=True)) for name, each in parts.items()}
        return {
            name: Activation(np.concatenate(rows), np.min(low, axis=0), np.max(high, axis=0))
            for name, (rows, low, high) in measured.items()
        }

    def _batches(self, pictures: np.ndarray, tensors: list[str]) -> Iterator[list[np.ndarray]]:
        """`tensors` of the graph, as outputs, for a few pictures at a time."""
        probe = self._onnx.ModelProto()
        probe.CopyFrom(self.model)
        known = {output.name for output in probe.graph.output}
        added = [name for name in tensors if name not in known]
        probe.graph.output.extend(map(self._onnx.helper.make_empty_tensor_value_info, added))
        session, batch = session_of(probe, self.folder), max(1, PIXELS // (pictures.shape[1] * pictures.shape[2]))
        for start in range(0, len(pictures), batch):
            yield session.run(tensors, {"pixels": np.ascontiguousarray(pictures[start : start + batch])})

    def insert(self, group: Group, by: QuantisedGroup) -> None:
        """Insert Q/DQ on the activation, one pair for all readers, and DQ on each product's quantised matrix.

        The divisor goes into the LayerNormalization before the group, otherwise into a Mul.
        """
        name = group.tensor
        if by.divisor is not None and group.norm is not None:
            self._divide(group.norm, by.divisor)
        elif by.divisor is not None:
            smoothed = f"{name}_smoothed"
            factor = self._add(f"{name}_factor", (1 / by.divisor).astype(by.activation.scale.dtype))
            self._before[smoothed] = [self._onnx.helper.make_node("Mul", [name, factor], [smoothed], smoothed)]
            name = smoothed
        pair = self._pair(name, by.activation)
        for product, weight in zip(group.products, by.weights, strict=True):
            product.node.input[0], product.node.input[1] = pair, self._pair(f"{product.node.name}_matrix", weight)

    def finish(self) -> Any:
        """The model with the new nodes in topological order and without unused constants; `groups` are no longer its
        nodes."""
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
        self._onnx.load_external_data_for_model(model, str(self.folder))
        return model

    def _divide(self, norm: Any, by: np.ndarray) -> None:
        """Divide the output of a LayerNormalization, channel by channel."""
        for i in (1, 2):
            value = self.value(norm.input[i])
            # As a separate constant: the exporter stores equal constants once, so other nodes may read this one.
            norm.input[i] = self._add(f"{norm.name}_{i}_divided", (value / by).astype(value.dtype))

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
