"""JPEGs decoded and resized on an NVIDIA GPU, where the pixels stay; the CPU decodes each image that the GPU can't.

Each call works on a CUDA stream of its own: TorchCodec waits for all work on its stream, and on the default stream that
would be the encoder's. A call returns when its stream is done, so every stream may read the pixels. The memory belongs
to the call's stream: another one that reads it calls `record_stream`, as runtimes.upload.Upload does.

These have not run on a GPU yet. The tests run the resizing on the CPU, and the calls of both decoders against fakes.
"""

from __future__ import annotations

import importlib
import threading
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iosr_fast.images.decode import DecodedBatch, try_decode
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.pixels import opened, orientation_of
from iosr_fast.utils.require import require

if TYPE_CHECKING:
    import torch

_MAX_ASPECT = 8  # beyond it most of the resized image is cut off; the CPU resizes only the crop
_JPEG = b"\xff\xd8\xff"
# Streams of each device that no call uses. They are used again, because PyTorch keeps freed memory for each stream.
_idle_streams: dict[str, deque[Any]] = defaultdict(deque)


class GpuDecoder(ABC):
    """Reads a batch's files, decodes its JPEGs with `_decode`, turns them upright unless `exif_orientation` is False,
    and resizes them with `shrink`. With two threads, one batch is read while another is decoded."""

    name: str
    threads: int | None = 2
    turns = False  # whether `_decode` always turns images upright itself

    def __init__(self, device: str = "cuda", exif_orientation: bool = True) -> None:
        self.device, self.exif_orientation = device, exif_orientation

    def decode(self, sources: Sequence[Any], geometry: Geometry, start: int = 0) -> DecodedBatch:
        """As Decoder.decode: within 1 level of the CPU's on average, on `device`."""
        jpegs = {i: data for i, source in enumerate(sources) if (data := _read_jpeg(source)) is not None}
        with _own_stream(self.device):
            pixels = self._shrunk(jpegs, geometry)
            results = [
                pixels[i] if i in pixels else try_decode(source, geometry, start + i, self.exif_orientation)
                for i, source in enumerate(sources)
            ]
            return DecodedBatch.collect(results, partial(stack, device=self.device))

    def _shrunk(self, jpegs: dict[int, bytes], geometry: Geometry) -> dict[int, torch.Tensor]:
        """The pixels (size, size, 3) of the JPEGs that the GPU can decode."""
        pixels = {}
        for (i, data), image in zip(jpegs.items(), self._decode([*jpegs.values()]), strict=True):
            orientation = _orientation(data) if self.exif_orientation or self.turns else 1
            if self.turns and orientation is not None:
                orientation = 1 if self.exif_orientation or orientation == 1 else None  # None: the CPU decodes it
            if (
                image is not None
                and orientation is not None
                and max(image.shape[1:]) <= _MAX_ASPECT * min(image.shape[1:])
            ):
                pixels[i] = shrink(turned(image, orientation), geometry).permute(1, 2, 0)
        return pixels

    @abstractmethod
    def _decode(self, data: list[bytes]) -> list[torch.Tensor | None]:
        """Each JPEG, as stored or (`turns`) upright: uint8 (3, H, W), RGB, on `device`; None for one that can't be
        decoded."""


class TorchCodecDecoder(GpuDecoder):
    """torchcodec.decoders.decode_jpeg, which is nvJPEG on a GPU and always applies the EXIF orientation."""

    name = "torchcodec"
    turns = True

    def _decode(self, data: list[bytes]) -> list[torch.Tensor | None]:
        decoders = require("torchcodec.decoders", "gpu")
        try:
            return list(decoders.decode_jpeg(data, mode="RGB", device=self.device)) if data else []
        except RuntimeError:  # one bad JPEG fails the whole batch
            return [None] if len(data) == 1 else [image for jpeg in data for image in self._decode([jpeg])]


class NvImageCodecDecoder(GpuDecoder):
    """nvidia.nvimgcodec, which uses the GPU's hardware decoders and its cores. Each thread has its own decoder."""

    name = "nvimagecodec"

    def __init__(self, device: str = "cuda", exif_orientation: bool = True) -> None:
        super().__init__(device, exif_orientation)
        self._codec = importlib.import_module("nvidia.nvimgcodec")
        self._thread = threading.local()
        # `turned` applies the orientation. RGB is the default; its name differs between versions.
        self._params = self._codec.DecodeParams(apply_exif_orientation=False)

    def _decode(self, data: list[bytes]) -> list[torch.Tensor | None]:
        torch = require("torch", "gpu")
        if not data:
            return []
        if not hasattr(self._thread, "decoder"):
            self._thread.decoder = self._codec.Decoder()
        stream = 0 if self.device == "cpu" else torch.cuda.current_stream(self.device).cuda_stream
        decoded = self._thread.decoder.decode(data, self._params, cuda_stream=stream)
        images = [None if image is None else torch.as_tensor(image, device=self.device) for image in decoded]
        return [None if image is None or image.shape[2] != 3 else image.permute(2, 0, 1) for image in images]


@contextmanager
def _own_stream(device: str) -> Iterator[None]:
    """A stream of `device` as the current one, which no other call uses; its work is done when the block ends."""
    if device == "cpu":
        yield
        return
    torch, idle = require("torch", "gpu"), _idle_streams[device]
    try:
        stream = idle.pop()
    except IndexError:
        stream = torch.cuda.Stream(device)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        stream.synchronize()
        idle.append(stream)


def stack(images: Sequence[np.ndarray | torch.Tensor], device: str) -> torch.Tensor:
    """Images (size, size, 3), tensors on `device` or arrays, as one tensor there, in order. All arrays are uploaded in
    one copy, and nothing waits for the tensors."""
    import torch

    arrays = [image for image in images if isinstance(image, np.ndarray)]
    uploaded = iter(torch.from_numpy(np.stack(arrays)).to(device) if arrays else ())
    return torch.stack([next(uploaded) if isinstance(image, np.ndarray) else image for image in images])


def turned(image: torch.Tensor, orientation: int) -> torch.Tensor:
    """`pixels.turn` on (3, H, W)."""
    if orientation > 4:  # the stored x is the upright y
        image = image.transpose(1, 2)
    axes = [axis for axis, reversing in ((1, (3, 4, 7, 8)), (2, (2, 3, 6, 7))) if orientation in reversing]
    return image.flip(axes) if axes else image


def _orientation(jpeg: bytes) -> int | None:
    """The EXIF orientation in the header; None if it can't be read (the CPU's decoder reports why)."""
    try:
        with opened(jpeg) as image:
            return orientation_of(image)
    except Exception:  # Pillow raises many types for damaged headers
        return None


def shrink(image: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """`resize_and_crop` on uint8 (3, H, W): resized with antialiasing, rounded and clamped -> (3, size, size) uint8."""
    import torch

    size, shape = geometry.size, geometry.resized(image.shape[2], image.shape[1])[::-1]
    if tuple(image.shape[1:]) != shape:
        resized = torch.nn.functional.interpolate(
            image[None].float(), shape, mode=geometry.interpolation, antialias=True, align_corners=False
        )[0]
        image = resized.round().clamp(0, 255).to(torch.uint8)
    if geometry.resize_mode == "longest":
        padded = image.new_full((3, size, size), geometry.fill)
        top, left = (size - shape[0]) // 2, (size - shape[1]) // 2
        padded[:, top : top + shape[0], left : left + shape[1]] = image
        return padded
    top, left = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
    return image[:, top : top + size, left : left + size]


def _read_jpeg(source: Any) -> bytes | None:
    """The bytes of a JPEG; None for anything else and for unreadable files."""
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
