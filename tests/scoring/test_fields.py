"""The table of a plan's fields agrees with everything that walks it, and no executor leaves a field out."""

from __future__ import annotations

from dataclasses import MISSING, fields, replace

import numpy as np
import pytest

from iosr_fast.scoring.device_plan import device_plan
from iosr_fast.scoring.fields import ARRAYS, CONSTANTS, RANGES
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reference import score_reference
from tests.conftest import random_embeddings, random_plan, random_reducer
from tests.scoring.numerics import CPP_PATHS, run_path

WIDTH, COUNTS = 33, [4, 0, 3]
ARRAY_NAMES, CONSTANT_NAMES = [field.name for field in ARRAYS], [field.name for field in CONSTANTS]


def plan_with(name: str, rng: np.random.Generator) -> ScoringPlan:
    """A plan that has the field `name`."""
    plan = random_plan(
        rng,
        COUNTS,
        WIDTH,
        dense=name == "values",
        feature="text-distribution" if name == "temperature" else "plain",
        alpha=100.0 if name == "key_scales" else 1.7,
        reducer={"reducer_shift": "centre", "reducer_projection": "diagonal"}.get(name),
    )
    if name in ("key_scales", "query_transform"):
        plan = replace(plan, keys=np.rint(127 * plan.keys).astype(np.int8), key_scales=np.full(7, 1 / 127))
    if name == "query_transform":  # orthogonal, so that keys stay of unit norm
        return replace(plan, query_transform=np.eye(WIDTH)[rng.permutation(WIDTH)])
    return plan


def changed(plan: ScoringPlan, name: str, rng: np.random.Generator) -> ScoringPlan:
    """The plan with another value of the field, of about the same size."""
    if name in ("query", "feature"):
        return replace(plan, **{name: "plain" if getattr(plan, name) == "adapted" else "adapted"})
    if name in CONSTANT_NAMES:
        return replace(plan, **{name: 1.5 * getattr(plan, name)})
    if name in ("reducer_shift", "reducer_projection"):
        return replace(plan, reducer=random_reducer(rng, "centre" if name == "reducer_shift" else "diagonal", WIDTH))
    if name == "class_offsets":
        return replace(plan, class_offsets=np.array([0, 2, 2, 7]))
    value = np.asarray(getattr(plan, name))
    if name == "key_scales":
        return replace(plan, key_scales=value * np.linspace(1.0, 1.015, len(value)))
    return replace(plan, **{name: value[::-1]})  # rows, keys or classes in another order


def test_the_plan_has_the_fields_of_the_table() -> None:
    of_reducer = {field.name for field in ARRAYS if field.term == "reducer"}
    others = {"reducer", "half_on_gpu"}
    assert {field.name for field in fields(ScoringPlan)} == {*ARRAY_NAMES, *CONSTANT_NAMES, *others} - of_reducer
    for field in fields(ScoringPlan):
        (constant,) = [one for one in CONSTANTS if one.name == field.name] or [None]
        assert constant is None or field.default is MISSING or isinstance(field.default, constant.type)
    assert set(RANGES) == {constant.name for constant in CONSTANTS if constant.type is float}


# The number of classes is the logits' shape.
@pytest.mark.parametrize("name", [*ARRAY_NAMES, *CONSTANT_NAMES[1:]])
def test_every_executor_reads_every_field(name: str, rng: np.random.Generator) -> None:
    plan, embeddings = plan_with(name, rng), random_embeddings(rng, 5, WIDTH)
    other = changed(plan, name, rng)
    effect = score_reference(other, embeddings) - score_reference(plan, embeddings)
    assert np.abs(effect).max() > 1e-2, "the change must be seen in the truth"
    for path in (CPP_PATHS[0], "torch/cpu"):
        seen = run_path(path, other, embeddings) - run_path(path, plan, embeddings)
        np.testing.assert_allclose(seen, effect, atol=1e-3, err_msg=f"{path} and {name}")


@pytest.mark.parametrize("name", ARRAY_NAMES)
def test_a_device_plan_has_every_array(name: str, rng: np.random.Generator) -> None:
    plan = plan_with(name, rng)
    (field,) = (field for field in ARRAYS if field.name == name)
    array, tensor = getattr(plan, name), getattr(device_plan(plan, "cpu"), name)
    assert array is not None and array.dtype in field.dtypes and tuple(tensor.shape) == array.shape
    np.testing.assert_array_equal(tensor.numpy(), array)
    assert device_plan(plan, "cpu") is device_plan(plan, "cpu")
