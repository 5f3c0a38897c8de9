"""The products that have to stay in float: measured by their effect on the embeddings.

One graph computes each group of products both in float and quantised, and an input selects. So the error of the
embeddings is known for every choice, without building a graph for each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from iosr_fast.export.onnx import open_session
from iosr_fast.export.quantize.graph import PIXELS, EncoderGraph
from iosr_fast.export.quantize.values import QuantisedGroup

SUSPECTS, ALONE_PICTURES = 16, 4  # groups measured alone before products return to float, and on how many pictures
LEAST_VARIANCE = 0.1  # trained CLIPs have 0.2 to 0.5; with random weights all embeddings are near one another


class GatedEncoder:
    """Embeddings of `pictures` with any choice of quantised groups.

    `graph` is changed; `attempts` has an entry for each of its groups, None for one that stays in float.
    """

    def __init__(self, graph: EncoderGraph, attempts: Sequence[QuantisedGroup | None], pictures: np.ndarray) -> None:
        groups, _ = graph.groups()
        gates = graph.add_gates(len(attempts))
        for group, attempt, gate in zip(groups, attempts, gates, strict=False):
            if attempt is not None:
                graph.insert(group, attempt, gate)
        self._session = open_session(graph.finish(), graph.folder)
        self._pictures = pictures
        self._size = len(attempts)
        self._exact = self._run(np.zeros(self._size, bool))

    def error(self, quantised: np.ndarray, count: int | None = None) -> float:
        """|e - e_float|^2 of the worst picture, as a share of the mean of |e_float - mean|^2 (at least LEAST_VARIANCE);
        the larger of both embeddings. `quantised` is bool (groups,); `count` limits the pictures to the first ones."""
        shares = []
        for got, exact in zip(self._run(quantised, count), self._exact, strict=True):
            variance = float(((exact - exact.mean(0)) ** 2).sum(1).mean())
            shares.append(float(((got - exact[:count]) ** 2).sum(1).max()) / max(variance, LEAST_VARIANCE))
        return max(shares)

    def _run(self, quantised: np.ndarray, count: int | None = None) -> list[np.ndarray]:
        pictures = self._pictures[:count]
        batch = max(1, PIXELS // (pictures.shape[1] * pictures.shape[2]))
        parts = [
            self._session.run(None, {"pixels": pictures[start : start + batch], "gates": quantised})
            for start in range(0, len(pictures), batch)
        ]
        return [np.concatenate(values) for values in zip(*parts, strict=True)]


def choose_float(
    encoder: GatedEncoder, attempts: Sequence[QuantisedGroup | None], work: Sequence[int], largest: float
) -> tuple[dict[int, float], float]:
    """The groups that stay in float, {index: error with that group alone quantised}, and the error of the others.

    The SUSPECTS with the largest errors of their own are measured, one at a time. Those with the largest error for
    their `work` (multiplications) return to float until the error of all others together is at most `largest`.
    """
    quantised = np.array([attempt is not None for attempt in attempts])
    own = {i: attempt.error for i, attempt in enumerate(attempts) if attempt is not None}
    suspects = sorted(own, key=lambda i: -own[i])
    alone: dict[int, float] = {}
    floats: dict[int, float] = {}
    while (error := encoder.error(quantised)) > largest:
        if not alone:
            for i in suspects[:SUSPECTS]:
                alone[i] = encoder.error(np.arange(len(quantised)) == i, ALONE_PICTURES)
            del suspects[:SUSPECTS]
        excess = (error - largest) / 2  # errors add up unevenly, so half of them is taken away before the next look
        while alone and excess > 0:
            worst = max(alone, key=lambda i: alone[i] / work[i])
            floats[worst] = alone.pop(worst)
            quantised[worst] = False
            excess -= floats[worst]
    return floats, error
