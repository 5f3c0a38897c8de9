"""Keys in fewer bits: the stored values, their error, and the gain of compensated rounding."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
import torch

from iosr_fast.scoring import precision
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.precision import convert_keys, from_bfloat16, quantize_int8, to_bfloat16
from tests.conftest import unit_rows


def correlated_rows(rng: np.random.Generator, n: int, width: int) -> np.ndarray:
    """Unit rows with a decaying spectrum and a common mean, as embeddings have."""
    mixing = rng.standard_normal((width, width)) / np.arange(1, width + 1)[:, None]
    rows = rng.standard_normal((n, width)) @ mixing + 2 * mixing[0]
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def plan_of(keys: np.ndarray) -> ScoringPlan:
    return ScoringPlan(1, keys=keys, class_offsets=np.array([0, len(keys)]))


def test_bfloat16_rounds_as_torch_does(rng: np.random.Generator) -> None:
    ordinary = (rng.standard_normal(4096) * 10.0 ** rng.integers(-44, 39, 4096)).astype(np.float32)
    # Ties, to even both ways: 1 + 2**-8 goes down to 1, 1 + 3 * 2**-8 up to 1 + 2**-6; their neighbours go elsewhere.
    ties = np.float32(1) + np.arange(8, dtype=np.float32) * np.float32(2**-8)
    beside = [np.nextafter(ties, np.float32(side)) for side in (0, 2)]
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-45], np.float32)
    payload = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001], np.uint32).view(np.float32)
    values = np.concatenate([ordinary, ties, *beside, special, payload])
    expected = torch.from_numpy(values).to(torch.bfloat16)
    got = torch.from_numpy(to_bfloat16(values).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(got.isnan(), expected.isnan()) and int(got.isnan().sum()) == 5
    assert torch.equal(got[~got.isnan()].view(torch.int16), expected[~expected.isnan()].view(torch.int16))
    assert from_bfloat16(to_bfloat16(ties))[[1, 3]].tolist() == [1.0, 1.0 + 2**-6]
    np.testing.assert_array_equal(from_bfloat16(to_bfloat16(values))[:4096], expected.float().numpy()[:4096])


@pytest.mark.parametrize(("name", "dtype", "relative"), [("fp16", np.float16, 2**-11), ("bf16", np.uint16, 2**-8)])
def test_a_half_is_within_half_a_unit_and_goes_round(
    name: precision.Precision, dtype: type, relative: float, rng: np.random.Generator
) -> None:
    keys = unit_rows(rng, 37, 65)
    plan = plan_of(keys).with_key_precision(name)
    assert plan.keys.dtype == dtype and plan.key_scales is None and plan.key_precision == name
    back = plan.dequantize()
    assert back.dtype == np.float32
    # float16 has no normal numbers below 2**-14; there its error is absolute.
    assert (np.abs(back - keys) <= relative * np.maximum(np.abs(keys), 2.0**-14)).all()
    again = convert_keys(back, None, name)[0]
    np.testing.assert_array_equal(again, plan.keys)
    assert plan.with_key_precision(name) is plan


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (5, 3), (300, 64), (300, 65), (40, 130), (2000, 128)])
def test_int8_codes_and_scales_are_what_they_should_be(
    shape: tuple[int, int], compensate: bool, rng: np.random.Generator
) -> None:
    keys = correlated_rows(rng, *shape)
    codes, scales = quantize_int8(keys, compensate=compensate)
    assert codes.dtype == np.int8 and scales.dtype == np.float32 and scales.shape == (len(keys),)
    assert codes.min() >= -127 and (scales > 0).all()
    error = scales[:, None].astype(np.float64) * codes - keys
    # The scale makes the error orthogonal to the key, so that a key keeps its own affinity.
    np.testing.assert_allclose(np.einsum("nd,nd->n", error, keys), 0.0, atol=1e-6)
    if not compensate:
        step = 1.05 * np.abs(keys).max(axis=1, keepdims=True) / 127
        refitted = np.abs(codes.astype(np.float64)) * np.abs(scales[:, None] - step)
        assert (np.abs(error) <= 0.5 * step + refitted + 1e-7).all()
    plan = ScoringPlan(1, keys=codes, key_scales=scales, class_offsets=np.array([0, len(keys)]))
    np.testing.assert_array_equal(plan.dequantize(), scales[:, None] * codes.astype(np.float32))


def test_compensation_beats_nearest_where_channels_are_correlated(rng: np.random.Generator) -> None:
    every = correlated_rows(rng, 1500, 128)
    keys, queries = every[:1000], every[1000:]
    moment = keys.T.astype(np.float64) @ keys / len(keys)
    cost, seen = {}, {}
    for compensate in (True, False):
        codes, scales = quantize_int8(keys, compensate=compensate)
        error = scales[:, None].astype(np.float64) * codes - keys
        cost[compensate] = np.einsum("nd,nd->n", error @ moment, error)
        seen[compensate] = float(np.std(queries @ error.T))
    assert (cost[True] <= cost[False] * 1.01).all()
    assert cost[True].mean() < 0.25 * cost[False].mean()
    # What the errors do to the cosines of queries that rounding has not seen.
    assert seen[True] < 0.6 * seen[False]


def test_blocks_and_chunks_leave_the_recursion_as_it_is(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the recursion of the docstring, one channel after another for one key after another, in float64."""
    keys = correlated_rows(rng, 90, 150)
    monkeypatch.setattr(precision, "_CHUNK", 150 * 32)
    codes, _ = quantize_int8(keys)
    moment = keys.T.astype(np.float64) @ keys / len(keys)
    moment += 1e-3 * np.trace(moment) / 150 * np.eye(150)
    factor = np.linalg.cholesky(np.linalg.inv(moment)).T
    plain, differ = 0, 0
    for key, got in zip(keys.astype(np.float64), codes, strict=True):
        step = np.float64(np.float32(np.abs(key).max()) * np.float32(1.05 / 127))
        work, expected = key.copy(), np.zeros(150)
        for i in range(150):
            expected[i] = np.clip(np.rint(work[i] / step), -127, 127)
            work[i + 1 :] -= (work[i] - expected[i] * step) / factor[i, i] * factor[i, i + 1 :]
        plain += np.array_equal(got, np.rint(key / step))
        differ += not np.array_equal(got, expected)
    # float32 now and then decides a tie another way, and all later codes of that key follow.
    assert plain == 0 and differ <= 9


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
    keys = correlated_rows(rng, 50, 32)
    bound = {"fp32": 1e-7, "fp16": 5e-4, "bf16": 4e-3, "int8": 3e-2}
    for first, second in itertools.product(precision.PRECISIONS, repeat=2):
        plan = plan_of(keys).with_key_precision(first).with_key_precision(second)
        assert plan.key_precision == second and (plan.key_scales is not None) == (second == "int8")
        assert np.abs(plan.dequantize() - keys).max() <= bound[first] + bound[second]
    for coarse in ("fp16", "bf16", "int8"):
        # One channel alone shows a key's rounding undamped; a plan in float32 holds unit rows all the same.
        plan = plan_of(np.repeat([[0.6, 0.8]], 3, axis=0)).with_key_precision(coarse).with_key_precision("fp32")
        np.testing.assert_allclose(np.linalg.norm(plan.keys, axis=1), 1.0, rtol=1e-6)


def test_what_cannot_be_converted_is_refused(rng: np.random.Generator) -> None:
    keys = unit_rows(rng, 4, 8)
    with pytest.raises(ValueError, match="a key precision of fp32, fp16, bf16, int8, got 'fp8'"):
        plan_of(keys).with_key_precision("fp8")  # type: ignore[arg-type]
    for bad in (np.zeros((4, 8)), np.full((4, 8), np.nan), np.where(np.eye(4, 8) > 0, np.inf, keys)):
        with pytest.raises(ValueError, match="without zero rows, NaN or infinity, got such a row at 0"):
            quantize_int8(bad, compensate=False)
    with pytest.raises(ValueError, match="without zero rows, NaN or infinity"):
        quantize_int8(np.full((4, 8), np.nan))
