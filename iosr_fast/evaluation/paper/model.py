"""The CLIP of a run: its fingerprint and texts at once, its image encoder when the first picture needs it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings, Encoder
from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.geometry import Geometry

if TYPE_CHECKING:
    from iosr_fast.clip.load import LoadedClip

PRECISION = "fp32"


@dataclass(frozen=True, eq=False)
class Model:
    """`adapter` is the fingerprint of the adapter in use, None without one; `engine` that of the image encoder.
    `source` is the arguments of load_model."""

    clip: LoadedClip
    adapter: str | None
    engine: str
    source: tuple[str, str | Path | None, str | Path | None, str]

    @property
    def facts(self) -> dict[str, Any]:
        """What an image's embeddings depend on, beside its pixels."""
        return {
            "model": self.clip.name,
            "clip": self.clip.fingerprint,
            "adapter": self.adapter,
            "engine": self.engine,
            "precision": PRECISION,
            "size": self.clip.image_size,
            "interpolation": self.clip.geometry.interpolation,
            **self.clip.geometry.changes(),
        }

    @cached_property
    def encoder(self) -> Encoder:
        """A compiled engine, built once and cached (export.pretrained); eager PyTorch for a CLIP without transformer.

        Raises ValueError if files have changed since load_model: embeddings would be filed under wrong names.
        """
        from iosr_fast.export.pretrained import open_pretrained

        name, pretrained, adapter, runtime = self.source
        if not has_transformer(self.clip):
            return EagerEncoder(self.clip)
        encoder = open_pretrained(name, pretrained, adapter, runtime, PRECISION, None).encoder
        if encoder.fingerprint != self.engine:
            raise IosrFastError(f"{pretrained or name} or {adapter} has changed since this run began; begin again")
        return encoder


def load_model(name: str, pretrained: str | Path | None, adapter: str | Path | None, runtime: str = "auto") -> Model:
    """Load a CLIP and look at its adapter. Raises ValueError for an adapter of another CLIP, or one that can't be."""
    from iosr_fast.clip.load import load_clip
    from iosr_fast.export.export import engine_fingerprint
    from iosr_fast.export.pretrained import choose_adapter

    clip = load_clip(name, pretrained)
    loaded = choose_adapter(clip, adapter)
    engine = engine_fingerprint(clip, loaded, PRECISION) if has_transformer(clip) else clip.fingerprint
    return Model(clip, None if loaded is None else loaded.fingerprint(), engine, (name, pretrained, adapter, runtime))


def has_transformer(clip: LoadedClip) -> bool:
    """Whether the dual encoder can be built: ResNets (RN50, of which most published figures are) have no blocks."""
    from iosr_fast.clip.fuse_config import unfusible_reason

    return unfusible_reason(clip) is None


class EagerEncoder(Encoder):
    """open_clip's own image encoder in PyTorch, plain embeddings only; on the GPU if PyTorch has one."""

    runtime, adapted = "torch", False

    def __init__(self, clip: LoadedClip) -> None:
        import torch

        self.clip, self.fingerprint, self.image_size = clip, clip.fingerprint, clip.image_size
        with torch.inference_mode():
            self.width: int = clip.model.visual(torch.zeros(1, 3, self.image_size, self.image_size)).shape[1]
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._visual = clip.model.visual.to(self._device)

    @property
    def geometry(self) -> Geometry:
        return self.clip.geometry

    def encode(self, pixels: np.ndarray) -> Embeddings:
        """uint8 pixels (B, S, S, 3) -> plain (B, D) float32, L2-normalised."""
        import torch

        mean, std = (
            torch.tensor(value, device=self._device).view(1, 3, 1, 1) for value in (self.clip.mean, self.clip.std)
        )
        with torch.inference_mode():
            scaled = torch.from_numpy(pixels.copy()).to(self._device).permute(0, 3, 1, 2).float() / 255
            rows = self._visual((scaled - mean) / std)
            return Embeddings(torch.nn.functional.normalize(rows, dim=1).cpu().numpy())
