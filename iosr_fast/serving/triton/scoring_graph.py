"""A ScoringPlan as an ONNX graph: all terms, all precisions of the keys, without loops."""

from __future__ import annotations

import numpy as np

from iosr_fast.scoring.fields import EMBEDDINGS
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reducers import Reducer
from iosr_fast.serving.triton.graph import Graph

# A plan stores bfloat16 as uint16.
_STORED = {"fp32": np.float32, "fp16": np.float16, "bf16": "bfloat16", "int8": np.int8}
_TINY = 1e-12  # the floor of a norm, as in Reducer


def scoring_inputs(plan: ScoringPlan) -> list[str]:
    """Which of "PLAIN" and "ADAPTED" the terms of the plan read; at least one."""
    return [name.upper() for name in plan.embeddings_read]


def scoring_model(plan: ScoringPlan) -> bytes:
    """PLAIN and ADAPTED float32 (B, D), if a term reads them -> four outputs float32 (B, C):

        ZERO_SHOT      tau * <plain, text>, or 0
        CACHE          cache term + linear term + bias: the part of the support images
        LOGITS         ZERO_SHOT + CACHE
        PROBABILITIES  softmax(LOGITS)

    Equals iosr_fast.score up to float32 rounding. Keys are constants in the precision of the plan (bf16 as bfloat16,
    int8 as codes whose scales multiply the cosines) and become float32 when a server loads the file. The (B, N)
    affinity is formed, and summed by class without a one-hot matrix: see _class_sums.
    Raises ValueError if the constants take 2 GB or more.
    """
    return _ScoringGraph(plan).model()


