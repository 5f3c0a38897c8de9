"""GDA, Gaussian discriminant analysis (Wang et al., ICLR 2024, equations 4 to 8), and GDA++ with adapted embeddings."""

from __future__ import annotations

import numpy as np

from iosr_fast.methods.method import Method
from iosr_fast.methods.support_set import SupportSet, image_rows
from iosr_fast.scoring.plan import ScoringPlan, Which
from iosr_fast.scoring.reducers import Reducer


def gda(support: SupportSet, which: Which = "plain", reducer: Reducer | None = None, alpha: float = 0.1) -> ScoringPlan:
    """logits[b, c] = tau <plain[b], text[c]> + alpha * (<x[b], P mu_c> + log(1 / C) - mu_c' P mu_c / 2), (B, C).

    x (B, D) are the plain or the adapted embeddings (`which`), after the reducer; each class has at least one image.
    mu_c is the mean of class c; P = D * inv((N - 1) Sigma + tr(Sigma) I) the shrunk precision of all N images about
    their class means (Kubokawa & Srivastava's estimator), Sigma their covariance. If each class has one image, Sigma
    is 0 and P = I: the nearest mean. Computed in float64. Without text the first term is left out. alpha >= 0 has no
    unit.

    Raises IosrFastError for values that a plan can't have (ScoringPlan).

    Source: GDA (Wang et al., ICLR 2024, equations 4 to 8).

    >>> import numpy as np
    >>> from iosr_fast import Embeddings, score
    >>> from iosr_fast.methods.support_set import make_support_set
    >>> images = Embeddings(np.eye(4, dtype=np.float32)[:3])
    >>> support = make_support_set(images, labels=np.array([0, 0, 1]), text=np.eye(2, 4), tau=10.0)
    >>> score(gda(support, alpha=1.0), images).round(2)
    array([[11.31, -4.69],
           [ 1.31,  5.31],
           [-2.69,  3.31]], dtype=float32)
    """
    rows = image_rows(support.embeddings, which, reducer).astype(np.float64)
    counts = support.counts
    means = np.add.reduceat(rows, support.class_offsets[:-1], axis=0) / counts[:, None]
    centred = rows - np.repeat(means, counts, axis=0)
    precision = shrunk_precision(centred.T @ centred, len(rows))
    return gda_plan(means, precision, support.text, support.tau, which, reducer, alpha)


def gda_plan(
    means: np.ndarray,
    precision: np.ndarray,
    text: np.ndarray | None,
    tau: float,
    which: Which,
    reducer: Reducer | None,
    alpha: float,
) -> ScoringPlan:
    """`gda` from class means (C, D) and the shrunk precision P (D, D), float64."""
    linear, bias = discriminant(means, precision)
    return ScoringPlan(
        n_classes=len(means),
        text=text,
        tau=tau,
        linear=alpha * linear,
        bias=alpha * bias,
        feature=which,
        reducer=reducer,
    )


def discriminant(means: np.ndarray, precision: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """P mu_c, (C, D), and log(1 / C) - mu_c' P mu_c / 2, (C,): each class's score is linear in the embedding."""
    linear = means @ precision
    return linear, -np.log(len(means)) - 0.5 * np.einsum("cd,cd->c", linear, means)


def shrunk_precision(scatter: np.ndarray, n_rows: float) -> np.ndarray:
    """P (D, D), float64, of the scatter (D, D) of n_rows images about their class means; I if the scatter is zero.

    P = D * inv(scatter + tr(scatter) / (n_rows - 1) * I), as scatter = (n_rows - 1) Sigma.

    >>> shrunk_precision(np.diag([2.0, 0.0]), n_rows=3)
    array([[0.66666667, 0.        ],
           [0.        , 2.        ]])
    """
    width = len(scatter)
    trace = np.trace(scatter)
    if trace <= n_rows * np.finfo(np.float32).eps:
        return np.eye(width)
    precision = width * np.linalg.inv(scatter + trace / (n_rows - 1) * np.eye(width))
    symmetric: np.ndarray = (precision + precision.T) / 2
    return symmetric


METHOD = Method(
    "gda",
    gda,
    parameters={"alpha": 0.1},
    scales="linear",
    needs_every_class=True,
    by_moments=True,
    stack_part="discriminant",
    multi_label="it takes each image to be of one Gaussian class",
)
