"""The pictures of a training by name: the demo's, a folder of class folders, Open Images, WebDataset shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.geometry import Geometry
from iosr_fast.training.data import (
    FolderPictures,
    PictureSource,
    ShardPictures,
    SubsetPictures,
    TensorPictures,
    demo_pictures,
    split,
)
from iosr_fast.training.data.open_images import OpenImagesPictures


@dataclass(frozen=True)
class Sources:
    """`held_out` (at the encoder's size) shares no picture with `train`; `notes` are for the terminal."""

    train: PictureSource
    held_out: PictureSource | None
    notes: tuple[str, ...] = ()


def open_sources(
    data: str,
    geometry: Geometry,
    held_out_geometry: Geometry,
    held_out: float,
    workers: int,
    seed: int,
    csv: Path | None = None,
    images: Path | None = None,
    skip_missing: bool = False,
) -> Sources:
    """Pictures of `geometry` to train on, and a share `held_out` of every class, of `held_out_geometry`, to measure on.

    The demo's held-out pictures are those of its validation concepts, on which no accuracy is reported. Raises
    ValueError or OSError, naming what is missing, before decoding.
    """
    if (data == "open-images") != (csv is not None and images is not None):
        raise IosrFastError("expected --csv FILE and --images DIR with --data open-images, and only with it")
    if data == "demo":
        return Sources(demo_pictures(geometry), validation_pictures(held_out_geometry))
    notes: tuple[str, ...] = ()

    def open_at(at: Geometry) -> PictureSource:
        if csv is not None and images is not None:
            return OpenImagesPictures(csv, images, at, workers, leave_out_missing=skip_missing)
        return ShardPictures(data, at, workers) if is_shards(data) else FolderPictures(data, at, workers)

    source = open_at(geometry)
    if missing := getattr(source, "missing", ()):
        notes = (f"skipped {len(missing)} pictures of the CSV that are missing from {images}, first {missing[0]}",)
    if not held_out:
        return Sources(source, None, notes)
    train, measured = split(source, held_out, seed)
    if len(measured.labels.unique()) < 2:
        note = "nothing is measured between epochs: fewer than two classes have at least four pictures"
        return Sources(source, None, (*notes, note))
    if geometry != held_out_geometry:
        measured = SubsetPictures(open_at(held_out_geometry), measured.rows)
    return Sources(train, measured, notes)


def is_shards(data: str) -> bool:
    """Whether `data` is a .tar file, a pattern of .tar files, or a folder with some."""
    folder = Path(data)
    return ".tar" in folder.name or (folder.is_dir() and next(folder.glob("*.tar"), None) is not None)


def validation_pictures(geometry: Geometry) -> TensorPictures:
    """The demo's validation concepts: held out from the training of its CLIP and of its adapter."""
    from iosr_fast.clip.demo.pictures import held_out
    from iosr_fast.images.preprocess import to_pixels

    _, pictures = held_out()
    images = torch.from_numpy(to_pixels(pictures.images, geometry)).permute(0, 3, 1, 2)
    return TensorPictures(images, torch.from_numpy(pictures.concepts), pictures.names)
