"""Sources of labelled pictures to train on: in memory, in files, and subsets of another source."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.listing import list_folder
from iosr_fast.images.pixels import VERSION
from iosr_fast.images.preprocess import open_image, resize_and_crop


class PictureSource(Protocol):
    """Labelled pictures. `labels` (N,) int64 indexes `class_names`."""

    labels: torch.Tensor
    class_names: list[str]

    @property
    def fingerprint(self) -> str:
        """A hex digest that changes when the pictures, their labels, their order or their size change.

        For files it covers names, sizes and times of change, so that a large set need not be read.
        """
        ...

    def order(self, generator: torch.Generator) -> torch.Tensor:
        """An epoch's order: a permutation (N,) int64 that is a function of the generator's state."""
        ...

    def iterate(self, order: torch.Tensor, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of (rows, pixels): the parts of `order.split(batch)`, and their pixels (B, 3, S, S) uint8.

        `order` may be any part of an epoch's order: a process's share, or the rest after a resume.
        """
        ...


class TensorPictures:
    """Pictures that fit in memory: (N, 3, S, S) uint8."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, class_names: list[str]) -> None:
        self.images, self.labels, self.class_names = images, labels, class_names

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the pixels, the labels and the class names; hashed at the first use."""
        images = self.images.cpu().contiguous()
        arrays: list[str | np.ndarray] = [images.numpy(), self.labels.cpu().numpy()]
        return digest([str(tuple(images.shape)), *arrays, *self.class_names])

    def order(self, generator: torch.Generator) -> torch.Tensor:
        return torch.randperm(len(self.labels), generator=generator)

    def iterate(self, order: torch.Tensor, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows in order.split(batch) if len(order) else ():  # torch splits an empty order into an empty batch
            yield rows, self.images[rows]


class FilePictures:
    """One file for each picture, decoded by worker processes to the pixels of a `geometry`.

    `paths` and `labels` (N,) correspond; the fingerprint uses `names` (default: the paths), so it need not depend on
    the folder. `iterate` raises BadImageError with the path of an unreadable picture when it is reached.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        labels: torch.Tensor,
        class_names: list[str],
        geometry: Geometry,
        workers: int = 2,
        names: Sequence[str] | None = None,
    ) -> None:
        if len(paths) != len(labels):
            raise IosrFastError(f"expected one label a picture, got {len(paths)} pictures and {len(labels)} labels")
        self.paths, self.labels, self.class_names = paths, labels, class_names
        self.geometry, self.workers = geometry, workers
        self._names = names if names is not None else [str(path) for path in paths]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the files' names, sizes and times of change, the labels, class names, geometry and
        pixels.VERSION, computed at first use."""
        files = (f"{name}\0{stamp(path)}" for name, path in zip(self._names, self.paths, strict=True))
        return digest([str(VERSION), str(self.geometry), self.labels.numpy(), *self.class_names, *files])

    def order(self, generator: torch.Generator) -> torch.Tensor:
        return torch.randperm(len(self.labels), generator=generator)

    def iterate(self, order: torch.Tensor, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        from torch.utils.data import DataLoader

        if not len(order):
            return
        loader: Iterable[torch.Tensor | _Bad] = DataLoader(
            _Decoded(self.paths, self.geometry),  # type: ignore[arg-type]  # a map-style data set need not inherit
            batch_size=batch,
            sampler=order.tolist(),
            num_workers=self.workers,
            collate_fn=_stack,
            generator=torch.Generator(),  # with the default, the global one, dropout would depend on the source
        )
        for rows, pixels in zip(order.split(batch), loader, strict=True):
            if not isinstance(pixels, torch.Tensor):
                raise BadImageError(*pixels)
            yield rows, pixels


class FolderPictures(FilePictures):
    """A folder with one sub-folder a class (torchvision's ImageFolder layout).

    Raises FileNotFoundError without the folder, ValueError for fewer than two classes or a class without images.
    """

    def __init__(self, folder: str | Path, geometry: Geometry, workers: int = 2) -> None:
        paths, classes, class_names = list_folder(folder)
        index = {name: i for i, name in enumerate(class_names)}
        labels = torch.tensor([index[name] for name in classes])
        names = [path.relative_to(folder).as_posix() for path in paths]
        super().__init__(paths, labels, class_names, geometry, workers, names)


# BadImageError's arguments, which a worker returns for an unreadable picture. The DataLoader would turn the exception
# itself into a RuntimeError, because BadImageError takes more than a message.
_Bad = tuple[Path, int, str]


class _Decoded:
    """The map-style data set of FilePictures for the worker processes."""

    def __init__(self, paths: Sequence[str | Path], geometry: Geometry) -> None:
        self.paths, self.geometry = paths, geometry

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> torch.Tensor | _Bad:
        try:
            return to_tensor(open_image(Path(self.paths[row]), row), self.geometry)
        except BadImageError as error:
            return Path(self.paths[row]), row, error.reason


def _stack(pictures: list[torch.Tensor | _Bad]) -> torch.Tensor | _Bad:
    for picture in pictures:
        if not isinstance(picture, torch.Tensor):
            return picture
    return torch.stack([picture for picture in pictures if isinstance(picture, torch.Tensor)])


def to_tensor(image: object, geometry: Geometry) -> torch.Tensor:
    """A PIL image as the pixels of a geometry: (3, size, size) uint8."""
    return torch.from_numpy(np.array(resize_and_crop(open_image(image), geometry))).permute(2, 0, 1).contiguous()


def demo_pictures(geometry: Geometry) -> TensorPictures:
    """The demo's generic concepts, as the encoder's pixels."""
    from iosr_fast.clip.demo.pictures import load_pictures
    from iosr_fast.images.preprocess import to_pixels

    pictures = load_pictures("generic")
    images = torch.from_numpy(to_pixels(pictures.images, geometry)).permute(0, 3, 1, 2)
    return TensorPictures(images, torch.from_numpy(pictures.concepts), pictures.names)


class SubsetPictures:
    """The `rows` (K,) int64 of another source, in that order, as a source of their own with the same class names.

    An epoch's order is that of the whole source without the other rows, so shards are still read from start to end.
    Raises ValueError for rows outside the source or repeated ones.
    """

    def __init__(self, source: PictureSource, rows: torch.Tensor) -> None:
        total = len(source.labels)
        rows = torch.as_tensor(rows, dtype=torch.int64)
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= total):
            raise IosrFastError(
                f"expected rows from 0 to {total - 1}, got some from {int(rows.min())} to {int(rows.max())}"
            )
        self._position = torch.full((total,), -1)
        self._position[rows] = torch.arange(len(rows))
        if int((self._position >= 0).sum()) != len(rows):
            raise IosrFastError(f"expected each row once, got {len(rows)} rows with repeats among them")
        self.source, self.rows = source, rows
        self.labels, self.class_names = source.labels[rows], source.class_names

    @property
    def fingerprint(self) -> str:
        return digest((self.source.fingerprint, self.rows.numpy()))

    def order(self, generator: torch.Generator) -> torch.Tensor:
        positions = self._position[self.source.order(generator)]
        return positions[positions >= 0]

    def iterate(self, order: torch.Tensor, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows, pixels in self.source.iterate(self.rows[order], batch):
            yield self._position[rows], pixels


def split(source: PictureSource, share: float, seed: int) -> tuple[SubsetPictures, SubsetPictures]:
    """(train, held out): `share` of each class held out at random, at least two pictures of it and at most half.

    Measures of pairs need two. A class of fewer than four pictures stays in training. Raises ValueError unless
    0 < share < 1.
    """
    if not 0 < share < 1:
        raise IosrFastError(f"expected a share between 0 and 1 (both excluded), got {share}")
    rng = np.random.default_rng(seed)
    labels = source.labels.numpy()
    held_out = np.zeros(len(labels), bool)
    by_class = np.argsort(labels, kind="stable")
    for rows in np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1):
        if len(rows) >= 4:
            count = min(max(round(share * len(rows)), 2), len(rows) // 2)
            held_out[rng.choice(rows, count, replace=False)] = True
    train, out = torch.from_numpy(np.flatnonzero(~held_out)), torch.from_numpy(np.flatnonzero(held_out))
    return SubsetPictures(source, train), SubsetPictures(source, out)


def digest(parts: Iterable[str | np.ndarray]) -> str:
    """SHA-256 over texts and arrays, each preceded by its length, so that another division gives another digest."""
    hasher = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else np.ascontiguousarray(part).data
        hasher.update(f"{memoryview(data).nbytes}:".encode())
        hasher.update(data)
    return hasher.hexdigest()


def stamp(path: str | Path) -> str:
    """Size in bytes and time of change in nanoseconds of a file. Raises FileNotFoundError without it."""
    facts = os.stat(path)
    return f"{facts.st_size} {facts.st_mtime_ns}"
