"""An opened CLIP: what a classifier encodes images and class names with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from iosr_fast.encoders.encoder import Encoder
from iosr_fast.encoders.text_encoder import TextSource


@dataclass(frozen=True, eq=False)
class OpenedClip:
    """`encoder` for images, opened from the folder `engine`; `text` for class names, None if a saved classifier has
    none; `tau`, the CLIP's logit scale."""

    encoder: Encoder
    engine: Path
    text: TextSource | None
    tau: float
