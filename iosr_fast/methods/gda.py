"""GDA, Gaussian discriminant analysis (Wang et al., ICLR 2024, equations 4 to 8), and GDA++ with adapted embeddings."""

from __future__ import annotations

import numpy as np

from iosr_fast.methods.method import Method
from iosr_fast.methods.support_set import SupportSet, image_rows
from iosr_fast.scoring.plan import ScoringPlan, Which
from iosr_fast.scoring.reducers import Reducer


def gda(support: SupportSet, which: Which = "plain", reducer: Reducer | None = None, alpha: float = 0.1) -> ScoringPlan:
    """logits[b, c] = tau <plain[b], text[c]> + alpha * G(x[b], c), (B, C),

    G(x, c) = <x, P mu_c> + log(1 / C) - (mu_c' P mu_c - e_c) / 2.

    x (B, D) are the plain or the adapted embeddings (`which`), after the reducer; each class has at least one image.
    mu_c is the mean of class c; P = D * inv((N - 1) Sigma + tr(Sigma) I) the shrunk precision of all N images about
    their class means (Kubokawa & Srivastava's estimator), Sigma their covariance. If each class has one image, Sigma
    is 0 and P = I: the nearest mean. Computed in float64. Without text the first term is left out. alpha >= 0 has no
    unit. e_c (`mean_excess`) is 0 where classes are equally large, as in the paper: the noise of a mean of few images
    adds to mu_c' P mu_c, so that without it small classes lose images to large ones.

    Raises IosrFastError for values that a plan can't have (ScoringPlan).

    Source: GDA (Wang et al., ICLR 2024, equations 4 to 8); e_c as in Moran & Murphy (Applied Statistics 28, 1979).

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
    scatter = centred.T @ centred
    precision = shrunk_precision(scatter, len(rows))
    excess = mean_excess(counts, scatter, precision)
    return gda_plan(means, precision, excess, support.text, support.tau, which, reducer, alpha)


def gda_plan(
    means: np.ndarray,
    precision: np.ndarray,
    excess: np.ndarray,
    text: np.ndarray | None,
    tau: float,
    which: Which,
    reducer: Reducer | None,
    alpha: float,
) -> ScoringPlan:
    """`gda` from class means (C, D), the shrunk precision P (D, D) and e (C,), float64."""
    linear, bias = discriminant(means, precision, excess)
    return ScoringPlan(
        n_classes=len(means),
        text=text,
        tau=tau,
        linear=alpha * linear,
        bias=alpha * bias,
        feature=which,
        reducer=reducer,
    )


def discriminant(
    means: np.ndarray, precision: np.ndarray, excess: np.ndarray | float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """P mu_c, (C, D), and log(1 / C) - (mu_c' P mu_c - e_c) / 2, (C,): each class's score is linear in the
    embedding."""
    linear = means @ precision
    return linear, -np.log(len(means)) - 0.5 * (np.einsum("cd,cd->c", linear, means) - excess)


def mean_excess(counts: np.ndarray, scatter: np.ndarray, precision: np.ndarray, copies: float = 0.0) -> np.ndarray:
    """e (C,): how much more the noise of its mean adds to mu_c' P mu_c than to that of a largest class, float64.

        E[mu' P mu] = m' P m + tr(P S) n / (n + copies)^2,  S = scatter / (N - C),

    for the mean mu of n images with expectation m and covariance S, and of `copies` rows without noise. counts (C,),
    their sum N, scatter (D, D) of the images about their class means, P (D, D). 0 if N = C: nothing is known of noise.

    >>> mean_excess(np.array([1, 4, 4]), np.diag([6.0, 0.0]), np.eye(2)).tolist()
    [0.75, 0.0, 0.0]
    """
    free = counts.sum() - len(counts)
    shares = counts / (counts + copies) ** 2
    noise = np.sum(precision * scatter) / free if free > 0 else 0.0
    excess: np.ndarray = noise * (shares - shares[np.argmax(counts)])
    return excess


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
