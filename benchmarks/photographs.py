"""Pictures that decode and resize like photographs, made from the demo's pictures (tools/demo names their licences).

Each is enlarged, under a texture whose amplitude falls with frequency as a photograph's does: an emoji alone has no
detail, and a JPEG of it is a fifth as large as a photograph's.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from PIL import Image

from iosr_fast.backbones.demo.pictures import load_pictures
from iosr_fast.exceptions import IosrFastError

WIDTH, HEIGHT, QUALITY, DEVIATION = 500, 375, 88, 24.0
_TEXTURES = 8


@functools.lru_cache(maxsize=_TEXTURES)
def texture(width: int, height: int, seed: int) -> np.ndarray:
    """(height, width) float32 of mean 0 and standard deviation 1 with a spectrum of amplitude 1 / frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    phases = rng.standard_normal((2, *frequency.shape))
    rows = np.fft.irfft2((phases[0] + 1j * phases[1]) / frequency, (height, width))
    return np.asarray(rows / rows.std(), np.float32)


def photograph(
    picture: np.ndarray, width: int = WIDTH, height: int = HEIGHT, seed: int = 0, deviation: float = DEVIATION
) -> Image.Image:
    """`picture` (H, W, 3) uint8 enlarged to (height, width) under a texture of this standard deviation, in levels."""
    rng = np.random.default_rng(seed)
    large = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    shift = (int(rng.integers(height)), int(rng.integers(width)))
    grain = np.roll(texture(width, height, seed % _TEXTURES), shift, (0, 1))
    # Contrast is lowered first: clipped highlights would have no texture.
    return Image.fromarray(np.clip(0.8 * large + 25 + deviation * grain[:, :, None], 0, 255).astype(np.uint8))


def write_photographs(folder: Path, count: int) -> list[Path]:
    """`count` JPEGs of different pictures in `folder`, at most 1,000 a sub-folder; their paths, sorted."""
    pictures = load_pictures("held-out").images
    if count > len(pictures):
        raise IosrFastError(f"expected at most {len(pictures)} pictures, which are all of the demo's, got {count}")
    paths = []
    for i, chosen in enumerate(np.random.default_rng(0).permutation(len(pictures))[:count].tolist()):
        path = folder / f"{i // 1000:03d}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(pictures[chosen], seed=i).save(path, quality=QUALITY)
        paths.append(path)
    return paths
