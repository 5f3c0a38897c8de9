"""The pictures on which activation ranges are measured before an encoder is quantised."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.listing import IMAGE_SUFFIXES, list_images
from iosr_fast.images.preprocess import to_pixels

if TYPE_CHECKING:
    from iosr_fast.clip.load import LoadedClip

PICTURES = 256


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


def evenly(items: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of `items`, evenly spaced from the first to the last, each once."""
    chosen: np.ndarray = items[np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).astype(int))]
    return chosen
