"""Overlap and linear-probe accuracy of held-out pictures under the adapter in training, plain and adapted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from iosr_fast.clip.adapter import Adapter
from iosr_fast.clip.load import LoadedClip
from iosr_fast.exceptions import IosrFastError
from iosr_fast.training.activation_cache import ActivationCache
from iosr_fast.training.adapted_encoder import AdaptedEncoder
from iosr_fast.training.batches import Normalise, activation_key, open_cache, read_pixels, read_stems
from iosr_fast.training.data import PictureSource, SubsetPictures
from iosr_fast.training.probe import Probe, probe, probed_rows
from iosr_fast.training.supervised import Stem
from iosr_fast.training.train_config import TrainConfig
from iosr_fast.utils.require import require_installed

if TYPE_CHECKING:
    from lightning_fabric import Fabric

BATCH = 128


class HeldOutEvaluator:
    """Measures held-out pictures (of `source`, which training must not see) under the adapter at any step.

    Only the pictures that `probe` uses are encoded. The frozen stem runs once for both embeddings; with a `folder` its
    outputs are cached and later epochs run the adapted blocks only. The plain embeddings are measured once.
    """

    def __init__(
        self,
        clip: LoadedClip,
        encoder: AdaptedEncoder,
        source: PictureSource,
        config: TrainConfig,
        fabric: Fabric,
        folder: Path | None,
    ) -> None:
        require_installed("sklearn", "train")  # now, not after the first epoch
        self.encoder, self.fabric = encoder, fabric
        self.normalise = Normalise(clip, True, fabric.device)  # as at inference
        classes = int((source.labels.bincount() >= 2).sum())
        if classes < 2:
            raise IosrFastError(
                f"expected held-out pictures of at least two classes, two of each, to measure overlap and a linear "
                f"probe on; got {len(source.labels)} pictures, {classes} classes with two: hold out more, or none"
            )
        rows = probed_rows(source.labels.numpy())
        self.source = source = SubsetPictures(source, torch.from_numpy(rows))
        self.plain: Probe | None = None
        self.cache: ActivationCache | None = None
        if folder is not None:
            key = {**activation_key(clip, encoder, source, config), "normalise": True, "augment_seed": None}
            self.cache = open_cache(folder, key, len(source.labels), 1, encoder, config)

    @torch.no_grad()
    def measure(self, adapter: Adapter) -> tuple[Probe, Probe]:
        """(plain, adapted); the adapter keeps its mode."""
        mode = adapter.training
        adapter.eval()
        plain, adapted = [], []
        for stem in self._stems():
            with self.fabric.autocast():
                adapted.append(_normalised(self.encoder.tail(adapter, *stem)))
                if self.plain is None:
                    plain.append(_normalised(self.encoder.tail(None, *stem)))
        adapter.train(mode)
        labels = self.source.labels.numpy()
        if self.plain is None:
            self.plain = probe(np.concatenate(plain), labels)
        return self.plain, probe(np.concatenate(adapted), labels)

    def close(self) -> None:
        if self.cache is not None:
            self.cache.close()

    def _stems(self) -> Iterator[Stem]:
        parts = torch.arange(len(self.source.labels)).split(BATCH)
        if self.cache is not None:
            yield from read_stems(self.cache, self.source, parts, 0, self._compute, self.fabric.device)
            return
        for rows, pixels in zip(parts, read_pixels(self.source, parts), strict=True):
            yield self._compute(rows, pixels)

    def _compute(self, rows: torch.Tensor, pixels: torch.Tensor) -> Stem:
        with self.fabric.autocast():
            return self.encoder.stem(self.normalise(pixels.to(self.fabric.device).float() / 255))


def _normalised(features: torch.Tensor) -> np.ndarray:
    unit: np.ndarray = F.normalize(features.float(), dim=-1).cpu().numpy()
    return unit
