"""The table of a ScoringPlan's fields, which the plan, its executors and its files iterate over."""

from __future__ import annotations

from dataclasses import dataclass
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

    name          its name in DevicePlan and in torch.ops.iosr_fast.score
    term          the term that reads it; a reducer moves what the cache and the linear term read
    shape         axes: C classes, D channels of an embedding, N keys, F channels of the linear term's feature
    dtype         in a ScoringPlan; None means one of the four key precisions
    device_dtype  in a DevicePlan, if it differs
    attribute     its attribute in a ScoringPlan, if it isn't `name`
    """

    name: str
    term: Term
    shape: tuple[str, ...]
    dtype: type | None = np.float32
    device_dtype: type | None = None
    attribute: str = ""

    def of(self, plan: Any) -> np.ndarray | None:
        """The array of a ScoringPlan, or None."""
        value = plan
        for name in (self.attribute or self.name).split("."):
            value = None if value is None else getattr(value, name)
        return value


@dataclass(frozen=True)
class ConstantField:
    """A number or a choice of a plan; `limits` are the smallest and the largest value allowed."""

    name: str
    type: type
    limits: tuple[float, float] | None = None
    choices: tuple[str, ...] = ()


ARRAYS = (
    ArrayField("text", "text", ("C", "D")),
    ArrayField("keys", "cache", ("N", "D"), dtype=None),
    ArrayField("key_scales", "cache", ("N",)),
    ArrayField("class_offsets", "cache", ("C + 1",), dtype=np.int64, device_dtype=np.int32),
    ArrayField("weights", "cache", ("N",)),
    ArrayField("values", "cache", ("N", "C")),
    ArrayField("query_transform", "cache", ("D", "D")),
    ArrayField("linear", "linear", ("C", "F")),
    ArrayField("bias", "linear", ("C",)),
    ArrayField("reducer_shift", "reducer", ("D",), attribute="reducer.shift"),
    ArrayField("reducer_projection", "reducer", ("D", "D"), attribute="reducer.projection"),  # or (D,): diagonal
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
ARRAY_NAMES = tuple(field.name for field in ARRAYS)
CONSTANT_NAMES = tuple(field.name for field in CONSTANTS)
RANGES = {field.name: field.limits for field in CONSTANTS if field.limits is not None}


class PlanTerms:
    """Properties that ScoringPlan and DevicePlan derive from their fields."""

    width: Any
    text: Any
    keys: Any
    linear: Any
    query: Any
    feature: Any

    @property
    def embeddings_read(self) -> tuple[Embedding, ...]:
        """The embeddings that a term reads."""
        read = {
            "plain" if self.text is not None else None,
            self.query if self.keys is not None else None,
            *(() if self.linear is None else EMBEDDINGS if self.feature == "both" else (self.feature,)),
        }
        return tuple(name for name in EMBEDDINGS if name in read)

    @property
    def needs_adapted(self) -> bool:
        """Whether a term reads the adapted embedding."""
        return "adapted" in self.embeddings_read
