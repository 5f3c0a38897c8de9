"""The pictures on which activation ranges are measured before an encoder is quantised."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.listing import IMAGE_SUFFIXES, list_images
from iosr_fast.images.preprocess import to_pixels

if TYPE_CHECKING:
    from iosr_fast.clip.load import LoadedClip

PICTURES, MIN_PICTURES = 256, 8


def calibration_pictures(clip: LoadedClip, folder: str | Path | None = None, count: int = PICTURES) -> np.ndarray:
    """At most `count` pictures, evenly spaced in `folder` (with sub-folders), as uint8 (N, S, S, 3).

    Without a folder, the demo's CLIP takes its generic pictures, which show none of the held-out concepts. Raises
    ValueError for another CLIP without a folder and for a folder without pictures, FileNotFoundError for a missing
    folder.
    """
    if folder is None:
        if clip.name != "demo":
            raise IosrFastError(
                f"expected calibration pictures to quantise {clip.name}, got none; give a folder of a few hundred "
                "like those to be classified (iosr-fast build-engine --calibration DIR)"
            )
        from iosr_fast.clip.demo.pictures import load_pictures

        return evenly(load_pictures("generic").images, count)
    paths = list_images(folder).paths
    if not paths:
        raise IosrFastError(
            f"expected pictures to calibrate on ({', '.join(sorted(IMAGE_SUFFIXES))}) in {folder}, found none"
        )
    return to_pixels(evenly(np.array(paths, dtype=object), count).tolist(), clip.geometry)


def check_calibration(pictures: Any, size: int, precision: str) -> np.ndarray:
    """`pictures`; ValueError unless they are at least MIN_PICTURES as uint8 (N, size, size, 3)."""
    if isinstance(pictures, np.ndarray) and pictures.dtype == np.uint8:
        if pictures.ndim == 4 and pictures.shape[1:] == (size, size, 3) and len(pictures) >= MIN_PICTURES:
            return pictures
        got = f"shape {pictures.shape}; iosr_fast.images.preprocess.to_pixels resizes them"
    elif isinstance(pictures, np.ndarray):
        got = f"{pictures.dtype}; pass the pixels as bytes, the encoder normalises them itself"
    else:
        got = f"{'none' if pictures is None else type(pictures).__name__}; calibration_pictures reads them"
    raise IosrFastError(
        f"expected calibration pictures as uint8 (N, {size}, {size}, 3) with N >= {MIN_PICTURES} for {precision}, "
        f"got {got}"
    )


def evenly(items: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of `items`, evenly spaced from the first to the last, each once."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    chosen: np.ndarray = items[np.unique(places)]
    return chosen
