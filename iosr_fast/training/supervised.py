"""The supervised objective: cross entropy of a linear head on the un-normalised adapted embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from iosr_fast.clip.adapter import Adapter
from iosr_fast.training.adapted_encoder import AdaptedEncoder
from iosr_fast.training.augment import augment_batch

Stem = tuple[torch.Tensor, torch.Tensor]
Reduce = Callable[[torch.Tensor], torch.Tensor]


class Supervised(nn.Module):
    """Cross entropy of head(tail(adapter, stem)) against the labels (the paper's supervised variant).

    Supervised and Dino are the objectives of the training loop. `views` turns pictures (B, 3, S, S) in [0, 1] into the
    batches for the frozen stem. Calling the module on the stem's outputs returns the sum of the losses over the B
    pictures and the number of them that `metric` counts as right, both times `weight`. `result` is the trained adapter.
    """

    metric = "accuracy"

    def __init__(self, encoder: AdaptedEncoder, adapter: Adapter, classes: int) -> None:
        super().__init__()
        self.encoder = encoder  # not an nn.Module, so the frozen CLIP is neither saved nor synchronised
        self.adapter = adapter
        self.head = nn.Linear(encoder.output_dim, classes)

    def views(self, images: torch.Tensor, drawn: torch.Tensor | None) -> list[torch.Tensor]:
        return [images if drawn is None else augment_batch(images, drawn)]

    def forward(
        self, stems: Sequence[Stem], labels: torch.Tensor, weight: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.head(self.encoder.tail(self.adapter, *stems[0]))
        return weight * F.cross_entropy(logits, labels, reduction="sum"), weight * (logits.argmax(1) == labels).sum()

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [*self.adapter.parameters(), *self.head.parameters()]}]

    def begin_epoch(self, epoch: int) -> None:
        pass

    def after_step(self, share: float, reduce_sum: Reduce) -> None:
        pass

    def result(self) -> Adapter:
        return self.adapter
