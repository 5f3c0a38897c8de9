"""Pictures of none of the classes, encoded together with the support images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings, Encoder
from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.head.examples import Examples
from iosr_fast.head.support_images import SupportViews, encode_images
from iosr_fast.images.listing import list_images

NONE_OF_THE_CLASSES = "none of the classes"


def unknown_folder(folder: str | Path) -> list[str]:
    """The paths of all images in a folder and below. Raises FileNotFoundError or, if there are none, IosrFastError."""
    paths = list_images(folder).paths
    if not paths:
        raise IosrFastError(f"expected pictures of none of the classes in {folder}, found no image")
    return paths


def encode_with_unknown(
    encoder: Encoder,
    images: Sequence[Any],
    labels: np.ndarray,
    unknown_images: Sequence[Any],
    views: SupportViews,
    skip_bad: bool = False,
    names: Sequence[str] = (),
    step: Callable[[int], None] = lambda images: None,
) -> tuple[Examples, Embeddings | None, list[BadImageError]]:
    """`encode_images` of the support images (N) with `labels` (N,) into `names`, and of `unknown_images`, pictures of
    none of these classes, whose embeddings are given as queries have them, or None if there are none.

    Raises what `encode_images` raises; a picture that is both a support image and unknown is one with two labels. In
    errors, images without a path are counted from the first support image on.
    """
    none = len(names)
    labels = np.concatenate([labels, np.full(len(unknown_images), none)])
    spoken = [*names, NONE_OF_THE_CLASSES]
    examples, errors = encode_images(encoder, [*images, *unknown_images], labels, views, skip_bad, spoken, step)
    unknown = examples.class_ids == none
    if not unknown.any():
        return examples, None, errors
    return examples.rows(~unknown), (examples.queries or examples.embeddings)[unknown], errors
