"""Rows of embeddings as support images and queries: which have a direction, their labels, texts and method, checked."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np

from iosr_fast.encoders.encoder import Embeddings, are_usable, unit
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.labels import are_label_sets, dense, read_groups, read_label_sets
from iosr_fast.methods import METHODS, unavailable_reason
from iosr_fast.methods.support_set import SupportSet


class RowLabels(NamedTuple):
    """The labels of n rows for a fit.

    classes    (C,), sorted, of the type that they have in y
    ids        (n,) int64, the class of each row by its position; a row of `sets` where it may have several classes
    sets       (n, C) bool, the classes of each row; None where it has one
    indicator  the dtype of y where that is an indicator (n, C)
    """

    classes: np.ndarray
    ids: np.ndarray
    sets: np.ndarray | None = None
    indicator: np.dtype[Any] | None = None


def read_row_labels(y: Any, n_rows: int) -> RowLabels:
    """Labels (n,) that can be sorted, at least two, or those of `are_label_sets`. Raises IosrFastError."""
    if are_label_sets(y):
        names, sets = read_label_sets(y, n_rows)
        if names is None:
            return RowLabels(np.arange(sets.shape[1]), np.arange(n_rows), sets, dense(y).dtype)
        return RowLabels(np.array(names, str), np.arange(n_rows), sets)
    classes, ids = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise IosrFastError(f"expected labels of at least two classes, got one class: {classes[0]!r}")
    return RowLabels(classes, ids.astype(np.int64))


def usable_rows(rows: np.ndarray, adapted: bool, use: str) -> np.ndarray:
    """(k,) the rows (n, D), or (n, 2 D) with `adapted`, that have a direction; a warning names the others, and says
    what becomes of them (`use`). Raises IosrFastError for an odd number of columns with `adapted`."""
    if adapted and rows.shape[1] % 2:
        raise IosrFastError(
            "expected plain and adapted embeddings side by side, an even number of columns, for adapted=True, "
            f"got {rows.shape[1]}"
        )
    usable = are_usable(rows, adapted)
    if len(zero := np.flatnonzero(~usable)):
        message = f"{len(zero)} of {len(rows)} rows of X hold zeros only, the first is row {zero[0]}: {use}"
        warnings.warn(message, stacklevel=3)
    return np.flatnonzero(usable)


def support_rows(
    rows: np.ndarray, adapted: bool, use: str, groups: Any = None
) -> tuple[np.ndarray, Embeddings, np.ndarray | None]:
    """The positions (k,) of `usable_rows`, their embeddings (k, D), and of `groups` (n,) theirs."""
    kept, group_of = usable_rows(rows, adapted, use), read_groups(groups, len(rows))
    return kept, Embeddings.of_rows(rows[kept], adapted), None if group_of is None else group_of[kept]


def text_rows(text: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Text embeddings (C, D) of this `shape` at unit length, float32. Raises IosrFastError for others, and zeros."""
    if text.shape != shape:
        raise IosrFastError(f"expected text of shape {shape}, (classes in y, channels), got {text.shape}")
    if not text.any(axis=1).all():
        raise IosrFastError(f"expected text rows other than zero, got zeros in row {text.any(axis=1).argmin()}")
    return unit(text)


def check_rows(method: str, support: SupportSet, classes: np.ndarray) -> None:
    """Raise IosrFastError for a class without a row, and a named method that needs more than rows and texts have;
    "auto" takes what there is."""
    if len(empty := np.flatnonzero(support.counts == 0)):
        raise IosrFastError(f"expected a row other than zero for each class, got none of {classes[empty[0]]!r}")
    if method in METHODS and (reason := unavailable_reason(method, support)) is not None:
        fix = "" if support.text is not None else "; give text=, an array (C, D)"
        if METHODS[method].needs_adapter and support.embeddings.adapted is None:
            fix = "; adapted embeddings: expected adapted=True and X of (n, 2 D), got adapted=False"
        raise IosrFastError(f"{reason}{fix}")
