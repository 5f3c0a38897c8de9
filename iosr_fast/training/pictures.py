"""Labelled pictures to train on: in memory, or in files, listed by a folder or a CSV file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.pixels import VERSION
from iosr_fast.images.preprocess import decode_pixels, to_pixels

if TYPE_CHECKING:
    from iosr_fast.backbones.demo.pictures import Pictures


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

    def iterate(self, rows: torch.Tensor, batch: int) -> Iterator[torch.Tensor]:
        """The pixels (B, 3, S, S) uint8 of each part of `rows.split(batch)`; `rows` (K,) int64 are in any order."""
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

    def iterate(self, rows: torch.Tensor, batch: int) -> Iterator[torch.Tensor]:
        for part in rows.split(batch) if len(rows) else ():  # torch splits no rows into an empty batch
            yield self.images[part]


class FilePictures:
    """One file for each picture, decoded by `workers` processes (0: this one) to the pixels of a `geometry`.

    `paths` and `labels` (N,) correspond. The fingerprint does not depend on the folder in which all files lie.
    `iterate` raises BadImageError with the path of an unreadable picture when it is reached.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        labels: torch.Tensor,
        class_names: list[str],
        geometry: Geometry,
        workers: int = 2,
    ) -> None:
        if len(paths) != len(labels):
            raise IosrFastError(f"expected one label a picture, got {len(paths)} pictures and {len(labels)} labels")
        self.paths, self.labels, self.class_names = paths, labels, class_names
        self.geometry, self.workers = geometry, workers

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the files' names, sizes and times of change, the labels, class names, geometry and
        pixels.VERSION, computed at first use."""
        root = os.path.commonpath([os.path.dirname(path) for path in self.paths])
        files = (f"{os.path.relpath(path, root)}\0{_stamp(path)}" for path in self.paths)
        return digest([str(VERSION), str(self.geometry), self.labels.numpy(), *self.class_names, *files])

    def iterate(self, rows: torch.Tensor, batch: int) -> Iterator[torch.Tensor]:
        from torch.utils.data import DataLoader

        if not len(rows):
            return
        loader: Iterable[torch.Tensor | _Bad] = DataLoader(
            _Decoded(self.paths, self.geometry),  # type: ignore[arg-type]  # a map-style data set need not inherit
            batch_size=batch,
            sampler=rows.tolist(),
            num_workers=self.workers,
            collate_fn=_stack,
            generator=torch.Generator(),  # with the default, the global one, dropout would depend on the source
        )
        for pixels in loader:
            if not isinstance(pixels, torch.Tensor):
                raise BadImageError(*pixels)
            yield pixels


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
        path = Path(self.paths[row])
        try:
            pixels = np.array(decode_pixels(path, self.geometry, row))
        except BadImageError as error:
            return path, row, error.reason
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _stack(pictures: list[torch.Tensor | _Bad]) -> torch.Tensor | _Bad:
    bad = [picture for picture in pictures if not isinstance(picture, torch.Tensor)]
    return bad[0] if bad else torch.stack([picture for picture in pictures if isinstance(picture, torch.Tensor)])


@dataclass(frozen=True)
class Sources:
    """`held_out` (at the encoder's size) shares no picture with `train`; `notes` are for the terminal."""

    train: PictureSource
    held_out: PictureSource | None
    notes: tuple[str, ...] = ()


def file_sources(
    paths: Sequence[Path],
    names: Sequence[str],
    geometry: Geometry,
    held_out_geometry: Geometry,
    share: float,
    seed: int,
    workers: int,
    skip_missing: bool = False,
) -> Sources:
    """Pictures of `geometry` to train on, and a `share` of every class, of `held_out_geometry`, to measure on.

    `names` are the class names of `paths`. Raises FileNotFoundError for paths without a file unless `skip_missing`.
    """
    notes: tuple[str, ...] = ()
    if missing := [path for path in paths if not path.is_file()]:
        if not skip_missing or len(missing) == len(paths):
            raise FileNotFoundError(
                f"{len(missing)} of {len(paths)} pictures are missing, first {missing[0]}: correct the list, or leave "
                "them out by skip_missing of --settings"
            )
        absent = set(missing)
        names = [name for name, path in zip(names, paths, strict=True) if path not in absent]
        paths = [path for path in paths if path not in absent]
        notes = (f"skipped {len(missing)} pictures that are missing, first {missing[0]}",)
    class_names = sorted(set(names))
    index = {name: i for i, name in enumerate(class_names)}
    labels = torch.tensor([index[name] for name in names])

    def pictures(rows: torch.Tensor, size: Geometry) -> FilePictures:
        return FilePictures([paths[row] for row in rows.tolist()], labels[rows], class_names, size, workers)

    everything = torch.arange(len(labels))
    train, measured = split(labels, share, seed) if share else (everything, everything[:0])
    if len(labels[measured].unique()) >= 2:
        return Sources(pictures(train, geometry), pictures(measured, held_out_geometry), notes)
    if share:
        notes += ("nothing is measured between epochs: fewer than two classes have at least four pictures",)
    return Sources(pictures(everything, geometry), None, notes)


def split(labels: torch.Tensor, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (to train on, held out): `share` of each class held out at random, at least two of it and at most half.

    Measures of pairs need two. A class of fewer than four pictures stays in training.
    """
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), bool)
    by_class = np.argsort(labels.numpy(), kind="stable")
    for rows in np.split(by_class, np.flatnonzero(np.diff(labels.numpy()[by_class])) + 1):
        if len(rows) >= 4:
            count = min(max(round(share * len(rows)), 2), len(rows) // 2)
            held_out[rng.choice(rows, count, replace=False)] = True
    return torch.from_numpy(np.flatnonzero(~held_out)), torch.from_numpy(np.flatnonzero(held_out))


def demo_sources(geometry: Geometry, held_out_geometry: Geometry) -> Sources:
    """The demo's generic concepts, and its validation concepts, on which no accuracy is reported, to measure on."""
    from iosr_fast.backbones.demo.pictures import held_out

    return Sources(demo_pictures(geometry), _tensor_pictures(held_out()[1], held_out_geometry))


def demo_pictures(geometry: Geometry) -> TensorPictures:
    """The demo's generic concepts, as the encoder's pixels."""
    from iosr_fast.backbones.demo.pictures import load_pictures

    return _tensor_pictures(load_pictures("generic"), geometry)


def _tensor_pictures(pictures: Pictures, geometry: Geometry) -> TensorPictures:
    images = torch.from_numpy(to_pixels(pictures.images, geometry)).permute(0, 3, 1, 2)
    return TensorPictures(images, torch.from_numpy(pictures.concepts), pictures.names)


def digest(parts: Iterable[str | np.ndarray]) -> str:
    """SHA-256 over texts and arrays, each preceded by its length, so that another division gives another digest."""
    hasher = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else np.ascontiguousarray(part).data
        hasher.update(f"{memoryview(data).nbytes}:".encode())
        hasher.update(data)
    return hasher.hexdigest()


def _stamp(path: str | Path) -> str:
    """Size in bytes and time of change in nanoseconds of a file. Raises FileNotFoundError without it."""
    facts = os.stat(path)
    return f"{facts.st_size} {facts.st_mtime_ns}"
