"""What a GPU holds of a plan, and its products of half factors, on the CPU, where the same products are in float32."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.scoring import half_products
from iosr_fast.scoring.device_plan import device_plan
from iosr_fast.scoring.half_plan import half_plan
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.score import score
from tests.conftest import EXTENDED, random_embeddings, random_plan, unit_rows
from tests.scoring.numerics import allowed_error, needs_gpu, score_reference
from tests.scoring.sums import KINDS, make_plan


@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 1e15])
def test_a_split_product_is_as_exact_as_float32(magnitude: float, rng: np.random.Generator) -> None:
    """Also where a matrix's rows have very different sizes."""
    rows = torch.tensor(unit_rows(rng, 9, 513))
    matrix = torch.tensor(magnitude * unit_rows(rng, 7, 513) * np.logspace(0, -4, 7, dtype=np.float32)[:, None])
    truth = rows.double() @ matrix.double().T
    split, eager = torch.zeros(9, 7), torch.zeros(9, 7).addmm_(rows, matrix.T, alpha=3.0)
    half_products.add_split_product(rows, half_products.matrix_parts(matrix), 3.0, split)
    error, allowed = ((got.double() - 3.0 * truth).abs().max() for got in (split, eager))
    assert error <= 2 * allowed + 3.0 * magnitude * 2.0**-22


@pytest.mark.parametrize("name", EXTENDED)
def test_whole_plans_by_split_products(name: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix of a plan: texts, linear terms, reducers, rotations of int8 keys."""
    plan, embeddings = random_plan(rng, [3, 0, 20], 33, **EXTENDED[name]), random_embeddings(rng, 5, 33)
    monkeypatch.setattr(half_products, "has_half_products", lambda device: True)
    monkeypatch.setattr(half_products, "sums_of_products", lambda left, right: left.float() @ right.float())
    logits, truth = score(plan, embeddings, "torch"), score_reference(plan, embeddings)
    parts = [name for name in vars(device_plan(plan, "cpu"))["_cached"] if name.startswith("parts/")]
    matrices = (plan.text, plan.linear, plan.query_transform)
    assert len(parts) >= sum(matrix is not None for matrix in matrices)
    assert np.abs(logits - truth).max() <= 4 * allowed_error(truth, plan, embeddings)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_keys_and_values_are_float16_on_a_gpu_unless_asked(kind: str, rng: np.random.Generator) -> None:
    plan = replace(make_plan(rng, [40, 0, 29, 11], 64, "fp32", kind), half_on_gpu=True)
    half = half_plan(plan)
    assert half.key_precision == "fp16" and (half.values is None or half.values.dtype == np.float16)
    queries = random_embeddings(rng, 200, 64)
    truth, rounded = score(plan, queries), score(half, queries)
    assert np.abs(rounded - truth).max() <= 1e-2 * np.abs(truth).max()
    for precision in ("fp32", "bf16", "int8"):
        asked = plan.with_key_precision(precision)  # type: ignore[arg-type]
        assert half_plan(asked) is asked


def test_keys_whose_labels_float16_would_change_stay_in_float32(
    rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    """Keys of two classes that differ by less than float16 shows."""
    keys = unit_rows(rng, 1, 64) + 1e-5 * rng.standard_normal((60, 64), dtype=np.float32)
    keys = np.sort(keys / np.linalg.norm(keys, axis=1, keepdims=True), axis=0)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    plan = ScoringPlan(2, keys=keys, class_offsets=[0, 30, 60], beta=1000.0)
    with caplog.at_level(logging.WARNING, logger="iosr_fast"):
        assert half_plan(plan) is plan
    assert "keys stay in float32 on the GPU: float16 changes" in caplog.text


@pytest.mark.gpu
@needs_gpu
def test_half_precision_is_the_default_on_a_gpu(rng: np.random.Generator) -> None:
    plan = replace(make_plan(rng, [40, 0, 29], 64, "fp32", "values"), half_on_gpu=True)
    queries = random_embeddings(rng, 300, 64)
    on_gpu = Embeddings(*(torch.tensor(rows).cuda() for rows in (queries.plain, queries.adapted)))
    truth = score_reference(plan, queries)
    half, exact = (score(one, on_gpu).cpu().numpy() for one in (plan, plan.with_key_precision("fp32")))
    largest = np.abs(truth).max()
    assert np.abs(exact - truth).max() <= 1e-5 * largest and np.abs(half - truth).max() <= 1e-2 * largest
