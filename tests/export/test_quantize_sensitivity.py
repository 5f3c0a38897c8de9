"""Which products return to float: those that cost the embeddings most for the time that they take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from iosr_fast.export.quantize.sensitivity import choose_float
from iosr_fast.export.quantize.values import Quantised, QuantisedGroup


class Additive:
    """The error of quantised groups is the sum of `errors`."""

    def __init__(self, errors: list[float]) -> None:
        self.errors, self.calls = np.array(errors), 0

    def error(self, quantised: np.ndarray, count: int | None = None) -> float:
        self.calls += 1
        return float(self.errors[quantised].sum())


def test_the_most_costly_return_to_float_for_the_time_they_take() -> None:
    blank = Quantised(np.ones(()), np.zeros(()))

    def attempts(errors: list[float | None]) -> list[QuantisedGroup | None]:
        return [None if error is None else QuantisedGroup(blank, [], None, error) for error in errors]

    encoder: Any = Additive([0.0, 0.0004, 0.0004, 0.0001])
    assert choose_float(encoder, attempts([None, 1, 1, 1]), [1] * 4, 0.002) == ({}, pytest.approx(0.0009))
    assert encoder.calls == 1  # nothing is measured alone where all together are good enough
    encoder = Additive([0.0, 0.004, 0.004, 0.0005])
    floats, error = choose_float(encoder, attempts([None, 1, 1, 1]), [1, 10, 1, 1], 0.0049)
    assert floats == {2: 0.004} and error == pytest.approx(0.0045)
    # More suspects than are measured at once: those with small errors of their own are measured last.
    encoder = Additive([0.001] * 40)
    floats, error = choose_float(encoder, attempts([i / 100 for i in range(40)]), [1] * 40, 0.0105)
    assert error <= 0.0105 and set(floats) >= set(range(24, 40)) and len(floats) == 30
