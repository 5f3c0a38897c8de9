"""The ONNX graph of a dual encoder for quantisation: its products, their activations, inserted Q/DQ nodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from iosr_fast.utils.require import require

SAMPLED_ROWS = 512
_PIXELS = 2**18  # per batch while ranges are measured; bounds the memory of its activations


@dataclass
class Product:
    """A MatMul or Gemm, x @ W + bias, with a constant W; `weight` is (inputs, outputs) in float32."""

    node: Any
    name: str
    weight: np.ndarray
    transposed: bool  # the graph stores W'


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


@dataclass(frozen=True)
class Activation:
    """The values of one tensor (..., channels) on the calibration pictures."""

    rows: np.ndarray  # (about SAMPLED_ROWS, channels) float32, sampled at random
    low: np.ndarray  # (channels,), over all rows
    high: np.ndarray


@dataclass(frozen=True)
class Quantised:
    """A quantised tensor: `values` (None for an activation), `scale`, `zero`, the axis of the scales."""

    scale: np.ndarray
    zero: np.ndarray
    values: np.ndarray | None = None
    axis: int | None = None


class EncoderGraph:
    """A ModelProto, changed in place, with its constants, readers and producers by name."""

    def __init__(self, model: Any) -> None:
        self._onnx = require("onnx", "cpu")
        self.model = model
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
            if node.op_type not in ("MatMul", "Gemm"):
                continue
            if node.input[1] not in self.constants:
                attention += 1
            elif (weight := self.value(node.input[1])).ndim != 2:
                others[node.input[1]] = "a matrix for each head, for the CLS token alone"
            else:
                transposed = any(a.name == "transB" and a.i == 1 for a in node.attribute)
                product = Product(
                    node, self._name(node), (weight.T if transposed else weight).astype(np.float32), transposed
                )
                groups.setdefault(node.input[0], Group(node.input[0])).products.append(product)
        for group in groups.values():
            group.norm = self._norm(group)
        if attention:
            others["attention"] = f"no constant factor ({attention} products)"
        return list(groups.values()), others

    def value(self, name: str) -> np.ndarray:
        """The constant of this name."""
        array: np.ndarray = self._onnx.numpy_helper.to_array(self.constants[name])
        return array

    def dtype(self, group: Group) -> Any:
        """The dtype of a group's products, float32 or float16."""
        return self.value(group.products[0].node.input[1]).dtype

    def activations(self, tensors: list[str], pictures: np.ndarray) -> dict[str, Activation]:
        """The values of `tensors` while ONNX Runtime executes the graph on `pictures`."""
        ort = require("onnxruntime", "cpu")
        probe = self._onnx.ModelProto()
        probe.CopyFrom(self.model)
        probe.graph.output.extend(self._onnx.helper.make_empty_tensor_value_info(name) for name in tensors)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
        rng = np.random.default_rng(0)
        batch = max(1, _PIXELS // (pictures.shape[1] * pictures.shape[2]))
        rows: dict[str, list[np.ndarray]] = {name: [] for name in tensors}
        ranges: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for start in range(0, len(pictures), batch):
            part = np.ascontiguousarray(pictures[start : start + batch])
            sampled = -(-SAMPLED_ROWS * len(part) // len(pictures))
            for name, value in zip(tensors, session.run(tensors, {"pixels": part}), strict=True):
                x = value.reshape(-1, value.shape[-1])
                low, high = ranges.get(name, (np.inf, -np.inf))
                ranges[name] = np.minimum(low, x.min(0)), np.maximum(high, x.max(0))
                rows[name].append(x[rng.permutation(len(x))[:sampled]].astype(np.float32))
        return {
            name: Activation(np.concatenate(rows[name]), *(limit.astype(np.float32) for limit in ranges[name]))
            for name in tensors
        }

    def divide(self, norm: Any, by: np.ndarray) -> None:
        """Divide the output of a LayerNormalization, channel by channel."""
        for i in (1, 2):
            value = self.value(norm.input[i])
            # As a separate constant: the exporter stores equal constants once, so other nodes may read this one.
            norm.input[i] = self._add(f"{norm.name}_{i}_divided", (value / by).astype(value.dtype))

    def insert(self, group: Group, activation: Quantised, weights: list[Quantised]) -> None:
        """Insert Q/DQ on the activation, one pair for all readers, and DQ on each product's quantised matrix."""
        producer = self._producer.get(group.tensor)
        if producer is not None and producer.op_type == "Relu" and activation.zero.dtype.kind not in "iu":
            # ONNX Runtime 1.32 drops a float32 Relu before Q to fp8, as if zero point 0 excluded negative values.
            producer.op_type = "Max"
            producer.input.append(self._add(f"{group.tensor}_least", np.zeros((), activation.scale.dtype)))
        pair = self._pair(group.tensor, activation)
        for product, weight in zip(group.products, weights, strict=True):
            product.node.input[0], product.node.input[1] = pair, self._pair(f"{product.node.name}_matrix", weight)

    def finish(self) -> Any:
        """The model with the new nodes in topological order and without unused constants."""
        graph = self.model.graph
        nodes: list[Any] = []
        for node in graph.node:
            for name in node.input:
                nodes += self._before.pop(name, [])
            nodes.append(node)
        del graph.node[:]
        graph.node.extend(nodes)
        read = {name for node in nodes for name in node.input}
        del graph.initializer[:]
        graph.initializer.extend(tensor for name, tensor in self.constants.items() if name in read)
        self._onnx.checker.check_model(self.model)
        return self.model

    def _pair(self, name: str, tensor: Quantised) -> str:
        """Add the nodes; returns the name of the dequantised tensor."""
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
