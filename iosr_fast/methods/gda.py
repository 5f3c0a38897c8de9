"""GDA, Gaussian discriminant analysis (Wang et al., ICLR 2024, equations 4 to 8), and GDA++ with adapted embeddings."""

from __future__ import annotations

import numpy as np

from iosr_fast.cache import SupportSet
from iosr_fast.methods.rows import image_rows
from iosr_fast.reducers import Reducer
from iosr_fast.scoring import ScoringPlan, Which


def gda(support: SupportSet, which: Which = "plain", reducer: Reducer | None = None, alpha: float = 0.1) -> ScoringPlan:
    """logits[b, c] = tau <plain[b], text[c]> + alpha * (<x[b], P mu_c> + log(1 / C) - mu_c' P mu_c / 2).

    mu_c is the mean of class c; P = D * inv((N - 1) Sigma + tr(Sigma) I) the shrunk precision of all N images about
    their class means (Kubokawa & Srivastava's estimator), Sigma their covariance. Where each class has one image,
    Sigma is 0 and P = I: the nearest mean.
    """
    means, precision = moments(image_rows(support.embeddings, which, reducer).astype(np.float64), support.class_offsets)
    linear = means @ precision
    bias = -np.log(support.n_classes) - 0.5 * np.einsum("cd,cd->c", linear, means)
    return ScoringPlan(
        n_classes=support.n_classes,
        text=support.text,
        tau=support.tau,
        linear=alpha * linear,
        bias=alpha * bias,
        feature=which,
        reducer=reducer,
    )


def moments(rows: np.ndarray, class_offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Class means (C, D) and the shrunk precision P (D, D), float64, of rows (N, D) sorted by class."""
    counts = np.diff(class_offsets)
    means = np.add.reduceat(rows, class_offsets[:-1], axis=0) / counts[:, None]
    centred = rows - np.repeat(means, counts, axis=0)
    scatter = centred.T @ centred
    width, n_rows = rows.shape[1], len(rows)
    trace = np.trace(scatter)
    if trace <= n_rows * np.finfo(np.float32).eps:
        return means, np.eye(width)
    precision = width * np.linalg.inv(scatter + trace / (n_rows - 1) * np.eye(width))
    return means, (precision + precision.T) / 2
