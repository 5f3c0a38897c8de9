"""Labelled pictures to train on, in memory or in files, behind one way of iterating."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from iosr_fast.images.listing import list_folder
from iosr_fast.images.pixels import VERSION
from iosr_fast.images.preprocess import BadImageError, open_image, resize_and_crop
from iosr_fast.training.data._files import digest, stamp


class PictureSource(Protocol):
    """Labelled pictures. `labels` (N,) int64 indexes `class_names`."""

    labels: torch.Tensor
    class_names: list[str]

    @property
    def fingerprint(self) -> str:
        """A hex digest that changes when the pictures, their labels, their order or their size change.

        Sources of files take names, sizes and times of change for it: a large set is never read for its fingerprint.
        """
        ...

    def order(self, generator: torch.Generator) -> torch.Tensor:
        """An epoch's order: a permutation (N,) int64 that is a function of the generator's state."""
        ...

    def iterate(self, order: torch.Tensor, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of (rows, pixels): the parts of `order.split(batch)`, and (B, 3, S, S) uint8 pixels of theirs.

        `order` may be any part of an epoch's order: a process's share of it, or what is left of it after a resume.
        """
        ...


class TensorPictures:
    """Pictures that fit in memory: (N, 3, S, S) uint8."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, class_names: list[str]) -> None:
        self.images, self.labels, self.class_names = images, labels, class_names
        self._fingerprint = ""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the pixels, the labels and the class names; hashed at the first use."""
        if not self._fingerprint:
            images = self.images.cpu().contiguous()
            arrays: list[str | np.ndarray] = [images.numpy(), self.labels.cpu().numpy()]
            self._fingerprint = digest([str(tuple(images.shape)), *arrays, *self.class_names])
        return self._fingerprint

    def order(self, generator: torch.Generator) -> torch.Tensor:
        return torch.randperm(len(self.labels), generator=generator)

    def iterate(self, order: torch.Tensor, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows in split_order(order, batch):
            yield rows, self.images[rows]


class FilePictures:
    """One file a picture, decoded by worker processes; CLIP's resize and centre crop.

    `paths` and `labels` (N,) belong together; `names` are what the fingerprint calls the files, so that it does not
    depend on where they lie. An unreadable picture raises BadImageError with its path when its turn comes.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        labels: torch.Tensor,
        class_names: list[str],
        size: int,
        workers: int = 2,
        names: Sequence[str] | None = None,
    ) -> None:
        if len(paths) != len(labels):
            raise ValueError(f"expected one label a picture, got {len(paths)} pictures and {len(labels)} labels")
        self.paths, self.labels, self.class_names = paths, labels, class_names
        self.size, self.workers = size, workers
        self._names = names if names is not None else [str(path) for path in paths]
        self._fingerprint = ""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the files' names, sizes and times of change, the labels, class names, size and pixels.VERSION;
        at first use."""
        if not self._fingerprint:
            files = (f"{name}\0{stamp(path)}" for name, path in zip(self._names, self.paths, strict=True))
            self._fingerprint = digest([str(VERSION), str(self.size), self.labels.numpy(), *self.class_names, *files])
        return self._fingerprint

    def order(self, generator: torch.Generator) -> torch.Tensor:
        return torch.randperm(len(self.labels), generator=generator)

    def iterate(self, order: torch.Tensor, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        from torch.utils.data import DataLoader

        if not len(order):
            return
        loader: Iterable[torch.Tensor | _Bad] = DataLoader(
            _Decoded(self.paths, self.size),  # type: ignore[arg-type]  # a map-style data set need not inherit
            batch_size=batch,
            sampler=order.tolist(),
            num_workers=self.workers,
            collate_fn=_stack,
            generator=torch.Generator(),  # else it draws from the global one, and dropout depends on the source
        )
        for rows, pixels in zip(order.split(batch), loader, strict=True):
            if not isinstance(pixels, torch.Tensor):
                raise BadImageError(*pixels)
            yield rows, pixels


class FolderPictures(FilePictures):
    """A folder with one sub-folder a class (torchvision's ImageFolder layout).

    Raises FileNotFoundError without the folder, ValueError for fewer than two classes or a class without images.
    """

    def __init__(self, folder: str | Path, size: int, workers: int = 2) -> None:
        paths, classes, class_names = list_folder(folder)
        index = {name: i for i, name in enumerate(class_names)}
        labels = torch.tensor([index[name] for name in classes])
        names = [path.relative_to(folder).as_posix() for path in paths]
        super().__init__(paths, labels, class_names, size, workers, names)


# What a worker hands back for an unreadable picture: BadImageError's arguments. An exception raised in a worker comes
# back as a RuntimeError, because it takes more than a message to make this one.
_Bad = tuple[Path, int, str]


class _Decoded:
    """The map-style data set behind FilePictures: all that a worker process needs."""

    def __init__(self, paths: Sequence[str | Path], size: int) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> torch.Tensor | _Bad:
        try:
            return to_tensor(open_image(Path(self.paths[row]), row), self.size)
        except BadImageError as error:
            return Path(self.paths[row]), row, error.reason


def _stack(pictures: list[torch.Tensor | _Bad]) -> torch.Tensor | _Bad:
    for picture in pictures:
        if not isinstance(picture, torch.Tensor):
            return picture
    return torch.stack([picture for picture in pictures if isinstance(picture, torch.Tensor)])


def to_tensor(image: object, size: int) -> torch.Tensor:
    """A PIL image, resized and cropped as CLIP does: (3, size, size) uint8."""
    return torch.from_numpy(np.array(resize_and_crop(open_image(image), size))).permute(2, 0, 1).contiguous()


def split_order(order: torch.Tensor, batch: int) -> tuple[torch.Tensor, ...]:
    """`order.split(batch)`, but no batch at all for an empty order (torch gives an empty one)."""
    return order.split(batch) if len(order) else ()


def demo_pictures(size: int) -> TensorPictures:
    """The demo's generic concepts, resized to the encoder's size where that is not their own."""
    from iosr_fast.clip.demo.pictures import load_pictures
    from iosr_fast.images.preprocess import to_pixels

    pictures = load_pictures("generic")
    images = torch.from_numpy(to_pixels(pictures.images, size)).permute(0, 3, 1, 2)
    return TensorPictures(images, torch.from_numpy(pictures.concepts), pictures.names)
