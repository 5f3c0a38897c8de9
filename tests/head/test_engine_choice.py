"""The rule that rejects an engine, the one that breaks ties, and the table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from iosr_fast import Embeddings
from iosr_fast.head.engine_choice import EngineCandidate, EngineChoice, best_of, rejection
from iosr_fast.head.engine_judge import cosines, sample_rows

GOOD = {"plain": (0.995, 0.999), "adapted": (0.996, 0.999)}


def flips(n: int, lost: int, won: int) -> tuple[np.ndarray, np.ndarray]:
    """What the reference and a candidate get right of n images."""
    reference, right = np.ones(n, bool), np.ones(n, bool)
    reference[:won] = False
    right[won : won + lost] = False
    return reference, right


@pytest.mark.parametrize(
    ("n", "lost", "won", "tolerance", "rejected"),
    [
        (40, 0, 0, 0.5, False),
        (40, 1, 0, 0.5, False),  # 2.5 points, but one image
        (40, 3, 0, 0.5, True),
        (40, 3, 3, 0.5, False),
        (400, 2, 0, 0.5, False),  # within the tolerance
        (400, 3, 0, 1.0, False),
        (400, 14, 6, 0.5, True),
        (400, 12, 8, 0.5, False),
    ],
)
def test_accuracy(n: int, lost: int, won: int, tolerance: float, rejected: bool) -> None:
    reason = rejection(*flips(n, lost, won), GOOD, tolerance)
    assert bool(reason) == rejected
    if rejected:
        assert f"({lost} images lost, {won} won, chance" in reason and f"tolerance {tolerance:g} points" in reason


def test_cosines_reject_whatever_the_accuracy() -> None:
    same = flips(40, 0, 0)
    assert rejection(*same, {"plain": (0.9901, 0.999)}, 100) == ""
    assert rejection(*same, GOOD | {"adapted": (0.97, 0.999)}, 100) == "cosine of adapted embeddings 0.970 < 0.99"
    assert rejection(*same, {"plain": (float("nan"), 1.0)}, 100) == "cosine of plain embeddings nan < 0.99"
    nothing = np.zeros(0, bool)
    assert rejection(nothing, nothing, GOOD, 0.5) == ""


def test_smaller_images_are_judged_by_accuracy_alone() -> None:
    far = {"plain": (0.8, 0.9)}
    assert rejection(*flips(400, 2, 0), far, 0.5, smaller_images=True) == ""
    assert "with smaller images any loss above 0.5 points" in rejection(*flips(40, 1, 0), far, 0.5, smaller_images=True)
    nothing = np.zeros(0, bool)
    assert "was not compared" in rejection(nothing, nothing, GOOD, 0.5, smaller_images=True)


def candidate(precision: Any, ms_one: float, ms_batch: float = 1.0, size: int = 1, **tokens: int) -> EngineCandidate:
    facts: dict[str, Any] = {"ms_one": ms_one, "ms_batch": ms_batch, "bytes": size, "tokens": tokens or None}
    return EngineCandidate(runtime="openvino", precision=precision, verdict="accepted", **facts)


@pytest.mark.parametrize(
    ("candidates", "objective", "best"),
    [
        ([candidate("fp32", 10.0), candidate("int8", 9.8), candidate("fp32", 12.0)], "latency", 0),  # level: more exact
        ([candidate("fp32", 10.6), candidate("int8", 10.0)], "latency", 1),
        ([candidate("int8", 2.0), candidate("int8", 1.0)], "size", 1),  # of one size and precision: the faster
        ([candidate("int8", 10.0), candidate("fp32", 9.8, image_size=48)], "latency", 0),  # full size
        ([candidate("fp32", 1.0, 9.0), candidate("int8", 2.0, 8.0)], "throughput", 1),
        ([candidate("fp32", 1.0, size=9), candidate("int8", 2.0, size=4)], "size", 1),
    ],
)
def test_the_best_of_level_candidates(candidates: list[EngineCandidate], objective: Any, best: int) -> None:
    assert best_of(candidates, objective) is candidates[best]


def test_samples_keep_every_class() -> None:
    ids = np.repeat([3, 5, 9], [10, 1, 400])
    rows = sample_rows(ids, 100)
    counts = np.unique(ids[rows], return_counts=True)[1]
    assert counts.tolist() == [10, 1, 89] and (np.diff(rows) > 0).all() and rows[-1] == len(ids) - 1
    assert np.unique(np.repeat(np.arange(300), 5)[sample_rows(np.repeat(np.arange(300), 5), 400)]).size == 300
    assert len(sample_rows(np.zeros(0, int), 10)) == 0


def test_cosines_of_what_is_not_finite() -> None:
    rows = Embeddings(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32))
    wrong = Embeddings(np.full((2, 2), np.nan, np.float32), rows.plain)
    assert cosines(rows, wrong) == {"plain": (-1.0, -1.0), "adapted": (1.0, 1.0)}
    assert list(cosines(rows, Embeddings(rows.plain))) == ["plain"]


def test_the_table() -> None:
    chosen = EngineCandidate(
        runtime="openvino", precision="int8", verdict="chosen", ms_one=2.0, ms_batch=8.5, bytes=1_700_000,
        cosines={"plain": (0.9991, 0.9999), "adapted": (0.998, 0.9995)}, agreement=1.0, accuracy=0.925,
        products=(11, 30),
    )  # fmt: skip
    other = EngineCandidate(runtime="onnxruntime", precision="fp32", verdict="failed", reason="no memory")
    choice = EngineChoice(
        objective="latency", tolerance=0.5, batch=8, judged=40, calibrated=40, processor="a processor", seconds=3.2,
        candidates=[chosen, other], note="a note",
    )  # fmt: skip
    heading, _, *rows, note = choice.lines()
    assert heading == (
        "engine openvino int8, chosen for latency on a processor; 40 left-out images, tolerance 0.5 points, 3.2 s; "
        "11 of 30 products in int8"
    )
    assert [" ".join(row.split()) for row in rows] == [
        "openvino int8 2.00 ms 8.50 ms 1.7 MB 0.9980 100.0% chosen; 11 of 30 products in int8",
        "onnxruntime fp32 failed: no memory",
    ]
    assert note == "a note" and choice.chosen is chosen and choice.runtime == "auto"  # on another processor
