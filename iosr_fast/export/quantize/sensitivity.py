"""The products that have to stay in float: measured by their effect on the embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from iosr_fast.export.quantize.graph import EncoderGraph
from iosr_fast.export.quantize.values import QuantisedGroup

SUSPECTS, ALONE_PICTURES = 16, 4  # groups measured alone before products return to float, and on how many pictures
LEAST_VARIANCE = 0.1  # trained CLIPs have 0.2 to 0.5; with random weights all embeddings are near one another

Attempts = Sequence[QuantisedGroup | None]  # of each group of a graph; None stays in float


class EmbeddingError:
    """The error of the embeddings of `pictures` by the encoder in `source` with any choice of quantised groups."""

    def __init__(self, source: Path, attempts: Attempts, pictures: np.ndarray) -> None:
        self._source, self._attempts, self._pictures = source, attempts, pictures
        self._exact = EncoderGraph(source).run(pictures)

    def __call__(self, quantised: np.ndarray, count: int | None = None) -> float:
        """|e - e_float|^2 of the worst picture, as a share of the mean of |e_float - mean|^2 (at least LEAST_VARIANCE);
        the larger of both embeddings. `quantised` is bool (groups,); `count` limits the pictures to the first ones."""
        graph = EncoderGraph(self._source)
        for group, attempt, chosen in zip(graph.groups()[0], self._attempts, quantised, strict=True):
            if chosen and attempt is not None:
                graph.insert(group, attempt)
        shares = []
        for got, exact in zip(graph.run(self._pictures[:count]), self._exact, strict=True):
            variance = float(((exact - exact.mean(0)) ** 2).sum(1).mean())
            shares.append(float(((got - exact[:count]) ** 2).sum(1).max()) / max(variance, LEAST_VARIANCE))
        return max(shares)


def choose_float(
    error_of: Callable[..., float], attempts: Attempts, work: Sequence[int], largest: float
) -> tuple[dict[int, float], float]:
    """The groups that stay in float, {index: error with that group alone quantised}, and the error of the others.

    `error_of` is an EmbeddingError. The SUSPECTS with the largest errors of their own are measured, one at a time.
    Those with the largest error for their `work` (multiplications) return to float until the error of all others
    together is at most `largest`.
    """
    quantised = np.array([attempt is not None for attempt in attempts])
    own = {i: attempt.error for i, attempt in enumerate(attempts) if attempt is not None}
    suspects = sorted(own, key=lambda i: -own[i])
    alone: dict[int, float] = {}
    floats: dict[int, float] = {}
    while (error := error_of(quantised)) > largest:
        if not alone:
            for i in suspects[:SUSPECTS]:
                alone[i] = error_of(np.arange(len(quantised)) == i, ALONE_PICTURES)
            del suspects[:SUSPECTS]
        excess = (error - largest) / 2  # errors add up unevenly, so half of them is taken away before the next look
        while alone and excess > 0:
            worst = max(alone, key=lambda i: alone[i] / work[i])
            floats[worst] = alone.pop(worst)
            quantised[worst] = False
            excess -= floats[worst]
    return floats, error
