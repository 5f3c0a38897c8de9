"""Keys in fewer bits: the stored values, their error, and what cannot be stored."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.scoring import key_precision
from iosr_fast.scoring.key_precision import PRECISIONS, from_bfloat16, int8_keys, to_bfloat16
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reference import score_reference
from tests.conftest import unit_rows


def uneven_rows(rng: np.random.Generator, n: int, width: int) -> np.ndarray:
    """Unit rows of which a few channels are far above the others, as those of CLIP are."""
    rows = unit_rows(rng, n, width) * np.where(np.arange(width) % 40 == 7, 12.0, 1.0)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def plan_of(keys: np.ndarray) -> ScoringPlan:
    return ScoringPlan(1, keys=keys, class_offsets=[0, len(keys)])


def test_bfloat16_rounds_to_nearest_and_ties_to_even() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 100_000, dtype=np.uint64).astype(np.uint32)
    values = np.concatenate([bits.view(np.float32), np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40], np.float32)])
    import torch

    expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(from_bfloat16(to_bfloat16(values)), expected)


@pytest.mark.parametrize(("name", "dtype", "relative"), [("fp16", np.float16, 2**-11), ("bf16", np.uint16, 2**-8)])
def test_a_half_is_within_half_a_unit(
    name: key_precision.KeyPrecision, dtype: type, relative: float, rng: np.random.Generator
) -> None:
    keys = unit_rows(rng, 37, 65)
    plan = plan_of(keys).with_key_precision(name)
    assert plan.keys.dtype == dtype and plan.key_scales is None and plan.key_precision == name
    # float16 has no normal numbers below 2**-14; there its error is absolute.
    assert (np.abs(plan.dequantize() - keys) <= relative * np.maximum(np.abs(keys), 2.0**-14)).all()
    assert plan.with_key_precision(name) is plan


@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (5, 3), (300, 65), (2000, 128)])
def test_int8_codes_are_the_nearest_ones_of_rotated_keys(shape: tuple[int, int], rng: np.random.Generator) -> None:
    keys = uneven_rows(rng, *shape)
    codes, scales, rotation = int8_keys(keys)
    assert codes.dtype == np.int8 and codes.min() >= -127 and scales.dtype == np.float32 and (scales > 0).all()
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(shape[1]), atol=1e-6)
    plan = ScoringPlan(1, keys=codes, key_scales=scales, query_transform=rotation, class_offsets=[0, len(keys)])
    error = plan.dequantize().astype(np.float64) - keys
    # The scale makes the error orthogonal to the key, so that a key keeps its own affinity.
    np.testing.assert_allclose(np.einsum("nd,nd->n", error, keys), 0.0, atol=1e-6)
    turned = keys @ rotation.T
    step = np.abs(turned).max(axis=1, keepdims=True) / 127
    assert (np.abs(error @ rotation.T) <= 0.51 * step + 127 * np.abs(scales[:, None] - step) + 1e-6).all()
    np.testing.assert_array_equal(int8_keys(keys)[2], rotation)


def test_a_rotation_beats_codes_of_the_keys_own_channels(rng: np.random.Generator) -> None:
    every = uneven_rows(rng, 1500, 256)
    keys, queries = every[:1000], every[1000:]
    step = np.abs(keys).max(axis=1, keepdims=True) / 127
    nearest = np.rint(keys / step) * step
    plan = plan_of(keys).with_key_precision("int8")
    errors = [np.std(queries @ (approximate - keys).T) for approximate in (plan.dequantize(), nearest)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_keys_of_few_bits_have_values_in_float16(
    precision: key_precision.KeyPrecision, rng: np.random.Generator
) -> None:
    keys, values = unit_rows(rng, 60, 48), 1e6 * rng.standard_normal((60, 7))
    plan = ScoringPlan(7, keys=keys, values=values, beta=3.0)
    narrow = plan.with_key_precision(precision)
    assert narrow.values.dtype == np.float16 and narrow.alpha == pytest.approx(np.abs(values).max())
    embeddings = Embeddings(unit_rows(rng, 9, 48))
    truth, rounded = score_reference(plan, embeddings), score_reference(narrow, embeddings)
    assert np.abs(rounded - truth).max() < 0.02 * np.abs(truth).max()
    error = narrow.alpha * narrow.values.astype(np.float64) - values
    assert (np.abs(error.sum(0)) <= 2.0**-11 * np.abs(values).max()).all()  # of the whole column
    assert narrow.with_key_precision("fp16").alpha == narrow.alpha
    assert plan.with_key_precision("bf16").values is plan.values
    assert ScoringPlan(7, keys=keys, values=0 * values).with_key_precision(precision).alpha == 1.0


def test_a_conversion_needs_little_memory_beside_its_result(rng: np.random.Generator) -> None:
    keys = unit_rows(rng, 160_000, 64)  # 41 MB
    keys.flags.writeable = False
    plan = plan_of(keys)
    for name, result in (("fp16", keys.nbytes // 2), ("bf16", keys.nbytes // 2), ("int8", keys.nbytes // 4)):
        tracemalloc.start()
        try:
            narrow = plan.with_key_precision(name)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert not narrow.keys.flags.writeable
        assert peak < result + 40e6


def test_every_precision_converts_to_every_other(rng: np.random.Generator) -> None:
    keys = uneven_rows(rng, 50, 32)
    bound = {"fp32": 1e-6, "fp16": 5e-4, "bf16": 4e-3, "int8": 3e-2}
    for first, second in itertools.product(PRECISIONS, repeat=2):
        plan = plan_of(keys).with_key_precision(first).with_key_precision(second)
        assert plan.key_precision == second and (plan.key_scales is not None) == (second == "int8")
        assert np.abs(plan.dequantize() - keys).max() <= bound[first] + bound[second]
        if second == "fp32":  # the rounding of a coarser precision changes norms
            np.testing.assert_allclose(np.linalg.norm(plan.keys, axis=1), 1.0, rtol=1e-6)


def test_what_cannot_be_converted_is_refused(rng: np.random.Generator) -> None:
    keys = unit_rows(rng, 4, 8)
    with pytest.raises(ValueError, match="a key precision of fp32, fp16, bf16, int8, got 'fp8'"):
        plan_of(keys).with_key_precision("fp8")  # type: ignore[arg-type]
    for bad in (np.zeros((4, 8)), np.full((4, 8), np.nan), np.where(np.eye(4, 8) > 0, np.inf, keys)):
        with pytest.raises(ValueError, match="without zero rows, NaN or infinity, got such a row at 0"):
            int8_keys(bad.astype(np.float32))
    plan = ScoringPlan(2, text=keys[:2])
    for call in (lambda: plan.with_key_precision("fp16"), plan.dequantize):
        with pytest.raises(ValueError, match="expected a plan with keys"):
            call()
