"""The description of a training-free method: how it compiles a support set, what it needs, and its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from iosr_fast.methods.multi_label_set import MultiLabelSet, MultiLabelTerms
from iosr_fast.scoring.fields import RANGES
from iosr_fast.scoring.plan import ScoringPlan, Which

# Slopes are float32 sums: a difference of at most this share of them may be mere rounding.
ROUNDING = 64 * float(np.finfo(np.float32).eps)
# The largest alpha, and the largest factor of logits: float32 logits then stay far from overflow (fields.LARGEST).
MAX_ALPHA = 1e8
# Within these ranges a plan's float32 logits are usable (scoring.fields.RANGES has those of a plan).
PARAMETER_RANGES = {
    **dict.fromkeys(
        ("alpha", "text", "discriminant", "discriminant_adapted", "regression", "text_regression"), (0.0, MAX_ALPHA)
    ),
    "beta": RANGES["beta"],
    "gamma": (0.0, 1000.0),
    "ridge": (1e-6, 1e6),
    "text_images": (0.0, 1000.0),
    "adapted_keys": (0.0, 1.0),
}
# The grid of the paper's public code, and larger values; an exact search over these is never worse than that grid.
BETAS = (*np.linspace(0.0, 20.0, 20).tolist(), 27.0, 40.0, 60.0)


@dataclass(frozen=True)
class Method:
    """A method's compile function and all other facts that the package needs about it.

    compile            (support, which, reducer, **parameters) -> ScoringPlan
    which              the embeddings of images that it compares; "adapted" for the "++" form
    parameters         names and default values
    adapted_parameters those that only the "++" form has
    scales             the term of the plan that alpha multiplies; None for a method without support images
    axes               for each parameter but alpha, the first values of a search, rising
    additive           a key's share of the logits does not depend on other keys, so adding a key costs one product
    by_moments         counts, sums and second moments of the images determine the plan (state.moments)
    max_support        the largest number of support images, if there is a limit
    leave_out          (support, which, reducer, queries, folds) -> setting -> (N, C) float32: for each support image
                       the term that alpha multiplies at alpha 1, fitted without the image's fold, in closed form; None
                       for methods that are compiled again for each fold
    stack_part         the parameter of the stack that weighs what the method adds to texts, if the stack has it
    weighted           its weights are fitted by log-loss (tuning.stack_weights), without alpha and without a reducer
    multi_label        (images, which, setting) -> its terms for images with any number of labels
                       (multi_label_set.MultiLabelTerms), or why the method has no such form
    """

    name: str
    compile: Callable[..., ScoringPlan]
    which: Which = "plain"
    parameters: Mapping[str, float] = field(default_factory=dict)
    adapted_parameters: Mapping[str, float] = field(default_factory=dict)
    scales: Literal["cache", "linear"] | None = None
    axes: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    needs_text: bool = False
    needs_every_class: bool = False
    additive: bool = False
    by_moments: bool = False
    max_support: int | None = None
    leave_out: Callable[..., Callable[[Mapping[str, float]], np.ndarray]] | None = None
    stack_part: str = ""
    weighted: bool = False
    multi_label: Callable[[MultiLabelSet, Which, Mapping[str, float]], MultiLabelTerms] | str = ""

    @property
    def needs_support(self) -> bool:
        return self.scales is not None

    @property
    def reducible(self) -> bool:
        """Whether a reducer may move what it compares."""
        return self.needs_support and not self.weighted

    @property
    def needs_adapter(self) -> bool:
        return self.which == "adapted"

    @property
    def class_keys(self) -> bool:
        """Whether each key of its plan belongs to one class, so that search.cache_intervals computes its intervals."""
        return self.scales == "cache" and self.leave_out is None

    def forms(self) -> list[Method]:
        """The method itself and, if it compares images, its "++" form with adapted embeddings."""
        if not self.needs_support:
            return [self]
        parameters = {**self.parameters, **self.adapted_parameters}
        return [self, replace(self, name=f"{self.name}++", which="adapted", parameters=parameters)]
