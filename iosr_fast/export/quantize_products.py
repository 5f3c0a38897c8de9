"""The products of an encoder's graph, grouped by the activation that they read, and what quantising them gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from iosr_fast.export.quantize_values import Quantised


@dataclass
class Product:
    """A MatMul or Gemm, x @ W + bias, with a constant W."""

    node: Any
    name: str
    stored: Callable[[], np.ndarray]  # reads the constant, because all at once may take gigabytes
    transposed: bool  # the graph stores W'
    size: int

    @property
    def weight(self) -> np.ndarray:
        """(inputs, outputs) in float32."""
        weight = self.stored()
        return np.asarray(weight.T if self.transposed else weight, np.float32)


@dataclass
class Group:
    """Products that read one activation. `norm`: the LayerNormalization before it, if nothing else reads its output."""

    tensor: str
    products: list[Product] = field(default_factory=list)
    norm: Any | None = None

    @property
    def weight(self) -> np.ndarray:
        """(inputs, outputs of all products)."""
        return np.concatenate([product.weight for product in self.products], axis=1)

    @property
    def size(self) -> int:
        """Of `weight`, without reading it."""
        return sum(product.size for product in self.products)


@dataclass(frozen=True)
class Activation:
    """The values of one tensor (..., channels) on the calibration pictures."""

    rows: np.ndarray  # (about SAMPLED_ROWS, channels) float32: the first token of each picture, and others at random
    low: np.ndarray  # (channels,), over all rows
    high: np.ndarray


@dataclass(frozen=True)
class QuantisedGroup:
    """The activation of a Group divided by `divisor` (channels,) and quantised; its matrices, multiplied by it."""

    activation: Quantised
    weights: list[Quantised]
    divisor: np.ndarray | None
    error: float  # squared, as a share of the outputs' square
