"""The reducer "isoclip": the directions in which a CLIP's projections treat images and texts alike (IsoCLIP)."""

from __future__ import annotations

import numpy as np

from iosr_fast.encoders.projections import Projections
from iosr_fast.exceptions import IosrFastError
from iosr_fast.scoring.reducers import ISOCLIP, Reducer, check_reducer

# Shares of the directions that are removed (top, bottom), by their number: none, and the paper's for four CLIPs,
# ViT-B/16 of OpenCLIP, ViT-B/32 (which serves where nothing can be left out), ViT-B/16 and ViT-L/14 of OpenAI.
SHARES = ((0.0, 0.0), (100 / 512, 100 / 512), (150 / 512, 50 / 512), (200 / 512, 50 / 512), (250 / 768, 200 / 768))
_DEFAULT = SHARES[2]


def check_projections(name: str | None, projections: Projections | None) -> None:
    """Raise IosrFastError if the reducer `name` needs projections and there are none."""
    if name is not None and projections is None and check_reducer(name)[0] == ISOCLIP:
        raise IosrFastError(
            f"the reducer {name!r} needs the image and the text projection of the CLIP, got neither: bare embeddings, "
            "an image encoder without a linear projection (SigLIP) and an engine of an earlier version have none; use "
            "'centre' or 'pca', or build the engine again"
        )


def fit_isoclip(name: str, rows: np.ndarray, labels: np.ndarray, projections: Projections | None) -> Reducer:
    """The reducer unit(M x), which keeps the middle of the singular directions of the inter-modal operator.

    With W_i (D, d_i) and W_t (D, d_t) the projections and U S V' the singular value decomposition of W_i' W_t (d_i,
    d_t), the paper replaces W_i by W_i U_k U_k', U_k being U without the columns of the largest and of the smallest
    singular values. U lies in the row space of W_i, so this is M = W_i U_k U_k' pinv(W_i) on the embedding itself, and
    features before the projection are not needed.

    "isoclip:150,50" removes the 150 largest and the 50 smallest of them. "isoclip" chooses among SHARES by the number
    of rows (N, D) that the nearest mean of the other images of a class, by `labels` (N,), classifies correctly, each
    left out of its own mean; of equal ones the first.

    Raises IosrFastError without projections, for another width, and if no direction would be left.
    Source: IsoCLIP (Magistri et al., CVPR 2026, arXiv 2603.19862) and its public code.

    >>> projections = Projections(image=np.eye(3), text=np.diag([4.0, 2.0, 1.0]))
    >>> fit_isoclip("isoclip:1,1", np.eye(3), np.arange(3), projections)(np.array([[0.6, 0.0, 0.8], [0.0, 0.6, 0.8]]))
    array([[0., 0., 0.],
           [0., 1., 0.]], dtype=float32)
    """
    check_projections(name, projections)
    assert projections is not None
    numbers = check_reducer(name)[1]
    image, text = (part.astype(np.float64) for part in projections)
    if len(rows) and rows.shape[1] != len(image):
        raise IosrFastError(f"expected projections to the embeddings' {rows.shape[1]} channels, got {len(image)}")
    left, values, _ = np.linalg.svd(image.T @ text, full_matrices=False)
    rank = int((values > values[0] * max(image.shape) * np.finfo(np.float32).eps).sum())
    into, back = image @ left, left.T @ np.linalg.pinv(image)

    def middle(top: int, bottom: int) -> Reducer:
        if top + bottom >= rank:
            raise IosrFastError(f"expected fewer than the {rank} directions of this CLIP to remove, got {top}+{bottom}")
        return Reducer(projection=into[:, top : rank - bottom] @ back[top : rank - bottom])

    if numbers:
        return middle(*numbers)
    shares = SHARES if np.bincount(labels, minlength=1).max() > 1 else (_DEFAULT,)
    candidates = [middle(int(top * rank), int(bottom * rank)) for top, bottom in shares]
    return max(candidates, key=lambda reducer: _nearest_mean_right(reducer(rows), labels))


def _nearest_mean_right(rows: np.ndarray, labels: np.ndarray) -> int:
    """The number of rows (N, D) that are closest, by cosine, to the mean of the other rows of their own class."""
    sums = np.zeros((int(labels.max()) + 1, rows.shape[1]))
    np.add.at(sums, labels, rows)
    others = sums[labels] - rows
    scores = rows @ _unit(sums).T
    scores[np.arange(len(rows)), labels] = -np.inf
    own = np.einsum("nd,nd->n", rows, _unit(others))
    own[~others.any(1)] = -np.inf  # alone in its class
    return int((own > scores.max(1)).sum())


def _unit(rows: np.ndarray) -> np.ndarray:
    unit: np.ndarray = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return unit
