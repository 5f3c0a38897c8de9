"""int8 keys in an adapted basis: the keys they represent, their smaller error, and when no basis is used."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.scoring.int8_keys import compact_int8
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.precision import quantize_int8
from iosr_fast.scoring.reference import score_reference
from iosr_fast.scoring.score import score_with_path
from tests.conftest import unit_rows
from tests.scoring.numerics import CPP_PATHS, assert_close_to_truth
from tests.scoring.test_precision import correlated_rows


def test_queries_that_were_not_seen_meet_smaller_errors_than_with_codes_in_the_keys_own_channels(
    rng: np.random.Generator,
) -> None:
    every = correlated_rows(rng, 3000, 128)
    keys, queries = every[:2500], every[2500:]
    codes, scales, transform = compact_int8(keys)
    assert (
        codes.dtype == np.int8 and codes.shape == keys.shape and scales.shape == (2500,) and scales.dtype == np.float32
    )
    assert transform is not None and transform.shape == (128, 128) and transform.dtype == np.float32
    assert not (codes.flags.writeable or scales.flags.writeable or transform.flags.writeable)
    error = (codes * scales[:, None]) @ transform - keys
    own_codes, own_scales = quantize_int8(keys)
    own_error = own_codes * own_scales[:, None] - keys
    assert np.std(queries @ error.T) < 0.5 * np.std(queries @ own_error.T)
    # The scale keeps a key's affinity to itself.
    np.testing.assert_allclose(np.einsum("nd,nd->n", error, keys), 0.0, atol=1e-6)


def test_nothing_is_transformed_where_no_channel_has_anything_to_give(rng: np.random.Generator) -> None:
    for keys in (unit_rows(rng, 2000, 64), correlated_rows(rng, 200, 31)):
        codes, scales, transform = compact_int8(keys)
        assert transform is None
        own_codes, own_scales = quantize_int8(keys)
        np.testing.assert_array_equal(codes, own_codes)
        np.testing.assert_array_equal(scales, own_scales)


def plan_in_a_basis(rng: np.random.Generator, width: int = 48) -> ScoringPlan:
    counts = [400, 0, 300, 1]
    plan = ScoringPlan(
        4,
        text=unit_rows(rng, 4, width),
        keys=correlated_rows(rng, sum(counts), width),
        class_offsets=np.cumsum([0, *counts]),
        query="adapted",
        beta=8.0,
    ).with_key_precision("int8")
    assert plan.query_transform is not None
    return plan


def test_a_plan_stands_for_its_dequantized_keys(rng: np.random.Generator) -> None:
    plan = plan_in_a_basis(rng)
    queries = correlated_rows(rng, 20, 48)
    embeddings = Embeddings(queries, queries[::-1])
    exact = replace(plan, keys=plan.dequantize(), key_scales=None, query_transform=None)
    np.testing.assert_allclose(score_reference(plan, embeddings), score_reference(exact, embeddings), rtol=1e-5)
    back = plan.with_key_precision("fp32")
    assert back.query_transform is None and back.key_precision == "fp32"
    np.testing.assert_allclose(np.linalg.norm(back.keys, axis=1), 1.0, rtol=1e-6)
    assert np.abs(back.keys - exact.keys).max() < 1e-3


@pytest.mark.parametrize("path", ["numpy", *CPP_PATHS, "torch/cpu"])
@pytest.mark.parametrize("batch", [1, 5, 40])
def test_every_path_transforms_the_query(path: str, batch: int, rng: np.random.Generator) -> None:
    plan = plan_in_a_basis(rng)
    queries = correlated_rows(rng, batch, 48)
    assert_close_to_truth((path,), plan, Embeddings(unit_rows(rng, batch, 48), queries))
    # One array for the text and for the keys: it is transformed for the keys alone.
    assert_close_to_truth((path,), replace(plan, query="plain"), Embeddings(queries))


def test_the_module_transforms_the_query(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    from iosr_fast.scoring.torch_op import ScoringModule

    plan = plan_in_a_basis(rng)
    rows = torch.from_numpy(correlated_rows(rng, 9, 48))
    module = torch.compile(ScoringModule(plan), fullgraph=True, backend="aot_eager")
    logits, path = score_with_path(plan, Embeddings(rows, rows))
    assert path.startswith("cpp/")
    torch.testing.assert_close(module(rows, rows), logits)


def test_what_makes_no_sense_is_refused(rng: np.random.Generator) -> None:
    plan = plan_in_a_basis(rng)
    with pytest.raises(ValueError, match=r"query_transform of shape \(48, 48\), got \(48, 47\)"):
        replace(plan, query_transform=plan.query_transform[:, :47])
    with pytest.raises(ValueError, match="expected keys together with query_transform, got query_transform alone"):
        ScoringPlan(4, text=plan.text, query_transform=plan.query_transform)
    with pytest.raises(ValueError, match="keys rows of unit norm"):
        replace(plan, query_transform=2 * plan.query_transform)
    keys = correlated_rows(rng, 100, 48)
    for bad in (0.0, np.nan):
        wrong = keys.copy()
        wrong[99] = bad
        with pytest.raises(ValueError, match="without zero rows, NaN or infinity"):
            compact_int8(wrong)
