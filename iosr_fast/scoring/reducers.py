"""Overlap reducers without training: they move image embeddings so that different classes lie further apart.

A reducer applies to embeddings that are compared with images (keys, queries, features of a linear term), never to
those compared with text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from iosr_fast.encoders.encoder import Array
from iosr_fast.exceptions import IosrFastError
from iosr_fast.scoring.arrays import AddProduct, add_product_blas, module_of, product
from iosr_fast.scoring.validation import check_size, frozen

REDUCERS = ("none", "centre", "pca")
NAME = r"none|centre|pca(:[1-9][0-9]{0,5})?"
# The share of principal components that "pca" keeps, out of min(D, N).
PCA_SHARE = 0.5
_TINY = 1e-12


def reduce_rows(rows: Array, shift: Array | None, projection: Array | None, add_product: AddProduct) -> Array:
    """unit(projection @ (row - shift)) of rows (B, D) float32; a row that is mapped to zero stays zero."""
    moved = rows if shift is None else rows - shift
    if projection is not None:
        moved = moved * projection if projection.ndim == 1 else product(moved, projection, add_product)
    norms = module_of(moved).sqrt((moved * moved).sum(axis=1, keepdims=True))
    return moved / norms.clip(_TINY)


@dataclass(frozen=True, eq=False)
class Reducer:
    """reduced = unit(projection @ (embedding - shift)), row by row.

    shift       (D,) float32 or None
    projection  (D, D) float32, or (D,) for a diagonal one, or None

    Both are made C-contiguous and read-only. Raises IosrFastError if a shape is wrong or a value isn't finite or too
    large.

    >>> import numpy as np
    >>> reducer = Reducer(shift=np.array([0.6, 0.0]))
    >>> reducer(np.array([[1.0, 0.0], [0.6, 0.8]]))  # unit rows again
    array([[1., 0.],
           [0., 1.]], dtype=float32)
    """

    shift: np.ndarray | None = None
    projection: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("shift", "projection"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, frozen(name, value, np.float32))
                # A larger shift would lose unit rows to rounding; a larger projection might overflow squared norms.
                if name == "shift":
                    check_size(name, getattr(self, name), 10.0, "the rows that it shifts have unit norm")
                else:
                    check_size(name, getattr(self, name), 1e6, "scale it down: the reduced rows are normalised")
        if self.shift is None and self.projection is None:
            raise IosrFastError("expected a reducer with a shift or a projection, got neither; leave the reducer out")
        if self.shift is not None and self.shift.ndim != 1:
            raise IosrFastError(f"expected a shift of shape (D,), got {self.shift.shape}")
        shape = () if self.projection is None else self.projection.shape
        if len(shape) > 2 or len(set(shape)) > 1 or (self.shift is not None and shape and shape[0] != len(self.shift)):
            width = "D" if self.shift is None else len(self.shift)
            raise IosrFastError(f"expected a projection of shape ({width}, {width}) or ({width},), got {shape}")

    @property
    def width(self) -> int:
        """D."""
        array = self.projection if self.shift is None else self.shift
        assert array is not None
        return len(array)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Rows (B, D) to (B, D) float32 unit rows; a row that is mapped to zero stays zero."""
        unit: np.ndarray = reduce_rows(np.asarray(rows, np.float32), self.shift, self.projection, add_product_blas)
        return unit

    def then(self, channels: np.ndarray) -> Reducer:
        """This reducer followed by the diagonal projection `channels` (D,): the norm between the two cancels."""
        if self.projection is None:
            return Reducer(self.shift, channels)
        outer = channels if self.projection.ndim == 1 else channels[:, None]
        return Reducer(self.shift, outer * self.projection)


def check_reducer(name: str) -> tuple[str, int | None]:
    """A reducer's kind and the number in its name. Raises IosrFastError for an unknown name.

    >>> check_reducer("pca:64"), check_reducer("centre")
    (('pca', 64), ('centre', None))
    """
    if re.fullmatch(NAME, name) is None:
        raise IosrFastError(f"expected a reducer of {', '.join(REDUCERS)} or pca:NUMBER, got {name!r}")
    kind, _, number = name.partition(":")
    return kind, int(number) if number else None


def fit_reducer(name: str, rows: np.ndarray) -> Reducer | None:
    """The reducer of a support set's embeddings, `rows` (N, D). It doesn't depend on labels.

    "none"     None: the embeddings as they are
    "centre"   unit(x - mean)
    "pca"      unit(P (x - mean)), P the projection on the leading principal components: half of the D channels, or of
               the N rows; "pca:64" keeps 64

    Raises IosrFastError for an unknown name, no rows, or more components than there are channels.
    Source: mean-centring and PCA against intra-modal overlap, arXiv 2603.16100.

    >>> import numpy as np
    >>> reducer = fit_reducer("centre", np.array([[0.6, 0.8], [0.6, -0.8]]))
    >>> reducer.shift
    array([0.6, 0. ], dtype=float32)
    """
    kind, rank = check_reducer(name)
    if kind == "none":
        return None
    if not len(rows):
        raise IosrFastError(f"expected support images to fit the reducer {name!r} on, got none; use 'none'")
    n_rows, width = rows.shape
    exact = rows.astype(np.float64)
    mean = exact.mean(0)
    if kind == "centre":
        return Reducer(mean)
    if rank is None:
        rank = max(1, round(PCA_SHARE * min(width, n_rows)))
    if rank > width:
        raise IosrFastError(f"expected at most {width} principal components, one a channel, got {rank}")
    components = np.linalg.svd(exact - mean, full_matrices=False)[2][:rank]
    return Reducer(mean, components.T @ components)