class _ScoringGraph:
    def __init__(self, plan: ScoringPlan) -> None:
        self.plan = plan
        self.inputs = scoring_inputs(plan)
        self.graph = Graph({name: (np.float32, ("batch", plan.width)) for name in self.inputs})
        self._reduced: dict[str, str] = {}

    def model(self) -> bytes:
        graph, plan = self.graph, self.plan
        if plan.text is None:
            self._zeros("ZERO_SHOT")
        else:
            self._float("text", plan.text)
            graph.add("Gemm", "PLAIN", "text", name="ZERO_SHOT", alpha=plan.tau, transB=1)
        terms = [] if plan.keys is None else [self._cache_term()]
        if plan.linear is not None:
            terms.append(self._linear_term())
        total = terms[0] if terms else self._zeros("nothing")
        added = [*terms[1:], *([] if plan.bias is None else [self._float("bias", plan.bias)])]
        for i, term in enumerate(added):
            total = graph.add("Add", total, term, name=f"total_{i}")
        graph.add("Identity", total, name="CACHE")
        graph.add("Add", "ZERO_SHOT", "CACHE", name="LOGITS")
        graph.add("Softmax", "LOGITS", name="PROBABILITIES", axis=1)
        dims = ("batch", plan.n_classes)
        outputs = ("LOGITS", "PROBABILITIES", "ZERO_SHOT", "CACHE")
        return graph.model("scoring", {name: (np.float32, dims) for name in outputs})

    def _float(self, name: str, value: np.ndarray | float) -> str:
        return self.graph.constant(name, value, np.float32)

    def _integers(self, name: str, value: list[int]) -> str:
        return self.graph.constant(name, value, np.int64)

    def _zeros(self, name: str) -> str:
        """(B, C) zeros."""
        batch = self.graph.add("Shape", self.inputs[0], name=f"{name}_batch", start=0, end=1)
        classes = self._integers(f"{name}_classes", [self.plan.n_classes])
        shape = self.graph.add("Concat", batch, classes, name=f"{name}_shape", axis=0)
        return self.graph.add("ConstantOfShape", shape, name=name)

    def _reduce(self, which: str) -> str:
        """The plain or adapted embedding after the reducer of the plan, computed once for all terms."""
        if self.plan.reducer is None:
            return which.upper()
        if which not in self._reduced:
            self._reduced[which] = self._apply(self.plan.reducer, which)
        return self._reduced[which]

    def _apply(self, reducer: Reducer, which: str) -> str:
        graph, value = self.graph, which.upper()
        if reducer.shift is not None:
            value = graph.add("Sub", value, self._float(f"{which}_shift", reducer.shift), name=f"{which}_centred")
        if reducer.projection is not None:
            projection = self._float(f"{which}_projection", reducer.projection)
            name = f"{which}_projected"
            if reducer.projection.ndim == 1:
                value = graph.add("Mul", value, projection, name=name)
            else:
                value = graph.add("Gemm", value, projection, name=name, transB=1)
        norm = graph.add("ReduceL2", value, self._integers(f"{which}_axis", [1]), name=f"{which}_norm", keepdims=1)
        floor = graph.add("Max", norm, self._float(f"{which}_tiny", _TINY), name=f"{which}_floored")
        return graph.add("Div", value, floor, name=f"{which}_reduced")

    def _cache_term(self) -> str:
        """alpha * sum of weights * exp(-beta * (1 - cosine)), (B, C)."""
        graph, plan = self.graph, self.plan
        assert plan.keys is not None and plan.key_precision is not None
        query = self._reduce(plan.query)
        if plan.query_transform is not None:
            transform = self._float("query_transform", plan.query_transform)
            query = graph.add("Gemm", query, transform, name="query", transB=1)
        keys = graph.constant("keys", plan.keys, _STORED[plan.key_precision])
        if plan.key_precision != "fp32":
            keys = graph.cast(keys, np.float32, "keys_float")
        beta = self._float("minus_beta", -plan.beta)
        if plan.key_scales is None:
            exponent = graph.add("Gemm", query, keys, beta, name="exponent", alpha=plan.beta, transB=1)
        else:
            codes = graph.add("Gemm", query, keys, name="code_products", transB=1)
            scales = self._float("beta_key_scales", plan.beta * plan.key_scales.astype(np.float64))
            scaled = graph.add("Mul", codes, scales, name="beta_cosines")
            exponent = graph.add("Add", scaled, beta, name="exponent")
        affinity = graph.add("Exp", exponent, name="affinity")
        weights = np.full(len(plan.keys), plan.alpha)
        if plan.weights is not None:
            weights *= plan.weights
        if plan.values is not None:
            values = self._float("weighted_values", weights[:, None] * plan.values)
            return graph.add("MatMul", affinity, values, name="cache_term")
        assert plan.class_offsets is not None
        return self._class_sums(affinity, weights, plan.class_offsets)

    def _class_sums(self, affinity: str, weights: np.ndarray, offsets: np.ndarray) -> str:
        """sum over the keys j of class c: weights[j] * affinity[b, j], for affinity (B, N): (B, C).

        If all classes have N / C keys, the affinity is reshaped to (B, C, N / C) and summed over the last axis.
        Otherwise classes are grouped by their number of keys, rounded up to a power of two; each group is gathered into
        (B, classes, keys), with weight 0 in unused places. So at most twice the affinity is gathered, in at most
        log2(N) + 1 groups, however uneven the classes are.
        """
        graph = self.graph
        counts = np.diff(offsets)
        last = self._integers("keys_axis", [2])
        if (counts == counts[0]).all():
            weighted = graph.add("Mul", affinity, self._float("weights", weights), name="weighted")
            shape = self._integers("by_class_shape", [0, len(counts), int(counts[0])])
            by_class = graph.add("Reshape", weighted, shape, name="by_class")
            return graph.add("ReduceSum", by_class, last, name="cache_term", keepdims=0)
        room = 1 << np.ceil(np.log2(np.maximum(counts, 1))).astype(np.int64)
        sums, classes = [], []
        for size in np.unique(room).tolist():
            group = np.flatnonzero(room == size)
            places = np.arange(size)
            used = places < counts[group, None]
            keys = np.where(used, offsets[group, None] + places, 0)
            index = graph.constant(f"keys_{size}", keys, np.int32)
            gathered = graph.add("Gather", affinity, index, name=f"gathered_{size}", axis=1)
            weight = self._float(f"weights_{size}", np.where(used, weights[keys], 0.0))
            weighted = graph.add("Mul", gathered, weight, name=f"weighted_{size}")
            sums.append(graph.add("ReduceSum", weighted, last, name=f"sums_{size}", keepdims=0))
            classes.append(group)
        together = graph.add("Concat", *sums, name="sums", axis=1) if len(sums) > 1 else sums[0]
        place = graph.constant("class_places", np.argsort(np.concatenate(classes)), np.int32)
        return graph.add("Gather", together, place, name="cache_term", axis=1)

    def _linear_term(self) -> str:
        """<feature, linear>, (B, C)."""
        plan = self.plan
        assert plan.linear is not None
        if plan.feature == "text-distribution":
            feature = self._text_distribution()
        elif plan.feature == "both":
            halves = (self._reduce(which) for which in EMBEDDINGS)
            feature = self.graph.add("Concat", *halves, name="both_embeddings", axis=1)
        else:
            feature = self._reduce(plan.feature)
        return self.graph.add("Gemm", feature, self._float("linear", plan.linear), name="linear_term", transB=1)

    def _text_distribution(self) -> str:
        """[s, H], (B, C + 1): s = softmax(<plain, text> / temperature) and H = sum of s * log(C s).

        log(C s) is the exponent minus the log of the mean power, which is accurate even if s is nearly uniform.
        """
        graph, plan = self.graph, self.plan
        axis = self._integers("texts_axis", [1])
        exponent = graph.add("Gemm", "PLAIN", "text", name="text_exponent", alpha=1.0 / plan.temperature, transB=1)
        largest = graph.add("ReduceMax", exponent, axis, name="text_largest", keepdims=1)
        below = graph.add("Sub", exponent, largest, name="text_below")
        powers = graph.add("Exp", below, name="text_powers")
        total = graph.add("ReduceSum", powers, axis, name="text_total", keepdims=1)
        shares = graph.add("Div", powers, total, name="text_shares")
        mean = graph.add("ReduceMean", powers, axis, name="text_mean", keepdims=1)
        log_ratio = graph.add("Sub", below, graph.add("Log", mean, name="text_log_mean"), name="text_log_ratio")
        parts = graph.add("Mul", shares, log_ratio, name="text_parts")
        negentropy = graph.add("ReduceSum", parts, axis, name="text_negentropy", keepdims=1)
        return graph.add("Concat", shares, negentropy, name="text_distribution", axis=1)
