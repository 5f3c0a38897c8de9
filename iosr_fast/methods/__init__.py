"""Training-free methods: each compiles a support set into a ScoringPlan, and knows no device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from iosr_fast.cache import SupportSet
from iosr_fast.methods.tip_adapter import tip_adapter, tip_adapter_plus_plus
from iosr_fast.methods.zero_shot import zero_shot
from iosr_fast.scoring import ScoringPlan

__all__ = [
    "METHODS",
    "Method",
    "check_parameters",
    "compile_method",
    "tip_adapter",
    "tip_adapter_plus_plus",
    "zero_shot",
]


@dataclass(frozen=True)
class Method:
    """`compile` turns a support set and the method's parameters into a plan; `parameters` has the defaults."""

    compile: Callable[..., ScoringPlan]
    needs_support: bool
    needs_adapter: bool
    parameters: dict[str, float]


METHODS = {
    "zero-shot": Method(zero_shot, needs_support=False, needs_adapter=False, parameters={}),
    "tip-adapter": Method(tip_adapter, needs_support=True, needs_adapter=False, parameters={"alpha": 1.0, "beta": 5.5}),
    "tip-adapter++": Method(
        tip_adapter_plus_plus, needs_support=True, needs_adapter=True, parameters={"alpha": 1.0, "beta": 5.5}
    ),
}


def check_parameters(name: str, **parameters: float | None) -> dict[str, float]:
    """The parameters that are given (not None). Raises ValueError for an unknown method or a parameter it has not."""
    method = METHODS.get(name)
    if method is None:
        raise ValueError(f"expected a method of {sorted(METHODS)}, got {name!r}")
    given = {key: float(value) for key, value in parameters.items() if value is not None}
    unknown = sorted(set(given) - set(method.parameters))
    if unknown:
        raise ValueError(f"{name} has the parameters {sorted(method.parameters)}, got {unknown}")
    return given


def compile_method(name: str, support: SupportSet, **parameters: float | None) -> ScoringPlan:
    """The plan of a method by name; a parameter that is None or left out takes the method's default.

    Raises ValueError for an unknown method or parameter, a support set without images where the method needs them, or
    without adapted embeddings where the method is a ++ one.
    """
    given = check_parameters(name, **parameters)
    method = METHODS[name]
    if method.needs_support and len(support.embeddings) == 0:
        raise ValueError(f"{name} needs support images, got none; give a few a class, or use method='zero-shot'")
    if method.needs_adapter and support.embeddings.adapted is None:
        raise ValueError(f"{name} needs an encoder with an adapter; this one has none: use {name.removesuffix('++')!r}")
    return method.compile(support, **{**method.parameters, **given})
