"""Support images, from pictures to what a classifier keeps of them: embeddings of views, and a thumbnail to look at."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings, Encoder
from iosr_fast.images.preprocess import open_image
from iosr_fast.methods.support_set import encode_support

_QUALITY = 80  # of a thumbnail's WebP: at 96 pixels, 2 to 4 KB


@dataclass(frozen=True)
class SupportViews:
    """How a support image becomes a key, at the fit and for images that come later.

    views      random views averaged into it; 1 takes the image as it is
    mirror     half of the views mirrored
    seed       of the views' draws
    single     whether a single view is kept beside the mean of several: what leave-one-out asks with
    templates  prompts for class names; None: the CLIP's own
    thumbnail  pixels of the longer side of the picture that is kept; 0 keeps none
    exif_orientation  whether images are turned upright by EXIF, those to be classified too; a fit turns them, and False
               is how bundles were fitted that don't say it
    """

    views: int = 1
    mirror: bool = False
    seed: int = 0
    single: bool = False
    templates: tuple[str, ...] | None = None
    thumbnail: int = 96
    exif_orientation: bool = False

    def __post_init__(self) -> None:
        if self.views < 1:
            raise ValueError(f"expected views of at least 1, got {self.views}")
        if not 0 <= self.thumbnail <= 1024:
            raise ValueError(f"expected thumbnails of 0 (none) to 1,024 pixels, got {self.thumbnail}")

    def thumbnails(self, images: Sequence[Any]) -> tuple[bytes | None, ...]:
        """WebP, one an image."""
        if not self.thumbnail:
            return (None,) * len(images)
        return tuple(_thumbnail(image, i, self.thumbnail, self.exif_orientation) for i, image in enumerate(images))

    def encode_later(self, encoder: Encoder, images: Sequence[Any]) -> tuple[Embeddings, Embeddings | None]:
        """Embeddings of images that are added, and of their single views. The draws follow from seed and pixels, so
        that the same image gives the same key whenever it comes."""
        parts = []
        for image in images:
            pixels = np.asarray(open_image(image, 0, self.exif_orientation))
            drawn = int.from_bytes(hashlib.sha256(pixels.tobytes()).digest()[:8], "little")
            rng = np.random.default_rng([self.seed, drawn])
            mean = encode_support(encoder, [pixels], self.views, self.mirror, rng)  # of pixels that are upright
            one = encode_support(encoder, [pixels], 1, self.mirror, rng) if self.single else None
            parts.append((mean, one))
        means = _stacked([mean for mean, _ in parts])
        return means, _stacked([one for _, one in parts if one is not None]) if self.single else None


def _stacked(parts: Sequence[Embeddings]) -> Embeddings:
    plain = np.concatenate([part.plain for part in parts])
    return Embeddings(plain, None if parts[0].adapted is None else np.concatenate([part.adapted for part in parts]))


def _thumbnail(source: Any, position: int, side: int, exif_orientation: bool) -> bytes:
    from PIL import Image

    image = open_image(source, position, exif_orientation)
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=_QUALITY)
    return file.getvalue()
