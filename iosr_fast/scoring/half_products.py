"""Matrix products of half factors with float32 sums on a GPU, as tensor cores compute them; elsewhere with the same
products in float32."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from iosr_fast.scoring.fields import PlanTerms

ROW_SCALE = 2.0**8  # embeddings have channels of at most 1, and features of a linear term of about 10


def has_half_products(device: torch.device) -> bool:
    """Whether a product of half factors can have a float32 result, without which the precision of sums would be lost:
    on a GPU from PyTorch 2.8 on, and never on a CPU."""
    return device.type == "cuda" and "dtype" in torch.ops.aten.mm.overloads()


def sums_of_products(left: Tensor, right: Tensor) -> Tensor:
    """left (B, K) @ right (K, C), float32, of factors of one type."""
    if left.dtype != torch.float32 and has_half_products(left.device):
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left.float(), right.float())


def query_type(plan: PlanTerms) -> torch.dtype:
    """What queries are rounded to before they meet the keys: the keys' type, float16 for int8."""
    dtype: torch.dtype = plan.keys.dtype
    return torch.float16 if dtype == torch.int8 else dtype


def padded(rows: Tensor) -> Tensor:
    """The rows, or a copy with zeros to a multiple of 16 bytes if they don't begin and end at one."""
    missing = -rows.shape[1] % (16 // rows.element_size())
    if missing:
        return torch.nn.functional.pad(rows, (0, missing))
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()


def halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    """float32 rows of magnitudes below 2**15 as two float16 parts, whose sum has 22 of their 24 bits.

    >>> high, low = halves(torch.tensor([1000.1]))
    >>> (high.double() + low.double()).item().__round__(4)
    1000.1
    """
    high = rows.half()
    return high, (rows - high.float()).half()


def matrix_parts(matrix: Tensor) -> tuple[Tensor, float]:
    """A matrix (C, K) for `add_split_product`: [high, high, low] (C, 3 K) float16 and its scale, a power of two."""
    largest = float(matrix.abs().max())
    scale = 2.0 ** (10 - math.frexp(max(largest, 2.0**-100))[1])
    high, low = halves(matrix * scale)
    return torch.cat([high, high, low], dim=1), scale


def add_split_product(rows: Tensor, parts: tuple[Tensor, float], factor: float, logits: Tensor) -> None:
    """logits (B, C) += factor * rows (B, K) @ matrix', of `parts` = matrix_parts(matrix), in one product of halves.

    (h + l) (H + L) = h H + l H + h L but for l L, which is 2**-22 of it: as exact as float32 (Ootomo & Yokota, 2022),
    and on tensor cores, which PyTorch takes for no float32 product by default.
    """
    matrix, scale = parts
    high, low = halves(rows.float() * ROW_SCALE)
    products = sums_of_products(torch.cat([high, low, high], dim=1), matrix.T)
    logits.add_(products, alpha=factor / (scale * ROW_SCALE))
