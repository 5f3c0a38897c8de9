"""A ScoringPlan as constants and arrays of a bundle, without what the support set already has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from iosr_fast.methods import METHODS
from iosr_fast.methods.support_set import SupportSet, image_rows
from iosr_fast.scoring.fields import ARRAYS as ARRAY_FIELDS
from iosr_fast.scoring.fields import CONSTANT_NAMES
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reducers import Reducer
from iosr_fast.state.method_config import MethodConfig

# A bundle has these from its support set.
_FROM_SUPPORT = ("n_classes", "text", "class_offsets")
CONSTANTS = tuple(name for name in CONSTANT_NAMES if name not in _FROM_SUPPORT)
ARRAYS = tuple(field.name for field in ARRAY_FIELDS if field.name not in _FROM_SUPPORT and field.term != "reducer")


def plan_to_files(
    plan: ScoringPlan, support: SupportSet, config: MethodConfig
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Constants, JSON-ready, and arrays.

    Left out: text and class offsets, which are the support set's, and keys that are its embeddings as they are. int8
    keys are kept as codes: finding them again would take seconds.
    """
    constants: dict[str, Any] = {name: getattr(plan, name) for name in CONSTANTS}
    constants["cache"] = "none" if plan.keys is None else "dense" if plan.values is not None else "classes"
    arrays = {name: value for name in ARRAYS if (value := getattr(plan, name)) is not None}
    constants["keys"] = "none" if plan.keys is None else "stored"
    if plan.keys is not None and plan.key_precision == "fp32" and config.reducer is None and plan.reducer is None:
        constants["keys"] = "support"
        del arrays["keys"]
    return constants, arrays | reducer_arrays(plan.reducer, "plan_reducer") | reducer_arrays(config.reducer, "reducer")


def plan_from_files(
    constants: Mapping[str, Any], arrays: Mapping[str, np.ndarray], support: SupportSet, config: MethodConfig
) -> ScoringPlan:
    """The plan that `plan_to_files` took apart. Raises ValueError where something doesn't fit."""
    _check_fits(constants, arrays, support, config)
    given: dict[str, Any] = {name: constants[name] for name in CONSTANTS}
    given |= {name: arrays.get(name) for name in ARRAYS}
    if constants["keys"] == "support":
        given["keys"] = image_rows(support.embeddings, config.which, None)
    plan = ScoringPlan(
        support.n_classes,
        text=support.text,
        class_offsets=support.class_offsets if constants["cache"] == "classes" else None,
        reducer=reducer_from(arrays, "plan_reducer"),
        **given,
    )
    if plan.key_precision not in (None, config.key_precision):
        raise ValueError(f"expected keys in {config.key_precision}, got {plan.key_precision}")
    return plan


def _check_fits(
    constants: Mapping[str, Any], arrays: Mapping[str, np.ndarray], support: SupportSet, config: MethodConfig
) -> None:
    """That constants, arrays and config say the same of what the plan has."""
    method = METHODS[config.method]
    expected = {
        "cache": ("dense" if "values" in arrays else "classes") if method.scales == "cache" else "none",
        "keys": "none" if method.scales != "cache" else "stored" if "keys" in arrays else "support",
        "query": config.which if method.scales == "cache" else constants["query"],
    }
    for name, value in expected.items():
        if constants[name] != value:
            raise ValueError(f"expected {name} {value!r} in the plan of {config.method}, got {constants[name]!r}")
    if method.scales == "linear" and not ("linear" in arrays and constants["feature"] == config.which):
        raise ValueError(f"expected a linear term on {config.which} embeddings in the plan of {config.method}")
    if not math.isclose(constants["tau"], config.factor * support.tau, rel_tol=1e-6):
        raise ValueError(f"expected tau {config.factor * support.tau:g} in the plan, got {constants['tau']:g}")


def reducer_arrays(reducer: Reducer | None, name: str) -> dict[str, np.ndarray]:
    parts = () if reducer is None else (("shift", reducer.shift), ("projection", reducer.projection))
    return {f"{name}.{part}": array for part, array in parts if array is not None}


def reducer_from(arrays: Mapping[str, np.ndarray], name: str) -> Reducer | None:
    shift, projection = arrays.get(f"{name}.shift"), arrays.get(f"{name}.projection")
    return None if shift is None and projection is None else Reducer(shift, projection)
