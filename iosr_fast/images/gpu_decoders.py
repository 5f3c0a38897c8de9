"""JPEGs decoded and resized on an NVIDIA GPU; what a GPU's decoder can't read is left to the CPU's, image by image.

No machine with a GPU has run these yet: what the tests run is torchvision's decoder and the resize on the CPU, and
nvImageCodec's calls against a stand-in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iosr_fast.images.decoders import Decoded, try_decode
from iosr_fast.images.pixels import opened, orientation_of
from iosr_fast.utils.require import require

if TYPE_CHECKING:
    import torch

_UNLIKE = 8  # longer side by shorter: beyond it most of what a whole resize makes is cut off, and the CPU's makes none
_JPEG = b"\xff\xd8\xff"


class GpuDecoder(ABC):
    """Reads the files of a batch, decodes its JPEGs by `_decode`, turns them upright unless `exif_orientation` is False
    and resizes them by `shrink`; two threads let one batch be read while another is decoded."""

    name: str
    threads: int | None = 2

    def __init__(self, device: str = "cuda", exif_orientation: bool = True) -> None:
        self.device, self.exif_orientation = device, exif_orientation

    def decode(self, sources: Sequence[Any], size: int, start: int = 0) -> list[Decoded]:
        """As Decoder.decode: within 1 level of it on average."""
        found: list[Decoded | None] = [None] * len(sources)
        data = [_jpeg(source) for source in sources]
        chosen = [i for i, given in enumerate(data) if given is not None]
        jpegs = [given for given in data if given is not None]
        for i, jpeg, image in zip(chosen, jpegs, self._decode(jpegs), strict=True):
            orientation = _orientation(jpeg) if self.exif_orientation else 1
            if image is not None and orientation is not None and _fits(image.shape[1], image.shape[2]):
                found[i] = shrink(turned(image, orientation), size).permute(1, 2, 0).contiguous().cpu().numpy()
        return [
            try_decode(source, size, start + i, self.exif_orientation) if done is None else done
            for i, (source, done) in enumerate(zip(sources, found, strict=True))
        ]

    @abstractmethod
    def _decode(self, data: list[bytes]) -> list[torch.Tensor | None]:
        """Each JPEG as uint8 (3, H, W), RGB, as it is stored, on `device`; None for one that can't be decoded here."""


class TorchvisionDecoder(GpuDecoder):
    """torchvision.io.decode_jpeg, which is nvJPEG on a GPU."""

    name = "torchvision-cuda"

    def _decode(self, data: list[bytes]) -> list[torch.Tensor | None]:
        torch, io = require("torch", "train"), require("torchvision.io", "train")
        raw = [torch.frombuffer(bytearray(given), dtype=torch.uint8) for given in data]
        if not raw:
            return []
        try:
            return list(io.decode_jpeg(raw, mode=io.ImageReadMode.RGB, device=self.device))
        except RuntimeError:  # one that can't be decoded fails the batch: find which
            return [self._one(given) for given in raw]

    def _one(self, raw: torch.Tensor) -> torch.Tensor | None:
        io = require("torchvision.io", "train")
        try:
            image: torch.Tensor = io.decode_jpeg(raw, mode=io.ImageReadMode.RGB, device=self.device)
            return image
        except RuntimeError:
            return None


class NvImageCodecDecoder(GpuDecoder):
    """nvidia.nvimgcodec, which spreads a batch over the GPU's hardware decoders and its cores."""

    name = "nvimagecodec"

    def __init__(self, device: str = "cuda", exif_orientation: bool = True) -> None:
        super().__init__(device, exif_orientation)
        self._codec = require("nvidia.nvimgcodec", "train")
        self._decoder = self._codec.Decoder()
        # `turned` does it for both decoders. RGB is its default, under names that differ between its versions.
        self._params = self._codec.DecodeParams(apply_exif_orientation=False)

    def _decode(self, data: list[bytes]) -> list[torch.Tensor | None]:
        torch = require("torch", "train")
        if not data:
            return []
        made = self._decoder.decode(data, self._params)
        images = [None if image is None else torch.as_tensor(image, device=self.device) for image in made]
        return [None if image is None or image.shape[2] != 3 else image.permute(2, 0, 1) for image in images]


def turned(image: torch.Tensor, orientation: int) -> torch.Tensor:
    """pixels.turn on (3, H, W)."""
    if orientation > 4:  # the stored x is the upright y
        image = image.transpose(1, 2)
    axes = [axis for axis, reversing in ((1, (3, 4, 7, 8)), (2, (2, 3, 6, 7))) if orientation in reversing]
    return image.flip(axes) if axes else image


def _orientation(jpeg: bytes) -> int | None:
    """By the header alone; None where it can't be read: the CPU's decoder says why."""
    try:
        with opened(jpeg) as image:
            return orientation_of(image)
    except Exception:  # damaged headers make Pillow raise all sorts
        return None


def shrink(image: torch.Tensor, size: int) -> torch.Tensor:
    """resize_and_crop on uint8 (3, H, W): bicubic with antialiasing, rounded and clamped -> (3, size, size) uint8."""
    import torch

    height, width = image.shape[1:]
    short = min(width, height)
    whole = int(size * height / short), int(size * width / short)
    resized = image
    if short != size:
        resized = torch.nn.functional.interpolate(
            image[None].float(), whole, mode="bicubic", antialias=True, align_corners=False
        )[0]
        resized = resized.round().clamp(0, 255).to(torch.uint8)
    top, left = round((resized.shape[1] - size) / 2), round((resized.shape[2] - size) / 2)
    cropped: torch.Tensor = resized[:, top : top + size, left : left + size]
    return cropped


def _fits(height: int, width: int) -> bool:
    return max(height, width) <= _UNLIKE * min(height, width)


def _jpeg(source: Any) -> bytes | None:
    """The bytes of a JPEG; None for what is none, or can't be read."""
    if isinstance(source, str | Path):
        try:
            with open(source, "rb") as file:
                head = file.read(len(_JPEG))
                return head + file.read() if head == _JPEG else None
        except OSError:
            return None
    if isinstance(source, bytes | bytearray | memoryview) and bytes(source[: len(_JPEG)]) == _JPEG:
        return bytes(source)
    return None
