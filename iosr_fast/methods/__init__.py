"""Training-free methods: each compiles a support set into a ScoringPlan, and knows no device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from iosr_fast.methods.ape import ape
from iosr_fast.methods.gda import gda
from iosr_fast.methods.proker import proker
from iosr_fast.methods.support_set import SupportSet, image_rows
from iosr_fast.methods.tip_adapter import tip_adapter
from iosr_fast.methods.tip_x import tip_x
from iosr_fast.methods.tuning.log_loss import MOST
from iosr_fast.methods.zero_shot import zero_shot
from iosr_fast.scoring.fields import RANGES
from iosr_fast.scoring.plan import ScoringPlan, Which
from iosr_fast.scoring.reducers import Reducer, fit_reducer
from iosr_fast.scoring.validation import check_number

__all__ = ["METHODS", "Method", "check_parameters", "compile_method"]


@dataclass(frozen=True)
class Method:
    """How to compile a method, what it needs, its parameters and their defaults.

    `scales` is the term of the plan that alpha multiplies; `axes` are the values at which a search for the other
    parameters begins, rising.
    """

    compile: Callable[..., ScoringPlan]
    which: Which = "plain"
    parameters: Mapping[str, float] = field(default_factory=dict)
    scales: Literal["cache", "linear"] | None = None
    axes: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    needs_text: bool = False
    needs_every_class: bool = False

    @property
    def needs_support(self) -> bool:
        return self.scales is not None

    @property
    def needs_adapter(self) -> bool:
        return self.which == "adapted"


# The public grid of the paper's code, and what lies beyond it: an exact search can't then be worse than that grid.
_BETA = (*np.linspace(0.0, 20.0, 20).tolist(), 27.0, 40.0, 60.0)
# Within these a plan's float32 logits are usable (scoring.RANGES has those of a plan).
_RANGES = {"alpha": (0.0, MOST), "beta": RANGES["beta"], "gamma": (0.0, 1000.0), "ridge": (1e-6, 1e6)}
_MAKERS: dict[str, Method] = {
    "zero-shot": Method(zero_shot, needs_text=True),
    "tip-adapter": Method(tip_adapter, parameters={"alpha": 1.0, "beta": 5.5}, scales="cache", axes={"beta": _BETA}),
    "tip-x": Method(
        tip_x,
        parameters={"alpha": 1.0, "beta": 5.5, "gamma": 1.0},
        scales="cache",
        axes={"beta": _BETA, "gamma": tuple(np.linspace(0.0, 30.0, 50).tolist())},
        needs_text=True,
    ),
    "ape": Method(
        ape,
        parameters={"alpha": 1.0, "beta": 5.5, "gamma": 0.1},
        scales="cache",
        axes={"beta": _BETA, "gamma": (0.0, 0.1, 0.25, 0.5, 1.0)},
        needs_text=True,
    ),
    "gda": Method(gda, parameters={"alpha": 0.1}, scales="linear", needs_every_class=True),
    "proker": Method(
        proker,
        parameters={"alpha": 1.0, "beta": 1.0, "ridge": 3.0},
        scales="cache",
        axes={"beta": (0.3, 1.0, 3.0, 10.0), "ridge": (0.003, 0.03, 0.3, 3.0)},
    ),
}


def _with_adapted() -> dict[str, Method]:
    """Each method that compares images, and its ++ form with adapted embeddings."""
    made: dict[str, Method] = {}
    for name, method in _MAKERS.items():
        made[name] = method
        if method.scales is not None:
            made[f"{name}++"] = Method(**{**vars(method), "which": "adapted"})
    return made


METHODS: dict[str, Method] = _with_adapted()


def check_parameters(name: str, **parameters: float | None) -> dict[str, float]:
    """The parameters that are given (not None). Raises ValueError for an unknown method, a parameter it has not or a
    value out of range."""
    method = METHODS.get(name)
    if method is None:
        raise ValueError(f"expected a method of {', '.join(METHODS)}, got {name!r}")
    given = {key: float(value) for key, value in parameters.items() if value is not None}
    unknown = sorted(set(given) - set(method.parameters))
    if unknown:
        raise ValueError(f"{name} has the parameters {sorted(method.parameters)}, got {unknown}")
    for key, value in given.items():
        check_number(f"{key} of {name}", value, *_RANGES[key], f"{method.parameters[key]:g} is the default")
    return given


def unavailable_reason(name: str, support: SupportSet) -> str | None:
    """Why a method can't be compiled for a support set, or None where it can."""
    method = METHODS[name]
    if method.needs_text and support.text is None:
        return f"{name} compares images with texts, and this support set has no text embeddings"
    if method.needs_support and len(support.embeddings) == 0:
        return f"{name} needs support images, got none; give a few a class, or use method='zero-shot'"
    if method.needs_adapter and support.embeddings.adapted is None:
        return f"{name} needs an encoder with an adapter; this one has none: use {name.removesuffix('++')!r}"
    if method.needs_every_class and not support.counts.all():
        return f"{name} needs at least one image of each class, got none of {int((support.counts == 0).sum())} classes"
    return None


def compile_method(
    name: str, support: SupportSet, *, reducer: str | Reducer | None = None, **parameters: Any
) -> ScoringPlan:
    """The plan of a method by name; a parameter that is None or left out takes the method's default.

    `reducer` is one that is fitted already, or the name of one to fit on the embeddings that the method compares
    (reducers.fit_reducer). Raises ValueError for an unknown method, parameter or reducer, and where the support set
    lacks what the method needs: images, texts, adapted embeddings.
    """
    given = check_parameters(name, **parameters)
    told = unavailable_reason(name, support)
    if told is not None:
        raise ValueError(told)
    method = METHODS[name]
    if isinstance(reducer, str):
        reducer = (
            fit_reducer(reducer, image_rows(support.embeddings, method.which, None)) if method.needs_support else None
        )
    return method.compile(support, method.which, reducer, **{**method.parameters, **given})
