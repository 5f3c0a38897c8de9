"""What several methods ask of embeddings."""

from __future__ import annotations

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.scoring.plan import Which
from iosr_fast.scoring.reducers import Reducer


def image_rows(embeddings: Embeddings, which: Which, reducer: Reducer | None) -> np.ndarray:
    """The embeddings that meet other images, (N, D) float32: plain or adapted, moved by the reducer."""
    rows: np.ndarray = np.asarray(embeddings.plain if which == "plain" else embeddings.adapted, np.float32)
    return rows if reducer is None else reducer(rows)
