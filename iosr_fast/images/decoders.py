"""Choosing a decoder: Pillow on the CPU, or a GPU decoder if one is installed."""

from __future__ import annotations

import logging
from importlib.util import find_spec

from iosr_fast.exceptions import IosrFastError, UnavailableError
from iosr_fast.images.decode import CpuDecoder, Decoder
from iosr_fast.utils import machine

DECODERS = ("cpu", "cpu-exact", "torchcodec", "nvimagecodec")
_NEEDED_MODULES = {"torchcodec": ("torchcodec",), "nvimagecodec": ("nvidia.nvimgcodec",)}
_INSTALL = {
    "torchcodec": "pip install 'iosr_fast[gpu]' brings it",
    "nvimagecodec": "pip install nvidia-nvimgcodec-cu12 (or -cu13, as PyTorch's CUDA) brings it",
}
log = logging.getLogger(__name__)


def choose_decoder(name: str = "auto", device: str | None = None, exif_orientation: bool = True) -> Decoder:
    """The decoder of this name. "auto" is a GPU decoder if the encoder takes pixels from a GPU and a GPU decoder can
    run here, else the CPU's.

    `device`: the encoder's `input_device`. `exif_orientation` as for `open_image`; pass Classifier.exif_orientation_.
    Raises ValueError for an unknown name, UnavailableError (a RuntimeError) for a decoder that can't run here.
    """
    if name not in ("auto", *DECODERS):
        raise IosrFastError(f"expected decoder to be one of {', '.join(('auto', *DECODERS))}, got {name!r}")
    if name != "auto":
        if (reason := unavailable_reason(name)) is not None:
            raise UnavailableError(f"decoder={name!r} can't run here: {reason}")
        return _make(name, device, exif_orientation)
    refused = {}
    for candidate in () if device is None else reversed(DECODERS[2:]):
        if (reason := unavailable_reason(candidate)) is None:
            return _make(candidate, device, exif_orientation)
        refused[candidate] = reason
    log.info("decoding on the CPU; unavailable: %s", refused or "none")
    return CpuDecoder(exif_orientation=exif_orientation)


def unavailable_reason(name: str) -> str | None:
    """Why this decoder can't run here, or None."""
    if name not in _NEEDED_MODULES:
        return None
    missing = [module for module in ("torch", *_NEEDED_MODULES[name]) if _missing(module)]
    if missing:
        return f"{' and '.join(missing)} can't be found; {_INSTALL[name]}"
    return "PyTorch sees no NVIDIA GPU" if machine.this_gpu() is None else None


def _missing(module: str) -> bool:
    try:
        return find_spec(module) is None
    except ModuleNotFoundError:  # its parent package is missing
        return True


def _make(name: str, device: str | None, exif_orientation: bool) -> Decoder:
    if name not in _NEEDED_MODULES:
        return CpuDecoder(name == "cpu-exact", exif_orientation)
    from iosr_fast.images.gpu_decoders import NvImageCodecDecoder, TorchCodecDecoder

    decoder_type = TorchCodecDecoder if name == "torchcodec" else NvImageCodecDecoder
    return decoder_type(device or "cuda", exif_orientation)
