"""An opened CLIP: what a classifier encodes images and class names with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from iosr_fast.encoders.encoder import Encoder
from iosr_fast.encoders.text_encoder import TextSource

if TYPE_CHECKING:
    from iosr_fast.clip.adapter import Adapter
    from iosr_fast.clip.load import LoadedClip


@dataclass(frozen=True, eq=False)
class OpenedClip:
    """`encoder` for images, opened from the folder `engine`; `text` for class names, None if a saved classifier has
    none; `tau`, the CLIP's logit scale; `loaded`, the CLIP in torch and its adapter, None for a saved classifier."""

    encoder: Encoder
    engine: Path
    text: TextSource | None
    tau: float
    loaded: tuple[LoadedClip, Adapter | None] | None = None
