"""One Gaussian a class with a shared covariance, estimated on labelled and unlabelled images together, in blocks.

The unlabelled images' log-probabilities (n, C) are in memory once; everything else is of blocks or of (C, D).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from iosr_fast.methods.gda import discriminant, shrunk_precision

# The exponent of an image's first probabilities, lambda of TransCLIP with support images.
ANCHOR = 0.5
# First probabilities below exp(FLOOR) count as this much, so that images can correct a plan that is far too sure.
FLOOR = np.float32(-7.0)
# The share of an unlabelled image's weight in means and covariance to that of a support image. Chosen on validation
# images: with 1, errors of absent classes add up in folders that have a tenth of the classes; below 0.1 little is
# learnt from the folder.
WEIGHT = 0.3
MAX_ROUNDS = 10
_SETTLED = 1e-3  # a round that changes at most this share of the labels is the last
_LEAST = np.float32(-60.0)
_BLOCK = 1 << 22  # logits in memory at a time, 16 MiB


def blocks(n_rows: int, n_classes: int) -> Iterator[slice]:
    """Slices of rows with a bounded number of logits."""
    size = max(1, _BLOCK // n_classes)
    return (slice(first, first + size) for first in range(0, n_rows, size))


@dataclass(frozen=True, eq=False)
class Unlabelled:
    """n images: `rows` (n, D) float32, their first log-probabilities `start` (n, C) float32, and their `weight`."""

    rows: np.ndarray
    start: np.ndarray
    weight: float = WEIGHT

    def blocks(self) -> Iterator[slice]:
        """Slices of the images."""
        return blocks(*self.start.shape)


@dataclass(frozen=True, eq=False)
class Gaussians:
    """log N(x; mu_c, Sigma) = <x, linear[c]> + bias[c] but for a term without c. linear (C, D), bias (C,), float32."""

    linear: np.ndarray
    bias: np.ndarray

    @classmethod
    def of(cls, mass: np.ndarray, sums: np.ndarray, second: np.ndarray) -> Gaussians:
        """From the weight of each class (C,), its weighted sum of rows (C, D), and the weighted sum of x x' (D, D).

        Sigma is the weighted covariance about the class means, plus tr(Sigma) / (n - 1) times the identity for a total
        weight n: the estimator of GDA (gda.shrunk_precision), at the scale of a covariance. Computed in float64.
        """
        means, total = sums / mass[:, None], float(mass.sum())
        precision = shrunk_precision(second - sums.T @ means, total) * ((total - 1) / len(second))
        linear, bias = discriminant(means, precision)
        # A softmax does not see what all classes share, and float32 has more digits for the rest without it.
        return cls((linear - linear.mean(0)).astype(np.float32), (bias - bias.mean()).astype(np.float32))

    def logits(self, images: Unlabelled, rows: slice) -> np.ndarray:
        """log N(x; mu_c, Sigma) + ANCHOR * max(start, FLOOR), (rows, C) float32, but for a term without c."""
        logits: np.ndarray = images.rows[rows] @ self.linear.T
        logits += self.bias
        logits += np.float32(ANCHOR) * np.maximum(images.start[rows], FLOOR)
        return logits


def estimate(rows: np.ndarray, class_offsets: np.ndarray, images: Sequence[Unlabelled]) -> tuple[Gaussians, int]:
    """The Gaussians of C classes, and the number of rounds. Repeats, at most MAX_ROUNDS times,

        mu_c = (sum of class c's support rows + sum_i w_i z_ic x_i) / (n_c + sum_i w_i z_ic)
        Sigma = (sum over support rows of x x' + sum_i w_i x_i x_i' - sum_c m_c mu_c mu_c') / (sum_c m_c - 1)
        z_i = softmax over c of (log N(x_i; mu_c, Sigma) + ANCHOR * max(start_ic, FLOOR)),    first z_i = exp(start_i)

    with w_i an image's weight and m_c the denominator of mu_c. Sigma is then shrunk (Gaussians.of). `rows` (N, D) are
    the support's, sorted by class, at least one each; `class_offsets` (C + 1,). Classes have no proportions, and one
    that is absent keeps the mean of its support images, so an image of any class is found in any folder.

    z, mu and Sigma are the updates of TransCLIP (Zanella et al., NeurIPS 2024, arXiv 2406.01837) without its neighbours
    and with a full Sigma; the n_c support images anchor mu_c as StatA's texts do (Zanella et al., CVPR 2025, arXiv
    2501.03729: mu = beta mu_hat + (1 - beta) mu', beta = m / (m + anchor's weight)).

    >>> rows = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    >>> folder = np.array([[0.8, 0.6], [0.6, 0.8], [0.7, 0.714]], np.float32)
    >>> images = Unlabelled(folder, np.log(np.full((3, 2), 0.5, np.float32)))
    >>> gaussians, rounds = estimate(rows, np.array([0, 1, 2]), [images])
    >>> gaussians.logits(images, slice(None)).argmax(1)
    array([0, 1, 1])
    """
    exact = rows.astype(np.float64)
    counts = np.diff(class_offsets).astype(np.float64)
    support_sums = np.add.reduceat(exact, class_offsets[:-1], axis=0)
    second = exact.T @ exact
    for part in images:
        for block in part.blocks():
            second += part.weight * (part.rows[block].T @ part.rows[block]).astype(np.float64)
    labels = [np.full(len(part.rows), -1, np.int32) for part in images]
    allowed = _SETTLED * sum(map(len, labels))
    gaussians: Gaussians | None = None
    for done in range(MAX_ROUNDS):
        mass, sums, changed = counts.copy(), support_sums.copy(), 0
        for part, known in zip(images, labels, strict=True):
            for block in part.blocks():
                shares = part.start[block].copy() if gaussians is None else gaussians.logits(part, block)
                best = shares.argmax(1)
                changed += int((best != known[block]).sum())
                known[block] = best
                softmax_in_place(shares)
                mass += part.weight * shares.sum(0, dtype=np.float64)
                sums += part.weight * (shares.T @ part.rows[block]).astype(np.float64)
        if gaussians is not None and changed <= allowed:
            return gaussians, done
        gaussians = Gaussians.of(mass, sums, second)
    assert gaussians is not None
    return gaussians, MAX_ROUNDS


def softmax_in_place(logits: np.ndarray) -> None:
    """Row by row, (n, C). No probability is below exp(-60): products with denormal numbers take 100 times as long."""
    logits -= logits.max(1, keepdims=True)
    np.maximum(logits, _LEAST, out=logits)
    np.exp(logits, out=logits)
    logits /= logits.sum(1, keepdims=True)
