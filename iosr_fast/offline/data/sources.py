"""Labelled pictures to train on, in memory or in a folder, behind one way of iterating."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from iosr_fast.preprocess import list_folder, open_image, resize_and_crop


class PictureSource(Protocol):
    """`labels` (N,) int64 indexes `class_names`; `iterate` yields pixels (B, 3, S, S) uint8 in the given order."""

    labels: torch.Tensor
    class_names: list[str]

    def iterate(self, order: torch.Tensor, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of (rows, pixels), `rows` being the part of `order` that the pixels belong to."""
        ...


class TensorPictures:
    """Pictures that fit in memory: (N, 3, S, S) uint8."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, class_names: list[str]) -> None:
        self.images, self.labels, self.class_names = images, labels, class_names

    def iterate(self, order: torch.Tensor, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows in order.split(batch):
            yield rows, self.images[rows]


class FolderPictures:
    """A folder with one sub-folder a class, decoded by worker processes; CLIP's resize and centre crop."""

    def __init__(self, folder: str | Path, size: int, workers: int = 2) -> None:
        self.paths, names, self.class_names = list_folder(folder)
        index = {name: i for i, name in enumerate(self.class_names)}
        self.labels = torch.tensor([index[name] for name in names])
        self.size, self.workers = size, workers

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> torch.Tensor:
        pixels = resize_and_crop(open_image(self.paths[row]), self.size)
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)

    def iterate(self, order: torch.Tensor, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        from torch.utils.data import DataLoader

        loader: Iterable[torch.Tensor] = DataLoader(
            self,  # type: ignore[arg-type]  # a map-style data set need not inherit
            batch_size=batch,
            sampler=order.tolist(),
            num_workers=self.workers,
        )
        yield from zip(order.split(batch), loader, strict=True)


def demo_pictures(size: int) -> TensorPictures:
    """The demo's generic concepts, resized to the encoder's size where that is not their own."""
    from iosr_fast.demo.pictures import load_pictures
    from iosr_fast.preprocess import to_pixels

    pictures = load_pictures("generic")
    images = torch.from_numpy(to_pixels(pictures.images, size)).permute(0, 3, 1, 2)
    return TensorPictures(images, torch.from_numpy(pictures.concepts), pictures.names)
