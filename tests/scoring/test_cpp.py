"""The functions of the C++ extension, on every instruction set that this processor runs, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from iosr_fast import _C
from iosr_fast.utils import machine
from tests.conftest import unit_rows

PATHS = [name for name, supported in _C.simd_paths() if supported]
KEYS = ["float32", "float16", "bfloat16", "int8"]
# Queries, keys, channels, classes: few queries and panels, with remainders of every block.
SHAPES = [(1, 1, 1, 1), (1, 97, 33, 5), (5, 301, 123, 100), (9, 250, 64, 16), (24, 333, 65, 31), (33, 1601, 100, 101)]

pytestmark = pytest.mark.isa


def stored(rows: np.ndarray, precision: str) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Keys of a precision, their scales, and what they stand for."""
    if precision == "int8":
        codes, scales = np.rint(rows * 127).astype(np.int8), np.linspace(0.5, 1.0, len(rows), dtype=np.float32) / 127
        return codes, scales, codes * scales[:, None].astype(np.float64)
    if precision == "bfloat16":
        bits = (rows.view(np.uint32) >> 16).astype(np.uint16)
        return bits, None, (bits.astype(np.uint32) << 16).view(np.float32)
    narrow = rows.astype(precision)
    return narrow, None, narrow


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("IOSR_FAST_SIMD", request.param)
    return str(request.param)


@pytest.mark.parametrize("targets", ["classes", "float32", "float16"])
@pytest.mark.parametrize("precision", KEYS)
def test_affinity_sums_equal_the_formula(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, path: str, precision: str, targets: str
) -> None:
    for batch, n_keys, width, n_classes in SHAPES:
        queries = unit_rows(rng, batch, width)
        keys, scales, exact = stored(unit_rows(rng, n_keys, width), precision)
        weights = rng.uniform(0.1, 3.0, n_keys).astype(np.float32) if batch != 9 else None
        labels = np.sort(rng.integers(0, n_classes, n_keys))
        offsets = values = None
        if targets == "classes":
            offsets = np.searchsorted(labels, np.arange(n_classes + 1))
            members = np.eye(n_classes)[labels]
        else:
            values = rng.standard_normal((n_keys, n_classes)).astype(targets)
            members = values.astype(np.float64)
        affinity = np.exp(-5.5 * (1.0 - queries.astype(np.float64) @ exact.T)) * (1.0 if weights is None else weights)
        start = rng.standard_normal((batch, n_classes)).astype(np.float32)
        largest = np.abs(start).max() + 1.7 * (affinity @ np.abs(members)).max()
        found = []
        for threads in ("1", "3", "7"):
            monkeypatch.setenv("IOSR_FAST_THREADS", threads)
            logits = start.copy()
            assert _C.affinity_sums(queries, keys, scales, weights, offsets, values, 1.7, 5.5, logits) == path
            np.testing.assert_allclose(logits, start + 1.7 * affinity @ members, rtol=0, atol=1e-6 * largest)
            found.append(logits)
        for other in found[1:]:
            np.testing.assert_array_equal(other, found[0], "threads change nothing")


def test_exponentials_are_exact_to_a_rounding(path: str) -> None:
    """With beta = ln 2 the affinity is 2^(dot - 1)."""
    dots = np.arange(-129.0, 1.5, 0.000917, dtype=np.float32)
    for batch in (1, 40):
        logits = np.zeros((batch, len(dots)), np.float32)
        one = np.ones((batch, 1), np.float32)
        _C.affinity_sums(one, dots[:, None], None, None, np.arange(len(dots) + 1), None, 1.0, np.log(2.0), logits)
        truth = np.exp2(np.maximum((dots - np.float32(1.0)).astype(np.float64), -126.0))
        np.testing.assert_allclose(logits, np.broadcast_to(truth, logits.shape), rtol=2.5e-7)


def test_every_half_is_widened_exactly(path: str) -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    for batch in (1, 40):
        logits, one = np.zeros((batch, len(halves)), np.float32), np.ones((batch, 1), np.float32)
        values = np.stack([halves, np.zeros_like(halves), halves[::-1]])
        _C.affinity_sums(one, np.ones((3, 1), np.float32), None, None, None, values, 1.0, 0.0, logits)
        expected = halves.astype(np.float32) + halves[::-1].astype(np.float32)
        np.testing.assert_array_equal(logits, np.broadcast_to(expected, logits.shape))


