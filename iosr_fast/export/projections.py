"""The projections of a loaded CLIP, written into its engine folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from iosr_fast.clip.fuse_config import unfusible_reason
from iosr_fast.encoders.projections import FILE, Projections

if TYPE_CHECKING:
    from iosr_fast.clip.load import LoadedClip


def clip_projections(clip: LoadedClip) -> Projections | None:
    """Both projections, float32; None if an encoder is not a known transformer or doesn't end in a linear layer without
    a bias. SigLIP's image encoder, for example, ends in an attention pool.
    """
    from torch import nn

    from iosr_fast.clip.text_tower import text_transformer
    from iosr_fast.clip.vision_tower import vision_tower

    text = text_transformer(clip.model)
    if text is None or unfusible_reason(clip) is not None:
        return None
    image, projection = vision_tower(clip.model.visual).parts().projection, text.text_projection
    linear = isinstance(projection, nn.Linear)
    if image is None or image.bias is not None or projection is None or (linear and projection.bias is not None):
        return None
    weights = image.weight, projection.weight if linear else projection.T
    return Projections(*(np.ascontiguousarray(weight.detach().cpu().float().numpy()) for weight in weights))


def write_projections(folder: Path, clip: LoadedClip) -> None:
    """Write the projections, if the CLIP has both."""
    from safetensors.numpy import save_file

    projections = clip_projections(clip)
    if projections is not None:
        save_file(projections._asdict(), folder / FILE)
