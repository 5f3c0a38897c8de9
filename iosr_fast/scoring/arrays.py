"""What `lower` needs of NumPy arrays and torch tensors alike."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Array

# rows (B, K), matrix (C, K), factor, logits (B, C): logits += factor * rows @ matrix', in place and in float32.
AddProduct = Callable[[Array, Array, float, Array], None]


def module_of(array: Array) -> Any:
    """numpy or torch, of which only functions are used that both have, with the same arguments."""
    return np if isinstance(array, np.ndarray) else sys.modules["torch"]


def as_float32(rows: Array) -> Array:
    """Rows in float32; themselves if they are."""
    return np.asarray(rows, np.float32) if isinstance(rows, np.ndarray) else rows.float()


def empty(rows: Array, width: int) -> Array:
    """Uninitialised float32 (len(rows), width), where `rows` are."""
    if isinstance(rows, np.ndarray):
        return np.empty((len(rows), width), np.float32)
    return rows.new_empty((len(rows), width), dtype=module_of(rows).float32)


def product(rows: Array, matrix: Array, add_product: AddProduct) -> Array:
    """rows (B, K) @ matrix (C, K)': (B, C) float32."""
    result = empty(rows, len(matrix))
    result[:] = 0.0
    add_product(rows, matrix, 1.0, result)
    return result


def add_product_blas(rows: np.ndarray, matrix: np.ndarray, factor: float, logits: np.ndarray) -> None:
    """AddProduct by NumPy. On some processors a row's bits depend on its place among the others."""
    logits += np.float32(factor) * (rows @ matrix.T)
