"""The outputs of the frozen stem in memory, computed once for each view of each picture."""

from __future__ import annotations

import math

import torch

from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.machine import usable_memory


class ActivationCache:
    """float16 rows of `shape` = (2, tokens, width), the stem's two outputs, for `count` pictures in `views` views each.
    Each process has its own. Raises IosrFastError where they exceed the memory, before any work."""

    def __init__(self, count: int, views: int, shape: tuple[int, int, int]) -> None:
        needed, memory = 2 * count * views * math.prod(shape), usable_memory()
        if needed > memory:
            raise IosrFastError(
                f"expected outputs of the frozen blocks that fit the memory, {memory / 1e9:,.1f} GB, got "
                f"{needed / 1e9:,.1f} GB of {count:,} pictures; cache fewer views, or none"
            )
        self._rows: dict[tuple[int, int], torch.Tensor] = {}

    def contains(self, rows: torch.Tensor, view: int) -> bool:
        """Whether all rows (B,) are cached in this view."""
        return all((row, view) in self._rows for row in rows.tolist())

    def read(self, rows: torch.Tensor, view: int) -> torch.Tensor:
        """(2, B, tokens, width) float16 on the CPU of rows that are cached."""
        return torch.stack([self._rows[row, view] for row in rows.tolist()], dim=1)

    def write(self, rows: torch.Tensor, view: int, outputs: torch.Tensor) -> torch.Tensor:
        """Round the outputs (2, B, tokens, width) to float16 and keep them; returns them as `read` does.

        Raises IosrFastError for numbers beyond float16, which ends at 65,504.
        """
        rounded = outputs.detach().half().cpu()
        if not bool(rounded.isfinite().all()):
            raise IosrFastError(
                f"expected outputs of the stem that are finite in float16, got up to {float(outputs.abs().max()):g}; "
                "train without cached views"
            )
        for i, row in enumerate(rows.tolist()):
            self._rows[row, view] = rounded[:, i].clone()
        return rounded
