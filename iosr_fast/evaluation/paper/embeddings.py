"""Embeddings of a run, kept in .npz files named by a hash of all that they depend on: an interrupted run loses one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.evaluation.demo import BATCH, Encode
from iosr_fast.evaluation.sets import EvaluationSet
from iosr_fast.images import pixels
from iosr_fast.images.preprocess import resize_and_crop
from iosr_fast.sealed.files import new_file
from iosr_fast.utils.machine import usable_threads
from iosr_fast.utils.ordered import map_ordered
from iosr_fast.utils.progress import progress

if TYPE_CHECKING:
    from PIL.Image import Image

    from iosr_fast.backbones.load import LoadedModel
    from iosr_fast.images.geometry import Geometry

PART = 1024  # images of a file at most
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Images:
    """Images of a split, `rows` (N,), each as the mean of `views` random views, or with 1 view as CLIP crops it."""

    data: EvaluationSet
    split: str
    rows: np.ndarray
    views: int = 1
    seed: int = 0

    @property
    def facts(self) -> dict[str, Any]:
        """All that their pixels depend on. One view is the same for every seed."""
        times = self.data.splits[self.split].times[self.rows]  # a changed file may have the same size
        part = [self.data.fingerprint, self.split, self.rows.tolist(), times.tolist()]
        return {"pixels": pixels.VERSION, "images": part, "views": self.views, "seed": (self.views > 1) * self.seed}

    def generator(self) -> np.random.Generator:
        """Of the random views: the same for every CLIP and adapter."""
        identity = f"{self.data.fingerprint} {self.split} {self.rows.tolist()} {self.seed}"
        return np.random.default_rng(int(hashlib.sha256(identity.encode()).hexdigest(), 16))


@dataclass(frozen=True)
class KeptEmbeddings:
    """Embeddings by one CLIP, and its adapter if it has one, read from `folder` or encoded and kept there.

    `facts` says which CLIP and adapter `encode` is. `report` gets a line for each damaged file.
    """

    folder: Path
    clip: LoadedModel
    encode: Encode
    facts: dict[str, Any]
    report: Callable[[str], None]

    def images(self, images: Images) -> Embeddings:
        """Read, or encoded and written, PART images at a time. Raises BadImageError for one that can't be read."""
        parts = []
        for start in range(0, len(images.rows), PART):
            part = replace(images, rows=images.rows[start : start + PART])
            arrays = self._kept(f"{images.data.name}-{images.split}", part.facts, partial(self._encode, part))
            parts.append(Embeddings(arrays["plain"], arrays.get("adapted")))
        return Embeddings.concatenate(parts)

    def text(self, data: EvaluationSet) -> np.ndarray:
        """(C, D) float32, L2-normalised: the class names in the set's templates."""
        from iosr_fast.backbones.prompts import embed_classes

        names, templates = list(data.class_names), list(data.templates)
        facts = {"names": names, "templates": templates}
        return self._kept(f"{data.name}-text", facts, lambda: {"text": embed_classes(self.clip, names, templates)})[
            "text"
        ]

    def _kept(self, name: str, facts: dict[str, Any], make: Callable[[], Arrays]) -> Arrays:
        path = self.folder / f"{name}-{digest({**self.facts, **facts})[:32]}.npz"
        try:
            with np.load(path, allow_pickle=False) as file:  # checks the CRC-32 of each array
                return {key: file[key] for key in file.files}
        except FileNotFoundError:
            pass
        except (ValueError, EOFError, BadZipFile) as error:
            self.report(f"{path} is damaged and is made again: {error}")
        arrays = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        return arrays

    def _encode(self, part: Images) -> Arrays:
        """Threads decode pictures ahead, and for one view bring them to size; for several views these wait at their
        full size, so fewer are decoded ahead."""
        geometry, threads = self.clip.geometry, max(2, usable_threads())

        def decode(row: int) -> Any:
            image = part.data.splits[part.split].image(row, geometry)
            return resize_and_crop(image, geometry) if part.views == 1 else image

        rng, parts = part.generator(), []
        ahead = 128 if part.views == 1 else 2 * threads
        with (
            progress(f"encoding {part.data.name}, {part.split}", len(part.rows)) as advance,
            closing(map_ordered(part.rows.tolist(), decode, threads, ahead)) as images,
        ):
            while batch := list(islice(images, max(1, BATCH // part.views))):
                views = batch
                if part.views > 1:
                    views = [random_view(image, geometry, rng) for image in batch for _ in range(part.views)]
                parts.append(mean_of_views(self.encode(np.stack(views)), part.views))
                advance(len(batch))
        found = Embeddings.concatenate(parts)
        return {name: rows for name, rows in vars(found).items() if rows is not None}


def random_view(image: Image, geometry: Geometry, rng: np.random.Generator) -> np.ndarray:
    """A random crop of half to all of the area, resized to (size, size, 3) uint8, half of the time mirrored.

    Equals the papers' augmentation: torchvision's RandomResizedCrop(scale=(0.5, 1)) and RandomHorizontalFlip, for any
    resize mode, as open_clip trains.
    """
    width, height = image.size
    area = width * height * rng.uniform(0.5, 1.0)
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    crop_width = min(width, max(1, round((area * ratio) ** 0.5)))
    crop_height = min(height, max(1, round((area / ratio) ** 0.5)))
    left, top = int(rng.integers(width - crop_width + 1)), int(rng.integers(height - crop_height + 1))
    box = (left, top, left + crop_width, top + crop_height)
    view = np.asarray(image.resize((geometry.size, geometry.size), resample=geometry.resampling, box=box))
    return np.ascontiguousarray(view[:, ::-1]) if rng.random() < 0.5 else view


def mean_of_views(embeddings: Embeddings, views: int) -> Embeddings:
    """The mean of each `views` consecutive rows, L2-normalised again, as Tip-Adapter builds its cache from random views
    (Zhang et al., ECCV 2022, section 3.1). Embeddings (N * views, D) become (N, D).
    """

    def mean(rows: np.ndarray) -> np.ndarray:
        means = rows.reshape(-1, views, rows.shape[1]).mean(1)
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    return Embeddings(mean(embeddings.plain), None if embeddings.adapted is None else mean(embeddings.adapted))


def digest(facts: Any) -> str:
    """SHA-256 of the JSON with sorted keys, in hex digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
