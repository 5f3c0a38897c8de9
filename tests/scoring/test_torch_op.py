"""The operator torch.ops.iosr_fast.score and the module around it: eagerly, compiled, in a CUDA graph."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from iosr_fast import _C
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.scoring import torch_op
from iosr_fast.scoring.device_plan import device_plan
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.precision import PRECISIONS, Precision
from tests.conftest import EXTENDED, random_embeddings, random_plan
from tests.scoring.numerics import assert_close_to_truth, needs_gpu, run_path, tensors

CPP = f"cpp/{next(name for name, supported in _C.simd_paths() if supported)}"


def op_arguments(module: torch_op.ScoringModule, embeddings: Embeddings) -> tuple[Any, ...]:
    parts = [getattr(module, name) for name in torch_op._FIELDS]
    return (embeddings.plain, embeddings.adapted, *parts, module.impl)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("impl", ["auto", "cpp", "numpy", "torch", "reference"])
def test_the_operator_scores_as_score_does(impl: str, precision: Precision, rng: np.random.Generator) -> None:
    plan, embeddings = random_plan(rng, [3, 0, 2], 24, precision=precision), random_embeddings(rng, 5, 24)
    assert_the_operator_is_score(plan, embeddings, impl)


@pytest.mark.parametrize("name", EXTENDED)
@pytest.mark.parametrize("impl", ["auto", "cpp", "numpy", "torch", "reference"])
def test_the_operator_scores_extended_plans(impl: str, name: str, rng: np.random.Generator) -> None:
    for precision, batch in (("fp32", 5), ("int8", 1), ("bf16", 0)):
        plan = random_plan(rng, [3, 0, 2], 23, **EXTENDED[name], precision=precision)
        assert_the_operator_is_score(replace(plan, temperature=0.3), random_embeddings(rng, batch, 23), impl)


def assert_the_operator_is_score(plan: ScoringPlan, embeddings: Embeddings, impl: str) -> None:
    """The path that should run, the same bits, and as good as eager."""
    rows = tensors(embeddings)
    logits, path = torch_op.score_tensors(device_plan(plan, "cpu"), rows.plain, rows.adapted, impl)
    assert path == {"auto": CPP, "cpp": CPP, "torch": "torch/cpu"}.get(impl, impl)
    np.testing.assert_array_equal(logits.numpy(), run_path(path, plan, embeddings))
    assert_close_to_truth(path, plan, embeddings)
    module = torch_op.ScoringModule(plan, impl)
    assert torch.equal(module(rows.plain, rows.adapted), logits)


@pytest.mark.parametrize("terms", [("text",), ("cache",), ("linear",), ("text", "cache", "linear")], ids="+".join)
def test_the_operator_passes_torchs_own_checks(terms: tuple[str, ...], rng: np.random.Generator) -> None:
    rows = tensors(random_embeddings(rng, 5, 24))
    for query, precision in (("plain", "fp32"), ("adapted", "int8")):
        module = torch_op.ScoringModule(random_plan(rng, [3, 0, 2], 24, terms, query=query, precision=precision))
        result = torch.library.opcheck(torch.ops.iosr_fast.score.default, op_arguments(module, rows))
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ["values", "distribution", "tip-x", "ape", "all"])
def test_the_operator_on_extended_plans_passes_torchs_own_checks(name: str, rng: np.random.Generator) -> None:
    rows = tensors(random_embeddings(rng, 5, 24))
    module = torch_op.ScoringModule(random_plan(rng, [3, 0, 2], 24, **EXTENDED[name]))
    result = torch.library.opcheck(torch.ops.iosr_fast.score.default, op_arguments(module, rows))
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXTENDED)
@pytest.mark.parametrize("impl", ["auto", "numpy", "torch"])
def test_a_module_of_an_extended_plan_compiles(impl: str, name: str, rng: np.random.Generator) -> None:
    plan, rows = random_plan(rng, [3, 0, 2], 24, **EXTENDED[name]), tensors(random_embeddings(rng, 5, 24))
    module = torch_op.ScoringModule(plan, impl)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rows.plain, rows.adapted), module(rows.plain, rows.adapted))


def test_a_reducer_is_rebuilt_for_arrays_without_a_look_at_them(rng: np.random.Generator) -> None:
    plan = random_plan(rng, [3, 2], 24, reducer="projection", dense=True, feature="text-distribution")
    views = torch_op._host_view(device_plan(plan, "cpu"))
    assert np.shares_memory(views.reducer.shift, plan.reducer.shift)
    assert np.shares_memory(views.reducer.projection, plan.reducer.projection)
    assert np.shares_memory(views.values, plan.values) and views.class_offsets is None
    assert (views.temperature, views.feature, views.reducer.width) == (plan.temperature, plan.feature, 24)
    np.testing.assert_array_equal(views._values_by_class, plan.values.T)
    assert torch_op._host_view(device_plan(plan, "cpu"))._values_by_class is views._values_by_class
    rows = random_embeddings(rng, 5, 24).plain
    np.testing.assert_array_equal(views.reducer(rows), plan.reducer(rows))
    assert torch_op._host_view(device_plan(random_plan(rng, [3, 2], 24), "cpu")).reducer is None


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_module_compiles_into_one_graph(backend: str, rng: np.random.Generator) -> None:
    plan, embeddings = random_plan(rng, [3, 0, 2], 24, precision="bf16"), random_embeddings(rng, 5, 24)
    rows = tensors(embeddings)
    module = torch_op.ScoringModule(plan)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    assert torch.equal(compiled(rows.plain, rows.adapted), module(rows.plain, rows.adapted))
    if backend == "inductor":  # which needs a C++ compiler, and long, for more than the operator
        return
    top = torch.compile(lambda rows: module(rows, rows).softmax(1).argmax(1), fullgraph=True, backend=backend)
    for n in (5, 3):
        assert torch.equal(top(rows.plain[:n]), module(rows.plain[:n], rows.plain[:n]).argmax(1))


@pytest.mark.parametrize("parts", [{}, EXTENDED["all"]], ids=["classes", "values"])
def test_a_module_keeps_its_precision_and_stays_out_of_checkpoints(
    parts: dict[str, Any], rng: np.random.Generator
) -> None:
    plan, embeddings = random_plan(rng, [3, 0, 2], 24, **parts, precision="int8"), random_embeddings(rng, 5, 24)
    rows = tensors(embeddings)
    module = torch_op.ScoringModule(plan)
    assert module.keys.data_ptr() == plan.keys.ctypes.data
    expected = module(rows.plain, rows.adapted)
    for change in (module.half, lambda: module.to(torch.bfloat16), module.double, lambda: copy.deepcopy(module)):
        changed = change()
        assert torch.equal(changed(rows.plain, rows.adapted), expected)
        assert changed.keys.dtype == torch.int8 and changed.key_scales.dtype == torch.float32
        floats = (changed.values, changed.reducer_shift, changed.reducer_projection)
        assert {part.dtype for part in floats if part is not None} <= {torch.float32}
    meta = copy.deepcopy(module).half().to("meta")
    assert meta.text.device.type == "meta" and meta.text.dtype == torch.float32
    assert module.state_dict() == {}
    assert "n_classes=3, width=24" in repr(module)


def test_what_the_module_cannot_score_is_refused(rng: np.random.Generator) -> None:
    rows = tensors(random_embeddings(rng, 5, 24))
    module = torch_op.ScoringModule(random_plan(rng, [3, 2], 24))
    with pytest.raises(ValueError, match="adapted embeddings, which this plan reads, got None"):
        module(rows.plain)
    with pytest.raises(ValueError, match=r"plain embeddings of shape \(B, 24\), got \(5, 23\)"):
        module(rows.plain[:, 1:], rows.adapted)
    with pytest.raises(ValueError, match=r"adapted embeddings of shape \(5, 24\), got \(4, 24\)"):
        module(rows.plain, rows.adapted[:4])
    with pytest.raises(ValueError, match=r"implementation of auto, .*, got impl='fortran'"):
        torch_op.ScoringModule(random_plan(rng, [3, 2], 24), "fortran")(rows.plain, rows.adapted)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("parts", [{}, EXTENDED["tip-x"], EXTENDED["all"]], ids=["plain", "tip-x", "all"])
def test_a_cuda_graph_records_the_module(impl: str, parts: dict[str, Any], rng: np.random.Generator) -> None:
    plan = random_plan(rng, [16] * 20, 64, **parts, precision="fp16")
    first, second = (tensors(random_embeddings(rng, 33, 64), device="cuda") for _ in range(2))
    module = torch_op.ScoringModule(plan, impl).cuda()
    expected = module(second.plain, second.adapted)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = module(first.plain, first.adapted)
    first.plain.copy_(second.plain)
    first.adapted.copy_(second.adapted)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(logits, expected)
    compiled = torch.compile(module, fullgraph=True)
    torch.testing.assert_close(compiled(second.plain, second.adapted), expected)