def test_a_rows_product_has_the_same_bits_in_any_batch(rng: np.random.Generator, path: str) -> None:
    for batch, n_classes, width, _ in [*SHAPES, (200, 130, 40, 0)]:
        rows, matrix = unit_rows(rng, batch, width), unit_rows(rng, n_classes, width)
        start = rng.standard_normal((batch, n_classes)).astype(np.float32)
        logits, alone = start.copy(), start.copy()
        _C.add_product(rows, matrix, 3.0, logits)
        np.testing.assert_allclose(logits, start + 3.0 * rows.astype(np.float64) @ matrix.T, rtol=0, atol=4e-6)
        for b in range(batch):
            _C.add_product(rows[b : b + 1], matrix, 3.0, alone[b : b + 1])
        np.testing.assert_array_equal(alone, logits)


def test_unit_rows_are_finite_and_of_norm_one(rng: np.random.Generator, path: str) -> None:
    rows = unit_rows(rng, 5, 37)
    assert _C.unit_rows(rows, 1e-3)
    for wrong in (1.01, np.nan, np.inf):
        bad = rows.copy()
        bad[3] *= wrong
        assert not _C.unit_rows(bad, 1e-3)


GOOD: dict[str, Any] = {
    "queries": np.eye(2, 8, dtype=np.float32),
    "keys": np.eye(3, 8, dtype=np.float32),
    "key_scales": None,
    "weights": None,
    "class_offsets": None,
    "values": np.ones((3, 2), np.float32),
    "alpha": 1.0,
    "beta": 1.0,
    "logits": np.zeros((2, 2), np.float32),
}
READ_ONLY = np.zeros((2, 2), np.float32)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    "change, message",
    [
        ({"queries": np.eye(2, 7, dtype=np.float32)}, r"queries .* of shape \(2, 8\), got float32 of shape \(2, 7\)"),
        ({"keys": np.eye(3, 8)}, "keys .* float16, uint16 .* got float64"),
        ({"keys": np.asfortranarray(GOOD["keys"])}, "expected keys C-contiguous"),
        ({"keys": GOOD["keys"].astype(">f4")}, "expected keys"),
        ({"keys": np.eye(3, 8, dtype=np.int8)}, "key_scales with int8 keys"),
        ({"weights": np.ones(2, np.float32)}, r"weights .* of shape \(3,\)"),
        ({"values": np.ones((3, 2), np.uint16)}, "values .* float32 or float16 .* got uint16"),
        ({"class_offsets": np.array([0, 1, 3])}, "either class_offsets or values"),
        (
            {"class_offsets": np.array([0, 4, 3]), "values": None},
            "class_offsets to rise from 0 to the number of keys, 3",
        ),
        ({"logits": READ_ONLY}, "expected logits writable"),
        ({"logits": np.zeros((3, 2), np.float32)}, r"logits .* of shape \(2, 2\), got float32 of shape \(3, 2\)"),
    ],
)
def test_wrong_arrays_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.affinity_sums(**GOOD | change)


def test_threads_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(machine, "usable_threads", lambda: asked.append(True) or 1)
    _C.affinity_sums(**GOOD)
    _C.add_product(GOOD["queries"], GOOD["keys"], 1.0, np.zeros((2, 3), np.float32))
    assert len(asked) == 2
    monkeypatch.setenv("IOSR_FAST_THREADS", "2")
    _C.affinity_sums(**GOOD)
    assert len(asked) == 2


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("IOSR_FAST_SIMD", "altivec", r"expected IOSR_FAST_SIMD to name a compiled path \(.*scalar\), got 'altivec'"),
        ("IOSR_FAST_THREADS", "0", "expected IOSR_FAST_THREADS to be a number of threads, 1 to 4096, got '0'"),
        *[("IOSR_FAST_SIMD", name, "this processor can't run it") for name, runs in _C.simd_paths() if not runs],
    ],
)
def test_invalid_settings_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=message):
        _C.affinity_sums(**GOOD)
