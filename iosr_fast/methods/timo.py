"""TIMO, text-image mutual guidance (Li et al., AAAI 2025), with one text a class, and TIMO++."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.gda import discriminant, gda_plan, mean_excess, shrunk_precision
from iosr_fast.methods.method import Method
from iosr_fast.methods.support_set import SupportSet, image_rows
from iosr_fast.scoring.plan import ScoringPlan, Which
from iosr_fast.scoring.reducers import Reducer


def timo(
    support: SupportSet,
    which: Which = "plain",
    reducer: Reducer | None = None,
    alpha: float = 0.1,
    gamma: float = 1.0,
) -> ScoringPlan:
    """GDA's logits with `gamma` copies of w[c] * text[c] among the images of each class c, (B, C).

    w[c] = <m[c], text[c]> with m[c] the unit mean of the images of class c: the text instance is as long as it matches
    its images. The paper takes many texts a class from a language model, weights them by such matches (IGT), and adds
    the gamma best to the images of GDA (TGI, "instance-based transfer"). With one text a class IGT changes nothing,
    and gamma, a real number here, repeats this text; at gamma 0 it is GDA. With one image a class, text and image span
    a covariance, which GDA lacks. x, the images and the texts that join them are plain or adapted (`which`) and
    reduced, in float64. alpha >= 0 and gamma >= 0 have no units; `support` has text and images of each class.

    Raises IosrFastError for values that a plan can't have (ScoringPlan).

    Source: TIMO (Li et al., AAAI 2025, arXiv 2412.11375) and its public code.

    >>> import numpy as np
    >>> from iosr_fast import Embeddings, score
    >>> from iosr_fast.methods.support_set import make_support_set
    >>> images = Embeddings(np.float32([[0.8, 0.6, 0.0], [0.6, 0.0, 0.8]]))
    >>> support = make_support_set(images, labels=np.array([0, 1]), text=np.eye(3)[1:], tau=10.0)
    >>> score(timo(support, alpha=1.0, gamma=2.0), images).round(2)
    array([[10.02, -7.37],
           [-4.28, 14.88]], dtype=float32)
    """
    rows = image_rows(support.embeddings, which, reducer).astype(np.float64)
    sums = np.add.reduceat(rows, support.class_offsets[:-1], axis=0)
    texts = _text_rows(support, reducer)
    means, precision, excess = estimate(support.counts, sums, rows.T @ rows, texts, gamma)
    return gda_plan(means, precision, excess, support.text, support.tau, which, reducer, alpha)


def _text_rows(support: SupportSet, reducer: Reducer | None) -> np.ndarray:
    """The texts as images, (C, D) float64."""
    assert support.text is not None  # guaranteed by compile_method
    return (support.text if reducer is None else reducer(support.text)).astype(np.float64)


def estimate(
    counts: np.ndarray, sums: np.ndarray, second: np.ndarray, texts: np.ndarray, gamma: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class means (C, D), shrunk precision (D, D) and gda.mean_excess (C,) of the images, whose counts (C,), sums
    (C, D) and second moment (D, D) are given, with gamma copies of each text."""
    lengths = np.maximum(np.linalg.norm(sums, axis=1), np.finfo(np.float64).tiny)
    instances = (np.einsum("cd,cd->c", sums, texts) / lengths)[:, None] * texts
    means = (sums + gamma * instances) / (counts + gamma)[:, None]
    weights = counts + gamma
    scatter = second + gamma * instances.T @ instances - (weights[:, None] * means).T @ means
    precision = shrunk_precision((scatter + scatter.T) / 2, float(weights.sum()))
    of_images = second - (sums / counts[:, None]).T @ sums
    return means, precision, mean_excess(counts, of_images, precision, gamma)


def leave_out(
    support: SupportSet, which: Which, reducer: Reducer | None, queries: Embeddings, folds: np.ndarray
) -> Callable[[Mapping[str, float]], np.ndarray]:
    """Method.leave_out: GDA's scores, from the moments of all images minus those of a fold."""
    rows = image_rows(support.embeddings, which, reducer).astype(np.float64)
    asked = rows if queries is support.embeddings else image_rows(queries, which, reducer).astype(np.float64)
    texts, labels, counts = _text_rows(support, reducer), support.labels, support.counts
    sums, second = np.add.reduceat(rows, support.class_offsets[:-1], axis=0), rows.T @ rows

    def predict(setting: Mapping[str, float]) -> np.ndarray:
        scores = np.full((len(rows), support.n_classes), np.nan, np.float32)
        for fold in range(int(folds.max(initial=-1)) + 1):
            out = np.flatnonzero(folds == fold)
            kept_counts, kept_sums = counts.copy(), sums.copy()
            np.subtract.at(kept_counts, labels[out], 1)
            np.subtract.at(kept_sums, labels[out], rows[out])
            kept_second = second - rows[out].T @ rows[out]
            estimates = estimate(kept_counts, kept_sums, kept_second, texts, setting["gamma"])
            linear, bias = discriminant(*estimates)
            scores[out] = asked[out] @ linear.T + bias
        return scores

    return predict


METHOD = Method(
    "timo",
    timo,
    parameters={"alpha": 0.1, "gamma": 1.0},
    scales="linear",
    axes={"gamma": (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)},
    needs_text=True,
    needs_every_class=True,
    leave_out=leave_out,
    multi_label="it takes each image to be of one Gaussian class",
)
