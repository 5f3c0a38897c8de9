"""The demo's held-out concepts as a source, encoded in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iosr_fast.backbones.demo.pictures import POOL, Pictures, held_out
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.evaluation.tasks import EncodedSet, TaskSource
from iosr_fast.exceptions import IosrFastError

if TYPE_CHECKING:
    from iosr_fast.backbones.load import LoadedModel

NAME = "demo"
BATCH = 64
SHOTS = (1, 2, 4)
SEEDS = 3
Encode = Callable[[np.ndarray], Embeddings]


def torch_encoder(clip: LoadedModel, adapter: Any) -> Encode:
    """The image encoder in PyTorch without an export, uint8 pixels (B, S, S, 3) -> embeddings.

    On a GPU if there is one. A CLIP that can't have an adapter (a ResNet) gives the plain embedding.
    """
    import torch

    from iosr_fast.export.source import source_of

    device = "cuda" if torch.cuda.is_available() else "cpu"
    clip.model.visual.to(device)
    encoder = source_of(clip, adapter).module().eval().to(device)

    @torch.inference_mode()
    def run(pixels: np.ndarray) -> Embeddings:
        return Embeddings(*(output.cpu().numpy() for output in encoder(torch.from_numpy(pixels.copy()).to(device))))

    return run


def encode(run: Encode, clip: LoadedModel, pictures: Pictures, text: np.ndarray | None = None) -> EncodedSet:
    """Every picture, by `run` in batches, and the concepts' names (unless `text` is given)."""
    from iosr_fast.backbones.prompts import embed_classes

    parts = [run(rows) for rows in np.array_split(pictures.images, -(-len(pictures.images) // BATCH))]
    text = embed_classes(clip, pictures.names) if text is None else text
    return EncodedSet(Embeddings.concatenate(parts), pictures.concepts, text, clip.logit_scale)


def open_demo(shots: Sequence[int] = SHOTS, seeds: int = SEEDS, adapter: str | Path = "auto") -> TaskSource:
    """The test concepts with the shipped adapter (or a file's)."""
    from iosr_fast.backbones.load import load_clip
    from iosr_fast.export.pretrained import choose_adapter

    if not shots or min(shots) < 1 or max(shots) > POOL:
        raise IosrFastError(f"expected --shots from 1 to {POOL} on the demo's pictures, got {list(shots)}")
    clip = load_clip("demo")
    pictures, _ = held_out()
    encoded = encode(torch_encoder(clip, choose_adapter(clip, adapter)), clip, pictures)
    return encoded_source(encoded, shots, range(seeds))


def encoded_source(encoded: EncodedSet, shots: Sequence[int], seeds: Sequence[int]) -> TaskSource:
    """Support and queries from all styles, never the same picture."""
    return TaskSource(NAME, tuple(dict.fromkeys(shots)), tuple(seeds), encoded.task)
