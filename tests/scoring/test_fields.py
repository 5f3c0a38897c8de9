"""The table of a plan's fields agrees with everything that walks it, and no executor leaves a field out."""

from __future__ import annotations

from dataclasses import MISSING, fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.scoring import torch_op
from iosr_fast.scoring.device_plan import DevicePlan, device_plan
from iosr_fast.scoring.fields import ARRAY_NAMES, ARRAYS, CONSTANT_NAMES, CONSTANTS, RANGES
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reducers import Reducer
from iosr_fast.scoring.reference import score_reference
from iosr_fast.store import head_files
from tests.conftest import random_embeddings, random_plan, random_reducer
from tests.scoring.numerics import CPP_PATHS, run_path, tensors

N_CLASSES, WIDTH, COUNTS = 3, 33, [4, 0, 3]


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


def test_the_dataclasses_have_the_fields_of_the_table() -> None:
    attributes = {(field.attribute or field.name).split(".")[0] for field in ARRAYS}
    assert {field.name for field in fields(ScoringPlan)} == attributes | set(CONSTANT_NAMES)
    assert {field.name for field in fields(DevicePlan)} == {*ARRAY_NAMES, *CONSTANT_NAMES, "width", "device"}
    reducer = {field.attribute.split(".")[1] for field in ARRAYS if field.term == "reducer"}
    assert {field.name for field in fields(Reducer)} == reducer
    defaults = {field.name: field.default for field in fields(ScoringPlan) if field.default is not MISSING}
    for constant in CONSTANTS:
        if constant.name in defaults:
            assert isinstance(defaults[constant.name], constant.type)
    assert set(RANGES) == {constant.name for constant in CONSTANTS if constant.type is float}


def test_the_operators_schema_has_the_fields_of_the_table() -> None:
    schema = torch.ops.iosr_fast.score.default._schema
    assert [argument.name for argument in schema.arguments] == ["plain", "adapted", *torch_op._FIELDS, "impl"]


def test_the_cpp_binding_takes_the_cache_fields() -> None:
    from iosr_fast import _C

    signature = _C.BoundPlan.__init__.__doc__ or ""
    for field in ARRAYS:
        # Dense values and reducers are Python's part.
        assert (f" {field.name}:" in signature) == (field.name != "values" and field.term != "reducer"), field.name


def test_a_plan_files_arrays_and_the_support_sets_are_all_there_are() -> None:
    from_support = {"text", "class_offsets"}
    reducer = {field.name for field in ARRAYS if field.term == "reducer"}
    assert {*head_files.ARRAYS, *from_support, *reducer} == set(ARRAY_NAMES)
    assert {*head_files.CONSTANTS, "n_classes"} == set(CONSTANT_NAMES)


# The number of classes is the logits' shape.
@pytest.mark.parametrize("name", [*ARRAY_NAMES, *CONSTANT_NAMES[1:]])
def test_every_executor_reads_every_field(name: str, rng: np.random.Generator) -> None:
    plan, embeddings = plan_with(name, rng), random_embeddings(rng, 5, WIDTH)
    other = changed(plan, name, rng)
    effect = score_reference(other, embeddings) - score_reference(plan, embeddings)
    assert np.abs(effect).max() > 1e-2, "the change must be seen in the truth"
    for executor, score in executors().items():
        seen = score(other, embeddings) - score(plan, embeddings)
        np.testing.assert_allclose(seen, effect, atol=1e-3, err_msg=f"{executor} and {name}")


def executors() -> dict[str, Any]:
    """Each way to execute a plan without a GPU; the Triton kernels and the emulated CUDA kernels have their own tests
    of every term (triton_parity.py, test_cuda_scorer.py)."""
    paths = {path: lambda plan, batch, path=path: run_path(path, plan, batch) for path in ("numpy", CPP_PATHS[0])}
    paths["torch/cpu"] = lambda plan, batch: run_path("torch/cpu", plan, batch)
    paths["operator"] = _by_operator
    return paths


def _by_operator(plan: ScoringPlan, embeddings: Embeddings) -> np.ndarray:
    rows = tensors(embeddings)
    logits: np.ndarray = torch_op.ScoringModule(plan)(rows.plain, rows.adapted).numpy()
    return logits


@pytest.mark.parametrize("name", ARRAY_NAMES)
def test_a_device_plan_has_every_array_in_its_shape(name: str, rng: np.random.Generator) -> None:
    plan = plan_with(name, rng)
    (field,) = (field for field in ARRAYS if field.name == name)
    array, tensor = field.of(plan), getattr(device_plan(plan, "cpu"), name)
    assert array is not None and tuple(tensor.shape) == array.shape
    sizes = {"C": N_CLASSES, "C + 1": N_CLASSES + 1, "D": WIDTH, "N": sum(COUNTS), "F": WIDTH}
    if name != "reducer_projection":  # diagonal here
        assert array.shape == tuple(sizes[axis] for axis in field.shape)
    if field.dtype is not None:
        assert array.dtype == field.dtype and tensor.numpy().dtype == (field.device_dtype or field.dtype)
