"""ProKeR, proximal kernel ridge regression (Bendou et al., CVPR 2025, section 4), and ProKeR++."""

from __future__ import annotations

import numpy as np

from iosr_fast.methods.support_set import SupportSet, image_rows
from iosr_fast.scoring.plan import ScoringPlan, Which
from iosr_fast.scoring.reducers import Reducer

# Kernel ridge solves an (N, N) system and keeps (N, C) values: beyond this it is neither seconds nor small.
LARGEST = 8192


def proker(
    support: SupportSet,
    which: Which = "plain",
    reducer: Reducer | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    ridge: float = 3.0,
) -> ScoringPlan:
    """logits[b, c] = tau * (<plain[b], text[c]> + alpha * sum_j k(x[b], key[j]) V[j, c])

    with k(x, y) = exp(-beta (1 - <x, y>)) and
    V = (K + ridge * I)^-1 (Y - F): ridge regression, in the kernel's space, of what the one-hot labels Y are beyond the
    zero-shot cosines F = <plain key, text> (0 without text). alpha = 1 is the paper's closed form; the public code's
    solution is `ridge` times that, which alpha can express. Raises ValueError for more than 8,192 images.
    """
    n_keys = len(support.embeddings)
    if n_keys > LARGEST:
        raise ValueError(f"proker solves an (N, N) system: expected at most {LARGEST} support images, got {n_keys}")
    keys = image_rows(support.embeddings, which, reducer)
    exact = keys.astype(np.float64)
    kernel = np.exp(-beta * (1.0 - exact @ exact.T))
    kernel[np.diag_indices(n_keys)] += ridge
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
    """Y - F, (N, C) float64."""
    labels = np.eye(support.n_classes)[support.labels]
    return labels if support.text is None else labels - support.embeddings.plain @ support.text.T
