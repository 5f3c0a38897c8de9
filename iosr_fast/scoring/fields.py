"""The table of a ScoringPlan's fields, which the plan, its executors and its files iterate over."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

Embedding = Literal["plain", "adapted"]
Term = Literal["text", "cache", "linear", "reducer"]

EMBEDDINGS: tuple[Embedding, ...] = ("plain", "adapted")
# The largest magnitude of a term at which all implementations agree. It is far below the largest float32, even if norms
# are as far from 1 as allowed and beta and 1 / temperature multiply the rounding of a cosine.
LARGEST = 1e15


@dataclass(frozen=True)
class ArrayField:
    """An array of a plan, or None.

    name          its name in a ScoringPlan and in a DevicePlan
    term          the term that reads it; a reducer moves what the cache and the linear term read
    shape         axes: C classes, D channels of an embedding, N keys, F channels of the linear term's feature
    dtypes        in a ScoringPlan; an array of another dtype becomes the first one
    device_dtype  in a DevicePlan, if it differs
    """

    name: str
    term: Term
    shape: tuple[str, ...]
    dtypes: tuple[type, ...] = (np.float32,)
    device_dtype: type | None = None


@dataclass(frozen=True)
class ConstantField:
    """A number or a choice of a plan; `limits` are the smallest and the largest value allowed."""

    name: str
    type: type
    limits: tuple[float, float] | None = None
    choices: tuple[str, ...] = ()


ARRAYS = (
    ArrayField("text", "text", ("C", "D")),
    ArrayField("keys", "cache", ("N", "D"), dtypes=(np.float32, np.float16, np.uint16, np.int8)),
    ArrayField("key_scales", "cache", ("N",)),
    ArrayField("class_offsets", "cache", ("C + 1",), dtypes=(np.int64,), device_dtype=np.int32),
    ArrayField("weights", "cache", ("N",)),
    ArrayField("values", "cache", ("N", "C"), dtypes=(np.float32, np.float16)),
    ArrayField("query_transform", "cache", ("D", "D")),
    ArrayField("linear", "linear", ("C", "F")),
    ArrayField("bias", "linear", ("C",)),
    ArrayField("reducer_shift", "reducer", ("D",)),
    ArrayField("reducer_projection", "reducer", ("D", "D")),  # or (D,): diagonal
)
CONSTANTS = (
    ConstantField("n_classes", int),
    ConstantField("tau", float, (0.0, LARGEST)),
    ConstantField("alpha", float, (-LARGEST, LARGEST)),
    ConstantField("beta", float, (0.0, 1000.0)),
    ConstantField("temperature", float, (0.01, 100.0)),
    ConstantField("query", str, choices=EMBEDDINGS),
    ConstantField("feature", str, choices=(*EMBEDDINGS, "both", "text-distribution")),
)
RANGES = {field.name: field.limits for field in CONSTANTS if field.limits is not None}


class PlanTerms:
    """The fields of a ScoringPlan (NumPy arrays) and of a DevicePlan (tensors), and what follows from them."""

    n_classes: Any
    width: Any
    text: Any
    tau: Any
    keys: Any
    key_scales: Any
    class_offsets: Any
    weights: Any
    values: Any
    query_transform: Any
    query: Any
    alpha: Any
    beta: Any
    linear: Any
    bias: Any
    feature: Any
    temperature: Any
    reducer_shift: Any
    reducer_projection: Any

    @cached_property
    def embeddings_read(self) -> tuple[Embedding, ...]:
        """The embeddings that a term reads."""
        read = {
            "plain" if self.text is not None else None,
            self.query if self.keys is not None else None,
            *(() if self.linear is None else EMBEDDINGS if self.feature == "both" else (self.feature,)),
        }
        return tuple(name for name in EMBEDDINGS if name in read)

    @cached_property
    def needs_adapted(self) -> bool:
        """Whether a term reads the adapted embedding."""
        return "adapted" in self.embeddings_read
