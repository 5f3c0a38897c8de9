"""What turns encoded pictures into pixels: the CPU, or a GPU's decoders where they are installed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np

from iosr_fast.images.decoding import decode_pixels
from iosr_fast.images.preprocess import BadImageError
from iosr_fast.utils import machine

Decoded = np.ndarray | BadImageError
DECODERS = ("cpu", "cpu-exact", "torchvision-cuda", "nvimagecodec")
_NEEDS = {"torchvision-cuda": ("torchvision",), "nvimagecodec": ("nvidia.nvimgcodec",)}
_MEND = {
    "torchvision-cuda": "pip install 'iosr_fast[train]' brings it",
    "nvimagecodec": "pip install nvidia-nvimgcodec-cu12 (or -cu13, as PyTorch's CUDA) brings it",
}
log = logging.getLogger(__name__)


class Decoder(Protocol):
    """Batches of images, as open_image takes them, to pixels. Any number of threads may call one; more than `threads`
    (None: no such number) gain nothing."""

    name: str
    threads: int | None
    exif_orientation: bool

    def decode(self, sources: Sequence[Any], size: int, start: int = 0) -> list[Decoded]:
        """(size, size, 3) uint8 of each in order, or why there are none; positions in errors count from `start`."""
        ...


class CpuDecoder:
    """Pillow, in the thread that calls it (pipeline.decoding). `exact`: preprocess.resize_and_crop, to the last bit.
    `exif_orientation` as for preprocess.open_image."""

    threads: int | None = None

    def __init__(self, exact: bool = False, exif_orientation: bool = True) -> None:
        self.name, self._exact, self.exif_orientation = "cpu-exact" if exact else "cpu", exact, exif_orientation

    def decode(self, sources: Sequence[Any], size: int, start: int = 0) -> list[Decoded]:
        return [
            try_decode(source, size, start + i, self.exif_orientation, self._exact) for i, source in enumerate(sources)
        ]


def try_decode(source: Any, size: int, position: int, exif_orientation: bool, exact: bool = False) -> Decoded:
    try:
        return decode_pixels(source, size, position, exact=exact, exif_orientation=exif_orientation)
    except BadImageError as error:
        return error


def choose_decoder(name: str = "auto", runtime: str = "", exif_orientation: bool = True) -> Decoder:
    """The named decoder; for "auto" a GPU's where the encoder's `runtime` is one for GPUs and it can run, else the CPU.

    `exif_orientation` as for preprocess.open_image: a classifier's own (Classifier.exif_orientation).
    Raises ValueError for an unknown name, RuntimeError for a known one that can't run here.
    """
    if name not in ("auto", *DECODERS):
        raise ValueError(f"expected a decoder out of {', '.join(('auto', *DECODERS))}, got {name!r}")
    if name != "auto":
        if (told := unavailable_reason(name)) is not None:
            raise RuntimeError(f"decoder={name!r} can't run here: {told}")
        return _make(name, exif_orientation)
    refused = {}
    for candidate in reversed(DECODERS[2:]) if runtime.startswith("tensorrt") else ():
        if (told := unavailable_reason(candidate)) is None:
            return _make(candidate, exif_orientation)
        refused[candidate] = told
    log.info("decoding on the CPU; refused: %s", refused or "none")
    return CpuDecoder(exif_orientation=exif_orientation)


def unavailable_reason(name: str) -> str | None:
    """Why this decoder can't run here, or None."""
    if name not in _NEEDS:
        return None
    missing = [module for module in ("torch", *_NEEDS[name]) if _missing(module)]
    if missing:
        return f"{' and '.join(missing)} can't be found; {_MEND[name]}"
    return "PyTorch sees no NVIDIA GPU" if machine.this_gpu() is None else None


def _missing(module: str) -> bool:
    try:
        return find_spec(module) is None
    except ModuleNotFoundError:  # of a package within one that is not there
        return True


def _make(name: str, exif_orientation: bool) -> Decoder:
    if name not in _NEEDS:
        return CpuDecoder(name == "cpu-exact", exif_orientation)
    from iosr_fast.images.gpu_decoders import NvImageCodecDecoder, TorchvisionDecoder

    made = TorchvisionDecoder if name == "torchvision-cuda" else NvImageCodecDecoder
    return made(exif_orientation=exif_orientation)
