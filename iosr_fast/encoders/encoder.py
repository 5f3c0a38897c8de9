"""The interface of every runtime: uint8 pixels in, both embeddings out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from iosr_fast.images.geometry import Geometry
from iosr_fast.utils.require import require

if TYPE_CHECKING:
    from iosr_fast.sealed.verified_folder import VerifiedFolder

# A NumPy array, a torch tensor on any device, or an object with __dlpack__. The package's encoders return NumPy arrays.
Array: TypeAlias = Any


@dataclass(frozen=True)
class Embeddings:
    """L2-normalised image embeddings of one batch.

    `plain` (B, D) is compared with text; `adapted` (B, D), computed with the adapter, is compared with images, and is
    None for an encoder without an adapter. Both are float32 NumPy arrays, or torch tensors on one device (float32,
    float16 or bfloat16; `score` computes there), or other objects with `__dlpack__`.

    >>> import numpy as np
    >>> rows = Embeddings(plain=np.eye(3, dtype=np.float32), adapted=np.eye(3, dtype=np.float32)[::-1])
    >>> len(rows), rows[:2].adapted.shape
    (3, (2, 3))
    """

    plain: Array
    adapted: Array | None = None

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, rows: slice | np.ndarray) -> Embeddings:
        return Embeddings(self.plain[rows], None if self.adapted is None else self.adapted[rows])

    def to_numpy(self) -> Embeddings:
        """Tensors as float32 NumPy arrays in CPU memory; arrays as they are."""
        return Embeddings(as_numpy(self.plain), None if self.adapted is None else as_numpy(self.adapted))

    @classmethod
    def of_rows(cls, rows: np.ndarray, adapted: bool = False) -> Embeddings:
        """Rows (n, D) of any length and real dtype, at unit length; with `adapted` (n, 2 D), plain beside adapted."""
        return cls(*map(unit, np.split(rows, 1 + adapted, axis=1)))

    @classmethod
    def concatenate(cls, parts: Sequence[Embeddings]) -> Embeddings:
        """The rows of all parts (NumPy arrays or tensors), in order; `adapted` only if every part has it."""
        adapted = [part.adapted for part in parts if part.adapted is not None]
        join = np.concatenate if isinstance(parts[0].plain, np.ndarray) else require("torch", "cpu").cat
        return cls(join([part.plain for part in parts]), join(adapted) if len(adapted) == len(parts) else None)


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows at unit length, (n, D) float32; zeros stay. The largest channel becomes 1 first: no square overflows."""
    exact = np.array(rows, np.float64, order="C")
    largest = np.abs(exact).max(axis=1, keepdims=True)
    exact /= np.where(largest > 0, largest, 1.0)
    exact /= np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), 1.0)
    return exact.astype(np.float32)


def are_usable(rows: np.ndarray, adapted: bool) -> np.ndarray:
    """(n,) whether each of the rows of Embeddings.of_rows has a direction: zeros have none."""
    usable: np.ndarray = np.logical_and.reduce([part.any(axis=1) for part in np.split(rows, 1 + adapted, axis=1)])
    return usable


def as_numpy(rows: Array) -> np.ndarray:
    """A tensor as a float32 NumPy array, waiting for its device; an array as it is."""
    if isinstance(rows, np.ndarray):
        return rows
    array: np.ndarray = rows.detach().float().cpu().numpy()
    return array


class Encoder(Protocol):
    """An image encoder, compiled or eager. A subclass inherits the defaults below.

    image_size, width  side of the square images that it takes; channels D of its embeddings
    geometry           how a picture of any shape becomes such an image; a subclass may override it
    fingerprint        identifies the exact export, so that keys are never compared with another encoder's queries
    runtime            "onnxruntime", "openvino", "torch", "tensorrt", "tensorrt_rtx", or a name of your own
    adapted            whether it returns adapted embeddings beside the plain ones
    max_batch          the largest batch of one run; `encode` splits larger ones
    buckets            the batch sizes that a GPU executes; None on a CPU, which executes any size
    threads            CPU threads of one run; None for the runtime's choice
    runs               how many threads may execute it at once, with one copy of the weights; further ones wait
    parallel           whether `open_engine` can open it for more than one of `runs`
    source             the verified engine folder that the encoder was opened from, or None

    >>> import numpy as np
    >>> from iosr_fast import Classifier
    >>> encoder = Classifier("demo").encoder
    >>> encoder.image_size, encoder.width, encoder.adapted
    (64, 128, True)
    >>> encoder.encode(np.zeros((2, 64, 64, 3), np.uint8)).adapted.shape
    (2, 128)
    """

    image_size: int
    width: int
    fingerprint: str
    runtime: str
    adapted: bool
    max_batch: int = 64
    buckets: tuple[int, ...] | None = None
    threads: int | None = None
    runs: int = 1
    parallel: bool = False
    source: VerifiedFolder | None = None

    @property
    def geometry(self) -> Geometry:
        """By default that of OpenAI's CLIP: the shorter side resized to `image_size`, the centre cropped."""
        return Geometry(self.image_size)

    @abstractmethod
    def encode(self, pixels: np.ndarray) -> Embeddings:
        """Encode uint8 RGB pixels (B, image_size, image_size, 3), B >= 1, to float32 embeddings (B, width)."""

    def encode_on_device(self, pixels: np.ndarray) -> Embeddings:
        """As `encode`, but an encoder on a GPU gives tensors there, which `score` reads where they are; nothing waits
        for the GPU."""
        return self.encode(pixels)

    def accepts(self, image: Any) -> bool:
        """Whether an image already has the form of one that `encode` takes."""
        return (
            isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape == (self.image_size,) * 2 + (3,)
        )

    def blank(self, count: int) -> np.ndarray:
        """So many black images, as `encode` takes them."""
        return np.zeros((count, self.image_size, self.image_size, 3), np.uint8)

    def warm(self, sizes: Iterable[int] | None = None) -> None:
        """Run each batch size once (None: the buckets, or 1), so that no request pays for a first run."""
        for size in (self.buckets or (1,)) if sizes is None else sizes:
            self.encode(self.blank(size))
