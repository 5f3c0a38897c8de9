"""Overlap of same-class and different-class cosines before and after each way of reducing it."""

from __future__ import annotations

from typing import Any

import numpy as np

from iosr_fast.evaluation.tasks import Source
from iosr_fast.scoring.reducers import fit_reducer
from iosr_fast.training.overlap import auroc, feature_variance, overlap_area, pair_cosines

# Every pair of images counts, so memory and time grow with the square: of more images every n-th is taken.
MAX_IMAGES = 6000


def representations(source: Source) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The source's embeddings as they are, adapted, and after reducers, with their labels. Reducers are fitted without
    labels on the largest support set of the first draw."""
    support = source.draw(max(source.shots), source.seeds[0]).support.embeddings
    rows = np.arange(0, len(source.image_labels), -(-len(source.image_labels) // MAX_IMAGES))
    images = source.images[rows]
    embeddings: dict[str, np.ndarray] = {}
    for name, plain, fitted_on, reducers in (
        ("plain", images.plain, support.plain, ("none", "centre", "pca")),
        ("adapted", images.adapted, support.adapted, ("none", "centre")),
    ):
        if plain is None or fitted_on is None:
            continue
        for reducer in reducers:
            fitted = fit_reducer(reducer, fitted_on)
            embeddings[name if fitted is None else f"{name}, {reducer}"] = plain if fitted is None else fitted(plain)
    return embeddings, source.image_labels[rows]


def overlap_rows(data: str, representations: dict[str, np.ndarray], labels: np.ndarray) -> list[dict[str, Any]]:
    """One row a representation, JSON-ready."""
    rows = []
    for name, embeddings in representations.items():
        pairs = pair_cosines(embeddings, labels)
        rows.append(
            {
                "bench": "overlap",
                "data": data,
                "embeddings": name,
                "overlap_area": overlap_area(*pairs),
                "auroc": auroc(*pairs),
                "feature_variance": feature_variance(embeddings),
                "images": len(labels),
                "classes": len(np.unique(labels)),
            }
        )
    return rows
