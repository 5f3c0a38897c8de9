"""Rows of embeddings as scikit-learn's estimators get them: scaled to unit length, with rows of zeros found."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError


@contextmanager
def as_iosr_errors() -> Iterator[None]:
    """Raise scikit-learn's ValueErrors as IosrFastError, with their messages."""
    try:
        yield
    except ValueError as error:
        raise IosrFastError(str(error)) from error


def usable_rows(rows: np.ndarray, adapted: bool, use: str) -> np.ndarray:
    """(n,) bool, the rows that have a direction; a warning names the others and says what becomes of them."""
    if adapted and rows.shape[1] % 2:
        raise IosrFastError(
            "expected plain and adapted embeddings side by side, an even number of columns, for adapted=True, "
            f"got {rows.shape[1]}"
        )
    usable: np.ndarray = np.logical_and.reduce([part.any(axis=1) for part in _halves(rows, adapted)])
    zero = np.flatnonzero(~usable)
    if len(zero):
        message = f"{len(zero)} of {len(rows)} rows of X hold zeros only, the first is row {zero[0]}: {use}"
        warnings.warn(message, stacklevel=3)
    return usable


def unit_rows(rows: np.ndarray, adapted: bool) -> Embeddings:
    """Rows (n, D), or plain and adapted ones (n, 2 D), at unit length."""
    return Embeddings(*(unit(part) for part in _halves(rows, adapted)))


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows at unit length, (n, D) float32; zeros stay. The largest channel becomes 1 first: no square overflows."""
    exact = np.array(rows, np.float64, order="C")
    largest = np.abs(exact).max(axis=1, keepdims=True)
    exact /= np.where(largest > 0, largest, 1.0)
    exact /= np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), 1.0)
    return exact.astype(np.float32)


def _halves(rows: np.ndarray, adapted: bool) -> list[np.ndarray]:
    return np.split(rows, 2, axis=1) if adapted else [rows]
