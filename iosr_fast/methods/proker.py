"""ProKeR, proximal kernel ridge regression (Bendou et al., CVPR 2025, section 4), and ProKeR++."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.kernel_ridge import KernelRidge, class_ridge, kernel_matrix, regress_labels
from iosr_fast.methods.method import Method
from iosr_fast.methods.multi_label_set import KeyTerm, MultiLabelSet
from iosr_fast.methods.support_set import SupportSet, image_rows
from iosr_fast.scoring.plan import ScoringPlan, Which
from iosr_fast.scoring.reducers import Reducer


def proker(
    support: SupportSet,
    which: Which = "plain",
    reducer: Reducer | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    ridge: float = 3.0,
) -> ScoringPlan:
    """logits[b, c] = tau * (<plain[b], text[c]> + alpha * sum_j k(x[b], key[j]) V[j, c]), (B, C)

    with k(x, y) = exp(-beta (1 - <x, y>)), x (B, D) and the keys (N, D) plain or adapted (`which`) and reduced, and
    V = (K + ridge * W^-1)^-1 (Y - F): ridge regression, in the kernel's space, of the one-hot labels Y minus the
    zero-shot cosines F = <plain key, text> (0 without text). W = diag(SupportSet.key_weights), so that a class with
    more images than others does not get their queries; with classes of one size it is the paper's I. alpha = 1 is the
    paper's closed form; the public code's solution is `ridge` times that, which alpha can express. alpha, beta and
    ridge have no units; ridge > 0. Solved in float64, at N^3 operations.

    Raises IosrFastError for values that a plan can't have (ScoringPlan).

    Source: ProKeR (Bendou et al., CVPR 2025, section 4).

    >>> import numpy as np
    >>> from iosr_fast import Embeddings, score
    >>> from iosr_fast.methods.support_set import make_support_set
    >>> images = Embeddings(np.eye(4, dtype=np.float32)[:3])
    >>> support = make_support_set(images, labels=np.array([0, 0, 1]), text=np.eye(2, 4), tau=10.0)
    >>> score(proker(support, alpha=1.0, beta=1.0, ridge=0.5), images).round(2)
    array([[10.73,  0.  ],
           [ 6.31,  4.42],
           [ 0.73,  5.58]], dtype=float32)
    """
    keys = image_rows(support.embeddings, which, reducer)
    kernel = kernel_matrix(keys, keys, beta)
    kernel[np.diag_indices(len(keys))] += class_ridge(ridge, support)
    return ScoringPlan(
        n_classes=support.n_classes,
        text=support.text,
        tau=support.tau,
        keys=keys,
        values=np.linalg.solve(kernel, residual(support)),
        query=which,
        reducer=reducer,
        alpha=alpha * support.tau,
        beta=beta,
    )


def residual(support: SupportSet) -> np.ndarray:
    """Y - F, (N, C) float64: one-hot labels minus the zero-shot cosines (0 without text)."""
    labels = np.eye(support.n_classes)[support.labels]
    return labels if support.text is None else labels - support.embeddings.plain @ support.text.T


def leave_out(
    support: SupportSet, which: Which, reducer: Reducer | None, queries: Embeddings, folds: np.ndarray
) -> Callable[[Mapping[str, float]], np.ndarray]:
    """Method.leave_out: tau times the ridge regression's prediction, (N, C) float32, for each support image."""
    keys = image_rows(support.embeddings, which, reducer)
    rows = None if queries is support.embeddings else image_rows(queries, which, reducer)
    target = residual(support)

    @lru_cache(maxsize=1)  # a search varies ridge before beta
    def kernels(beta: float) -> tuple[np.ndarray, np.ndarray | None]:
        return kernel_matrix(keys, keys, beta), None if rows is None else kernel_matrix(rows, keys, beta)

    def predict(setting: Mapping[str, float]) -> np.ndarray:
        kernel, query_kernel = kernels(setting["beta"])
        model = KernelRidge(kernel, target, class_ridge(setting["ridge"], support))
        predicted = model.without_folds(folds, query_kernel)
        return (support.tau * predicted).astype(np.float32)

    return predict


def multi_label(images: MultiLabelSet, which: Which, setting: Mapping[str, float]) -> dict[str, KeyTerm]:
    """Method.multi_label: tau times the regression of labels minus their shares minus zero-shot cosines."""
    term = regress_labels(images, which, setting["beta"], setting["ridge"], texts=1.0)
    return {"alpha": KeyTerm(images.tau * term.values, images.tau * term.left_out)}


METHOD = Method(
    "proker",
    proker,
    parameters={"alpha": 1.0, "beta": 1.0, "ridge": 3.0},
    scales="cache",
    axes={"beta": (0.3, 1.0, 3.0, 10.0), "ridge": (0.003, 0.03, 0.3, 3.0)},
    max_support=8192,  # the (N, N) system takes minutes beyond this
    leave_out=leave_out,
    stack_part="regression",
    multi_label=multi_label,
)
