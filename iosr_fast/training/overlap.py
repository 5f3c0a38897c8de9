"""Intra-modal overlap: how far the cosines of same-class and of different-class image pairs overlap."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.ranking import auroc

__all__ = ["auroc", "feature_variance", "overlap_area", "pair_cosines"]

BINS = 200


def pair_cosines(embeddings: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of all pairs i < j: (paired, unpaired), of the same and of different classes. Needs N^2 * 4 bytes.

    `embeddings` (N, D), L2-normalised; `labels` (N,). Raises ValueError if no pair, or every pair, shares a class.
    """
    cosines = embeddings @ embeddings.T
    upper = np.triu(np.ones(cosines.shape, bool), 1)
    same = labels[:, None] == labels[None, :]
    paired, unpaired = cosines[upper & same], cosines[upper & ~same]
    if not len(paired) or not len(unpaired):
        raise IosrFastError(
            f"expected pairs of the same and of different classes, got {len(paired)} and {len(unpaired)} of them"
        )
    return paired, unpaired


def overlap_area(paired: np.ndarray, unpaired: np.ndarray) -> float:
    """The area shared by the two densities, in [0, 1]: sum over bins of min(p, q), with bins over [-1, 1].

    Source: Kravets & Namboodiri, BMVC 2024, section 3 (their intra-modal overlap).
    """
    p, _ = np.histogram(np.clip(paired, -1, 1), bins=BINS, range=(-1, 1))
    q, _ = np.histogram(np.clip(unpaired, -1, 1), bins=BINS, range=(-1, 1))
    return float(np.minimum(p / p.sum(), q / q.sum()).sum())


def feature_variance(embeddings: np.ndarray) -> float:
    """The scatter of unit rows x[i] about their mean m, in [0, N / (N - 1)]: the trace of their covariance,

        sum_i |x[i] - m|^2 / (N - 1) = N / (N - 1) * (1 - |m|^2)

    `embeddings` (N, D), L2-normalised, N >= 2. Near 0 if all rows share a direction, N / (N - 1) if their mean is zero.
    Divided by D it is the mean of the channels' variances. Raises ValueError for fewer than two rows.
    """
    n_rows = len(embeddings)
    if n_rows < 2:
        raise IosrFastError(f"expected at least two embeddings, got {n_rows}")
    exact = np.asarray(embeddings, np.float64)
    return float(((exact - exact.mean(0)) ** 2).sum() / (n_rows - 1))


def plot_overlap(embeddings: dict[str, np.ndarray], labels: np.ndarray, path: str | Path) -> None:
    """Write a PNG with a panel for each encoder: the two histograms of cosines with the shared area filled."""
    from iosr_fast.utils.require import require

    matplotlib = require("matplotlib.figure", "train")
    columns = min(len(embeddings), 3)
    n_rows = -(-len(embeddings) // columns)
    figure = matplotlib.Figure(figsize=(4.5 * columns, 3.2 * n_rows), layout="constrained")
    axes = list(figure.subplots(n_rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    edges = np.linspace(-1, 1, BINS + 1)
    centres = (edges[:-1] + edges[1:]) / 2
    lowest = 1.0
    for i, (axis, (name, rows)) in enumerate(zip(axes, embeddings.items(), strict=False)):
        paired, unpaired = pair_cosines(rows, labels)
        lowest = min(lowest, float(paired.min()), float(unpaired.min()))
        p, q = (np.histogram(part, bins=edges, density=True)[0] for part in (paired, unpaired))
        axis.plot(centres, p, label="same class", color="tab:blue")
        axis.plot(centres, q, label="different classes", color="tab:orange")
        axis.fill_between(centres, np.minimum(p, q), color="tab:red", alpha=0.4, label="overlap")
        axis.set_title(
            f"{name}: area {overlap_area(paired, unpaired):.3f}, AUROC {auroc(paired, unpaired):.3f}", fontsize=10
        )
        if i + columns >= len(embeddings):
            axis.set_xlabel("cosine similarity")
            axis.tick_params(labelbottom=True)
        if i % columns == 0:
            axis.set_ylabel("density")
    for axis in axes[len(embeddings) :]:
        axis.set_axis_off()
    axes[0].set_xlim(max(-1.0, lowest), 1.0)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
