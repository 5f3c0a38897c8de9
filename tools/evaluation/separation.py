"""Overlap of same-class and different-class cosines before and after each way of reducing it."""

from __future__ import annotations

from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.scoring.reducers import fit_reducer
from iosr_fast.training.overlap import auroc, feature_variance, overlap_area, pair_cosines
from tools.evaluation.tasks import Source

# Every pair of images counts, so that memory and time grow with the square: of more images, every n-th is taken.
MOST_IMAGES = 6000


def representations(images: Embeddings, support: Embeddings) -> dict[str, np.ndarray]:
    """The embeddings of `images` as they are, adapted, and moved by reducers fitted on `support` without labels."""
    made: dict[str, np.ndarray] = {}
    for name, rows, fitted_on, reducers in (
        ("plain", images.plain, support.plain, ("none", "centre", "pca")),
        ("adapted", images.adapted, support.adapted, ("none", "centre")),
    ):
        if rows is None or fitted_on is None:
            continue
        for reducer in reducers:
            fitted = fit_reducer(reducer, fitted_on)
            made[name if fitted is None else f"{name}, {reducer}"] = rows if fitted is None else fitted(rows)
    return made


def of_source(source: Source) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Representations of the source's images, with labels; reducers see the largest support set of the first draw."""
    support = source.draw(max(source.shots), source.seeds[0]).support
    step = -(-len(source.image_labels) // MOST_IMAGES)
    rows = np.arange(0, len(source.image_labels), step)
    return representations(source.images[rows], support.embeddings), source.image_labels[rows]


def separation_rows(name: str, made: dict[str, np.ndarray], labels: np.ndarray) -> list[dict[str, Any]]:
    """One row a representation, JSON-ready."""
    rows = []
    for representation, embeddings in made.items():
        pairs = pair_cosines(embeddings, labels)
        rows.append(
            {
                "bench": "overlap",
                "data": name,
                "embeddings": representation,
                "overlap_area": overlap_area(*pairs),
                "auroc": auroc(*pairs),
                "feature_variance": feature_variance(embeddings),
                "images": len(labels),
                "classes": len(np.unique(labels)),
            }
        )
    return rows
