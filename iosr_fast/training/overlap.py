"""Intra-modal overlap: how far the cosines of same-class and of different-class image pairs overlap."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from iosr_fast.backbones.adapter import Adapter
from iosr_fast.backbones.load import LoadedModel
from iosr_fast.encoders.encoder import unit
from iosr_fast.exceptions import IosrFastError
from iosr_fast.training.adapted_encoder import AdaptedEncoder
from iosr_fast.training.batches import Normalise
from iosr_fast.training.pictures import PictureSource

if TYPE_CHECKING:
    from lightning_fabric import Fabric

BINS = 200
BATCH = 128
MOST_PICTURES = 2000  # limits the cosines of all pairs to 16 MB


class HeldOutOverlap:
    """The overlap of pictures that training must not see: `plain`, and `measure` under the adapter at any step.

    At most 2,000 pictures are encoded, equally many of each class or all that it has, of at most 1,000 classes. The
    choice depends on the labels only. Raises ValueError unless some pairs share a class and others do not.
    """

    def __init__(self, clip: LoadedModel, encoder: AdaptedEncoder, source: PictureSource, fabric: Fabric) -> None:
        self.encoder, self.source, self.fabric = encoder, source, fabric
        self.normalise = Normalise(clip, True, fabric.device)  # as at inference
        self.rows = _chosen(source.labels.numpy())
        self.labels = source.labels.numpy()[self.rows]
        self.plain = self.measure(None)

    @torch.no_grad()
    def measure(self, adapter: Adapter | None) -> float:
        """The overlap area of the embeddings, plain ones if `adapter` is None; leaves it in evaluation mode."""
        if adapter is not None:
            adapter.eval()
        embeddings = []
        for pixels in self.source.iterate(torch.from_numpy(self.rows), BATCH):
            with self.fabric.autocast():
                stem = self.encoder.stem(self.normalise(pixels.to(self.fabric.device).float() / 255))
                embeddings.append(self.encoder.tail(adapter, *stem).float().cpu().numpy())
        return overlap_area(*pair_cosines(unit(np.concatenate(embeddings)), self.labels))


def _chosen(labels: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(0)
    rows = rng.permutation(len(labels))
    classes = rng.permutation(np.unique(labels))[: MOST_PICTURES // 2]
    each = MOST_PICTURES // max(1, len(classes))
    return np.concatenate([rows[:0], *(rows[labels[rows] == name][:each] for name in classes)])


def pair_cosines(embeddings: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of all pairs i < j: (paired, unpaired), of the same and of different classes. Needs N^2 * 4 bytes.

    `embeddings` (N, D), L2-normalised; `labels` (N,). Raises ValueError if no pair, or every pair, shares a class.
    """
    cosines = embeddings @ embeddings.T
    upper = np.triu(np.ones(cosines.shape, bool), 1)
    same = labels[:, None] == labels[None, :]
    paired, unpaired = cosines[upper & same], cosines[upper & ~same]
    if not len(paired) or not len(unpaired):
        raise IosrFastError(
            f"expected pairs of the same and of different classes, got {len(paired)} and {len(unpaired)} of them"
        )
    return paired, unpaired


def overlap_area(paired: np.ndarray, unpaired: np.ndarray) -> float:
    """The area shared by the two densities, in [0, 1]: sum over bins of min(p, q), with bins over [-1, 1].

    Source: Kravets & Namboodiri, BMVC 2024, section 3 (their intra-modal overlap).
    """
    p, _ = np.histogram(np.clip(paired, -1, 1), bins=BINS, range=(-1, 1))
    q, _ = np.histogram(np.clip(unpaired, -1, 1), bins=BINS, range=(-1, 1))
    return float(np.minimum(p / p.sum(), q / q.sum()).sum())
