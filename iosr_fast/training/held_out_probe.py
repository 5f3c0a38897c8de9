"""Held-out pictures under the adapter in training: overlap and linear-probe accuracy, plain and adapted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from iosr_fast.clip.adapter import Adapter
from iosr_fast.clip.load import LoadedClip
from iosr_fast.training.activation_cache import ActivationCache
from iosr_fast.training.adapted_encoder import AdaptedEncoder
from iosr_fast.training.batches import KEPT_DTYPES, Normalise, prefix_key
from iosr_fast.training.data import PictureSource, SubsetPictures
from iosr_fast.training.interrupt import sheltered
from iosr_fast.training.probe import Probe, probe, probed_rows
from iosr_fast.training.supervised import Stem
from iosr_fast.training.train_config import TrainConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric

BATCH = 128


class HeldOutEvaluator:
    """Encodes held-out pictures (of `source`, which training must not see) as often as it is asked.

    Only those that `probe` looks at are encoded. Their frozen part runs once for both embeddings; where training keeps
    its own, theirs is kept too and later epochs run the adapted blocks only. The plain embeddings do not change and are
    measured once.
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
        self.encoder, self.fabric = encoder, fabric
        self.normalise = Normalise(clip, True, fabric.device)  # as at inference, whatever training does
        probed, pictures = int((source.labels.bincount() >= 2).sum()), len(source.labels)
        if probed < 2:
            raise ValueError(
                f"expected held-out pictures of at least two classes, two of each, to measure overlap and a linear "
                f"probe on; got {pictures} pictures, {probed} classes with two: hold out more, or none"
            )
        self.rows = probed_rows(source.labels.numpy())
        self.source = source = SubsetPictures(source, torch.from_numpy(self.rows))
        self.plain: Probe | None = None
        self.kept: ActivationCache | None = None
        if folder is not None:
            key = {**prefix_key(clip, encoder, source, config), "normalise": True, "augment_seed": None}
            dtype = KEPT_DTYPES[config.kept_precision]
            self.kept = ActivationCache(folder, key, len(source.labels), 1, encoder.stem_shapes(), dtype)

    @torch.no_grad()
    def measure(self, adapter: Adapter) -> tuple[Probe, Probe]:
        """(plain, adapted); the adapter is put back into the mode it was in."""
        mode = adapter.training
        adapter.eval()
        plain, adapted = [], []
        for stem in self._stems():
            with self.fabric.autocast():
                adapted.append(self._unit(self.encoder.tail(adapter, *stem)))
                if self.plain is None:
                    plain.append(self._unit(self.encoder.tail(None, *stem)))
        adapter.train(mode)
        labels, ids = self.source.labels.numpy(), self.rows.tolist()
        if self.plain is None:
            self.plain = probe(np.concatenate(plain), labels, ids=ids)
        return self.plain, probe(np.concatenate(adapted), labels, ids=ids)

    def close(self) -> None:
        if self.kept is not None:
            self.kept.close()

    @staticmethod
    def _unit(features: torch.Tensor) -> np.ndarray:
        unit: np.ndarray = F.normalize(features.float(), dim=-1).cpu().numpy()
        return unit

    def _stems(self) -> Iterator[Stem]:
        order = torch.arange(len(self.source.labels))
        parts = order.split(BATCH)
        if self.kept is not None and all(self.kept.holds(rows, torch.zeros_like(rows)) for rows in parts):
            for rows in parts:
                kept = self.kept.read(rows, torch.zeros_like(rows))
                if kept is None:  # damaged: computed like a picture that was never seen
                    _, pixels = next(sheltered(self.source.iterate(rows, BATCH)))
                    yield self._compute(rows, pixels)
                else:
                    after_attention, after_mlp = (part.to(self.fabric.device).float() for part in kept)
                    yield after_attention, after_mlp
            return
        for rows, pixels in sheltered(self.source.iterate(order, BATCH)):
            yield self._compute(rows, pixels)

    def _compute(self, rows: torch.Tensor, pixels: torch.Tensor) -> Stem:
        with self.fabric.autocast():
            outputs = self.encoder.stem(self.normalise(pixels.to(self.fabric.device).float() / 255))
        if self.kept is None:
            return outputs
        kept = [output.to(self.kept.dtype) for output in outputs]
        self.kept.write(rows, torch.zeros_like(rows), [part.cpu() for part in kept])
        return kept[0].float(), kept[1].float()
