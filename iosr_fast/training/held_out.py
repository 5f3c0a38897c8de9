"""What a training's held-out pictures say after each epoch: the overlap of their cosines, plain and adapted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from iosr_fast.backbones.adapter import Adapter
from iosr_fast.backbones.load import LoadedModel
from iosr_fast.encoders.encoder import unit
from iosr_fast.exceptions import IosrFastError
from iosr_fast.training.adapted_encoder import AdaptedEncoder
from iosr_fast.training.batches import Normalise, read_stems
from iosr_fast.training.objectives import Stem
from iosr_fast.training.overlap import overlap_area, pair_cosines
from iosr_fast.training.pictures import PictureSource, SubsetPictures
from iosr_fast.utils.ranking import auroc

if TYPE_CHECKING:
    from lightning_fabric import Fabric

BATCH = 128
MOST_PICTURES = 2000  # limits the cosines of all pairs to 16 MB


@dataclass(frozen=True)
class Overlap:
    """Of a number of `pictures` of a number of `classes`: `overlap_area` is in [0, 1], less is better; `auroc` is 1 at
    best, 0.5 by chance (training.overlap)."""

    overlap_area: float
    auroc: float
    pictures: int
    classes: int

    def measures(self, kind: str) -> dict[str, float]:
        """Both, named KIND_overlap_area and KIND_auroc, for a log."""
        return {f"{kind}_{name}": getattr(self, name) for name in ("overlap_area", "auroc")}


def overlap(embeddings: np.ndarray, labels: np.ndarray) -> Overlap:
    """The overlap of `embeddings` (N, D), of any length, with integer `labels` (N,)."""
    paired, unpaired = pair_cosines(unit(embeddings), labels)
    return Overlap(overlap_area(paired, unpaired), auroc(paired, unpaired), len(labels), len(np.unique(labels)))


def chosen_rows(labels: np.ndarray) -> np.ndarray:
    """At most MOST_PICTURES rows, ascending: by `labels` alone, so that encoders are compared on the same pictures.

    Pictures are taken in random order, one of each class, then a second of each, and so on; a class with one picture
    has no pair and is left out. Raises IosrFastError for fewer than two classes of two pictures.
    """
    order = np.random.default_rng(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    sizes = np.unique(labels, return_counts=True)[1]
    if (sizes >= 2).sum() < 2:
        raise IosrFastError(
            f"expected held-out pictures of at least two classes, two of each, to measure their overlap; got "
            f"{len(labels)} pictures, {(sizes >= 2).sum()} classes with two: hold out more, or none"
        )
    number = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    by_turn = np.lexsort((number // 2,))  # two at a time, so that each class that is taken has a pair
    taken = by_turn[np.repeat(sizes >= 2, sizes)[by_turn]][:MOST_PICTURES]
    return np.sort(order[taken])


class HeldOut:
    """Measures pictures of `source`, which training must not see, under the adapter at any step. The plain embeddings
    are measured once."""

    def __init__(self, clip: LoadedModel, encoder: AdaptedEncoder, source: PictureSource, fabric: Fabric) -> None:
        self.encoder, self.fabric = encoder, fabric
        self.normalise = Normalise(clip, True, fabric.device)  # as at inference
        self.source = SubsetPictures(source, torch.from_numpy(chosen_rows(source.labels.numpy())))
        self.plain: Overlap | None = None

    @torch.no_grad()
    def measure(self, adapter: Adapter) -> tuple[Overlap, Overlap]:
        """(plain, adapted); the adapter keeps its mode."""
        mode = adapter.training
        adapter.eval()
        plain, adapted = [], []
        parts = torch.arange(len(self.source.labels)).split(BATCH)
        for (stem,) in read_stems(self.source, parts, self._stem, None, 0, self.fabric.device):
            with self.fabric.autocast():
                adapted.append(self.encoder.tail(adapter, *stem).float().cpu().numpy())
                if self.plain is None:
                    plain.append(self.encoder.tail(None, *stem).float().cpu().numpy())
        adapter.train(mode)
        labels = self.source.labels.numpy()
        if self.plain is None:
            self.plain = overlap(np.concatenate(plain), labels)
        return self.plain, overlap(np.concatenate(adapted), labels)

    def _stem(self, rows: torch.Tensor, pixels: torch.Tensor) -> list[Stem]:
        with self.fabric.autocast():
            return [self.encoder.stem(self.normalise(pixels.to(self.fabric.device).float() / 255))]
