"""The unknown score of a classifier (methods.unknown) as an ONNX graph."""

from __future__ import annotations

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.known_scores import BETA, UNKNOWN_KEY, GaussianModel, ImageModel
from iosr_fast.methods.unknown import Unknown
from iosr_fast.serving.triton.configs import UNKNOWN_SCORE
from iosr_fast.serving.triton.graph import Graph
from iosr_fast.utils.require import require

_CHECKED_ROWS = 64
# In standard deviations of left-out support images: two scores that close reject the same pictures but for ties.
_MAX_ERROR = 1e-2
_FAR = 1e30  # below any logit


def unknown_inputs(unknown: Unknown) -> list[str]:
    """Which of "PLAIN" and "ADAPTED" its scores read."""
    scorer = unknown.scorer
    read = {"plain"} if scorer.text is not None else set()
    read |= {which for which, _ in scorer.models}
    read |= set() if scorer.unknown_keys is None else {scorer.unknown_which}
    return [name.upper() for name in ("plain", "adapted") if name in read]


def unknown_model(unknown: Unknown) -> bytes:
    """PLAIN and ADAPTED float32 (B, D) -> UNKNOWN_SCORE float32 (B, 1), Unknown.score up to float32 rounding.

    Scores that are weighted and added take one term for each product: all that have a Gaussian's precision share one
    quadratic form x' M x, and queries are centred before it, so that nothing large cancels. Constants, for N support
    images of C classes: (C + D + N) D + N C numbers for each embedding, and unknown pictures. Raises ValueError if they
    take 2 GB or more.
    """
    return _UnknownGraph(unknown).model()


def check_unknown(graph: bytes, unknown: Unknown) -> float:
    """The largest difference of the graph's scores from Unknown.score, on support images and on random directions near
    them. Raises ArithmeticError beyond _MAX_ERROR."""
    ort = require("onnxruntime", "triton-server")
    rng = np.random.default_rng(0)
    own = unknown.support.as_queries
    chosen = rng.permutation(len(own))[:_CHECKED_ROWS]
    width = own.plain.shape[1]

    def rows(part: np.ndarray) -> np.ndarray:
        near = part[chosen] + rng.standard_normal((len(chosen), width)) / np.sqrt(width)
        both = np.concatenate([part[chosen], near, rng.standard_normal((4, width))])
        unit: np.ndarray = (both / np.linalg.norm(both, axis=1, keepdims=True)).astype(np.float32)
        return unit

    queries = Embeddings(rows(own.plain), None if own.adapted is None else rows(own.adapted))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    inputs = {"PLAIN": queries.plain, "ADAPTED": queries.adapted}
    got = session.run([UNKNOWN_SCORE], {name: inputs[name] for name in unknown_inputs(unknown)})[0][:, 0]
    expected = unknown.score(queries)
    error = float((np.abs(got - expected) / np.maximum(1.0, np.abs(expected))).max())
    if not error <= _MAX_ERROR:  # also refuses NaN
        raise ArithmeticError(
            f"the unknown graph's scores differ from Unknown.score by {error:.2g}, expected at most {_MAX_ERROR:g}; "
            "nothing was written"
        )
    return error


class _UnknownGraph:
    def __init__(self, unknown: Unknown) -> None:
        self.unknown, self.scorer = unknown, unknown.scorer
        self.weights = dict(zip(unknown.names, unknown.weights.tolist(), strict=True))
        width = unknown.support.embeddings.plain.shape[1]
        self.graph = Graph({name: (np.float32, ("batch", width)) for name in unknown_inputs(unknown)})
        self._terms: list[str] = []

    def model(self) -> bytes:
        graph = self.graph
        if self.scorer.text is not None:
            text = self._float("text", self.scorer.text)
            logits = graph.add("Gemm", "PLAIN", text, name="text_logits", alpha=self.scorer.tau, transB=1)
            self._largest_and_odds("text", logits, self.weights["text cosine"], self.weights["text softmax"])
        for which, model in self.scorer.models:
            self._image_terms(which, model)
        if self.scorer.unknown_keys is not None and self.weights[UNKNOWN_KEY]:
            keys, x = self._float("unknown_keys", self.scorer.unknown_keys), self.scorer.unknown_which.upper()
            cosines = graph.add("Gemm", x, keys, name="unknown_cosines", transB=1)
            largest = graph.add("ReduceMax", cosines, self._integers("unknown_axis", [1]), name="unknown_nearest")
            self._add(largest, -self.weights[UNKNOWN_KEY])
        total = self._float("bias", [[self.unknown.bias]])
        for i, term in enumerate(self._terms):
            total = graph.add("Add", total, term, name=f"total_{i}")
        if not self._terms:
            raise IosrFastError("expected a classifier with images or texts to know, got neither")
        graph.add("Neg", total, name=UNKNOWN_SCORE)
        return graph.model("unknown", {UNKNOWN_SCORE: (np.float32, ("batch", 1))})

    def _float(self, name: str, value: object) -> str:
        return self.graph.constant(name, value, np.float32)

    def _integers(self, name: str, value: list[int]) -> str:
        return self.graph.constant(name, value, np.int64)

    def _add(self, value: str, weight: float) -> None:
        """Add weight * value, (B, 1), to the sum."""
        if weight:
            name = f"{value}_weighted"
            self._terms.append(self.graph.add("Mul", value, self._float(f"{value}_weight", weight), name=name))

    def _image_terms(self, which: str, model: ImageModel) -> None:
        end = ", adapted" if which == "adapted" else ""
        graph, x = self.graph, which.upper()
        if model.gaussians is not None:
            self._gaussian_terms(which, model.gaussians, end)
        keys = self._float(f"{which}_keys", model.keys)
        cosines = graph.add("Gemm", x, keys, name=f"{which}_cosines", transB=1)
        axis = self._integers(f"{which}_keys_axis", [1])
        self._add(graph.add("ReduceMax", cosines, axis, name=f"{which}_nearest"), self.weights[f"nearest key{end}"])
        if model.values is not None:
            beta = self._float(f"{which}_beta", BETA)
            below = graph.add("Sub", cosines, self._float(f"{which}_one", 1.0), name=f"{which}_below")
            kernel = graph.add("Exp", graph.add("Mul", below, beta, name=f"{which}_exponent"), name=f"{which}_kernel")
            values = self._float(f"{which}_values", model.values)
            first, second, _ = self._two_largest(
                f"{which}_regression", graph.add("MatMul", kernel, values, name=f"{which}_regressed")
            )
            margin = self.weights[f"regression margin{end}"]
            self._add(first, self.weights[f"regression{end}"] + margin)
            self._add(second, -margin)

    def _gaussian_terms(self, which: str, model: GaussianModel, end: str) -> None:
        """With y = x - m for the mean m of all images, and G_c the discriminant between class c and an image at m:

        discriminant = max G + y' P m + m' P m / 2    centred discriminant = max G
        mahalanobis = 2 max G - y' P y                relative mahalanobis = 2 max G - y' P y + y' P0 y
        """
        graph, weights = self.graph, self.weights
        plain, centred, distance, relative, odds = (
            weights[f"{name}{end}"]
            for name in (
                *("discriminant", "centred discriminant", "mahalanobis", "relative mahalanobis"),
                "discriminant softmax",
            )
        )
        mean, towards = model.mean, model.precision @ model.mean
        bias = model.bias + model.linear @ mean - 0.5 * mean @ towards
        y = graph.add("Sub", which.upper(), self._float(f"{which}_mean", mean), name=f"{which}_centred")
        linear, offset = self._float(f"{which}_linear", model.linear - towards), self._float(f"{which}_bias", bias)
        logits = graph.add("Gemm", y, linear, offset, name=f"{which}_logits", transB=1)
        self._largest_and_odds(which, logits, plain + centred + 2.0 * (distance + relative), odds)
        if plain:
            direction = self._float(f"{which}_direction", plain * towards[:, None])
            self._terms.append(graph.add("MatMul", y, direction, name=f"{which}_towards"))
            self._terms.append(self._float(f"{which}_middle", [[0.5 * plain * mean @ towards]]))
        matrix = relative * model.whole_precision - (distance + relative) * model.precision
        if matrix.any():
            product = graph.add("MatMul", y, self._float(f"{which}_matrix", matrix), name=f"{which}_product")
            square = graph.add("Mul", product, y, name=f"{which}_square")
            axis = self._integers(f"{which}_channels_axis", [1])
            self._terms.append(graph.add("ReduceSum", square, axis, name=f"{which}_quadratic"))

    def _largest_and_odds(self, name: str, logits: str, largest: float, odds: float) -> None:
        """largest * max z + odds * log p / (1 - p) of the largest p = softmax(z); exact also where p is almost 1."""
        if not (largest or odds):
            return
        graph = self.graph
        first, second, index = self._two_largest(name, logits)
        self._add(first, largest)
        if odds:
            far = graph.add("Sub", first, self._float(f"{name}_far", _FAR), name=f"{name}_out")
            others = graph.add("ScatterElements", logits, index, far, name=f"{name}_others", axis=1)
            powers = graph.add("Exp", graph.add("Sub", others, second, name=f"{name}_less"), name=f"{name}_powers")
            axis = self._integers(f"{name}_classes_axis", [1])
            logs = graph.add("Log", graph.add("ReduceSum", powers, axis, name=f"{name}_sums"), name=f"{name}_logs")
            gap = graph.add("Sub", first, second, name=f"{name}_gap")
            self._add(graph.add("Sub", gap, logs, name=f"{name}_odds"), odds)

    def _two_largest(self, name: str, values: str) -> tuple[str, str, str]:
        """The largest of (B, C) and the second largest, each (B, 1), and the place of the largest."""
        graph = self.graph
        two = self._integers(f"{name}_two", [2])
        top = graph.add("TopK", values, two, name=f"{name}_top", more=[f"{name}_places"], axis=1)
        zero, one = self._integers(f"{name}_0", [0]), self._integers(f"{name}_1", [1])
        first = graph.add("Gather", top, zero, name=f"{name}_first", axis=1)
        second = graph.add("Gather", top, one, name=f"{name}_second", axis=1)
        return first, second, graph.add("Gather", f"{name}_places", zero, name=f"{name}_place", axis=1)
