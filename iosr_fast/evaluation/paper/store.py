"""Embeddings on disk, each part under a hash of all that it depends on, so that nothing stale is read.

A part is a folder of at most PART images: a safetensors file and a manifest with the facts behind its name. It appears
whole or not at all; an interrupted run loses only the part in work.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.evaluation.paper.cells import digest
from iosr_fast.evaluation.paper.model import Model
from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.images import pixels
from iosr_fast.images.preprocess import open_image, random_view, resize_and_crop
from iosr_fast.methods.support_set import mean_of_views
from iosr_fast.utils.folders import new_folder
from iosr_fast.utils.machine import usable_threads
from iosr_fast.utils.manifest import read_manifest, write_manifest
from iosr_fast.utils.ordered import map_ordered
from iosr_fast.utils.temporaries import remove_leftovers

if TYPE_CHECKING:
    from iosr_fast.evaluation.sets import EvaluationSet

VERSION = 1  # raise it when the same facts give other embeddings than before
PART, BATCH = 1024, 64
KIND, TEXT_KIND = "embeddings", "text embeddings"
FILE = "embeddings.safetensors"


@dataclass(frozen=True, eq=False)
class Wanted:
    """Images of a split, `rows` (N,), each as the mean of `views` random views, or with 1 view as CLIP crops it."""

    data: EvaluationSet
    split: str
    rows: np.ndarray
    views: int = 1
    mirror: bool = False
    seed: int = 0

    def parts(self) -> Iterator[Wanted]:
        for start in range(0, len(self.rows), PART):
            yield replace(self, rows=self.rows[start : start + PART])

    def facts(self, model: Model) -> dict[str, Any]:
        """All that the embeddings of a part depend on. One view is the same for every seed."""
        several = self.views > 1
        # The set's fingerprint has the sizes of files, but a changed image may have the same size. So a copy of a set
        # shares embeddings only if times of change were copied too (cp -p, rsync -t, tar).
        times = getattr(self.data.splits[self.split], "times", None)
        return {
            "version": VERSION,
            "pixels": pixels.VERSION,
            **model.facts,
            "set": self.data.fingerprint,
            "split": self.split,
            "rows": _hash(self.rows),
            "times": None if times is None else _hash(times[self.rows]),
            "views": self.views,
            "mirror": several and self.mirror,
            "seed": self.seed if several else None,
        }

    def generator(self) -> np.random.Generator:
        """Of the views: the same for every CLIP and adapter, another for every part."""
        identity = f"{self.data.fingerprint} {self.split} {self.rows.tolist()} {self.seed}"
        return np.random.default_rng(int(hashlib.sha256(identity.encode()).hexdigest(), 16))


class Store:
    """`report` gets a message for each damaged part, `encoded` the number of images since it was last called."""

    def __init__(
        self,
        folder: Path,
        model: Model,
        report: Callable[[str], None] = lambda _: None,
        encoded: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.folder, self.model, self.report, self.encoded = folder, model, report, encoded
        remove_leftovers(folder, of=".+-[0-9a-f]{32}")  # --embeddings may be any folder
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"expected a folder for embeddings, got the file {folder}; choose another place")
        folder.mkdir(parents=True, exist_ok=True)

    def keys(self, wanted: Wanted) -> list[str]:
        """The names of its parts."""
        return [digest(part.facts(self.model)) for part in wanted.parts()]

    def text_key(self, data: EvaluationSet) -> str:
        return digest(self._text_facts(data))

    def missing(self, wanted: Wanted) -> int:
        """How many of its images are not stored yet, damage aside."""
        return sum(len(part.rows) for part in wanted.parts() if not self._place(part).is_dir())

    def embeddings(self, wanted: Wanted) -> Embeddings:
        """Read, or encoded and written, part by part. Raises BadImageError for an image that can't be read."""
        return Embeddings.concatenate([self._part(part) for part in wanted.parts()])

    def text(self, data: EvaluationSet) -> np.ndarray:
        """(C, D) float32, L2-normalised: the class names in the set's templates."""
        facts = self._text_facts(data)
        folder = self.folder / f"{data.name}-text-{digest(facts)[:32]}"
        arrays = self._read(folder, TEXT_KIND, facts, ("text",), len(data.class_names))
        if arrays is None:
            from iosr_fast.clip.prompts import embed_classes

            arrays = {"text": embed_classes(self.model.clip, list(data.class_names), list(data.templates))}
            _write(folder, TEXT_KIND, facts, arrays)
        return arrays["text"]

    def _part(self, part: Wanted) -> Embeddings:
        facts = part.facts(self.model)
        names = ("plain",) if self.model.adapter is None else ("plain", "adapted")
        folder = self._place(part)
        arrays = self._read(folder, KIND, facts, names, len(part.rows))
        if arrays is None:
            embeddings = encode(part, self.model, self.encoded)
            arrays = {name: getattr(embeddings, name) for name in names}
            _write(folder, KIND, {**facts, "first": part.data.splits[part.split].keys[int(part.rows[0])]}, arrays)
        return Embeddings(arrays["plain"], arrays.get("adapted"))

    def _place(self, part: Wanted) -> Path:
        return self.folder / f"{part.data.name}-{part.split}-{digest(part.facts(self.model))[:32]}"

    def _text_facts(self, data: EvaluationSet) -> dict[str, Any]:
        clip = self.model.clip.fingerprint
        return {"version": VERSION, "clip": clip, "names": list(data.class_names), "templates": list(data.templates)}

    def _read(
        self, folder: Path, kind: str, facts: dict[str, Any], names: Sequence[str], rows: int
    ) -> dict[str, np.ndarray] | None:
        """The stored arrays, or None if there are none; a damaged or foreign part is reported, removed, and None."""
        if not folder.exists():
            return None
        try:
            manifest = read_manifest(folder, kind)
            if other := [name for name, value in facts.items() if manifest.get(name) != value]:
                raise IosrFastError(f"it is of another {', '.join(other)}")
            arrays = load_file(folder / FILE)
            for name in names:
                shape = arrays[name].shape if name in arrays else "none"
                if len(shape) != 2 or shape[0] != rows:
                    raise IosrFastError(f"expected {name} of {rows} rows, got {shape}")
            return {name: arrays[name] for name in names}
        # No other OSError is the folder's fault.
        except (ValueError, SafetensorError, FileNotFoundError, NotADirectoryError) as error:
            self.report(f"{folder.name} is damaged and is made again: {error}")
            with suppress(FileNotFoundError):  # another run on the same folder may have removed it
                shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
            return None


def encode(part: Wanted, model: Model, encoded: Callable[[int], None]) -> Embeddings:
    """The embeddings of a part, decoded ahead by threads. Raises BadImageError naming the set and the image.

    For one view the threads also bring the image to size; for several views images wait at their full size, so fewer
    are decoded ahead.
    """
    split, geometry, threads = part.data.splits[part.split], model.clip.geometry, max(2, usable_threads())

    def decode(row: int) -> Any:
        try:
            image = open_image(split.image(row), row)
            return resize_and_crop(image, geometry) if part.views == 1 else image
        except Exception as error:  # whatever a decoder raises
            if isinstance(error, BadImageError) and error.path is not None:
                raise
            raise BadImageError(Path(part.data.name) / part.split / split.keys[row], row, str(error)) from error

    rng, parts = part.generator(), []
    with closing(map_ordered(part.rows.tolist(), decode, threads, 128 if part.views == 1 else 2 * threads)) as images:
        while batch := list(islice(images, max(1, BATCH // part.views))):
            views = batch
            if part.views > 1:
                views = [random_view(image, geometry, rng, part.mirror) for image in batch for _ in range(part.views)]
            parts.append(mean_of_views(model.encoder.encode(np.stack(views)), part.views))
            encoded(len(views))
    return Embeddings.concatenate(parts)


def _hash(numbers: np.ndarray) -> str:
    return hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()


def _write(folder: Path, kind: str, facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    with new_folder(folder, kind) as temporary:
        save_file({name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}, temporary / FILE)
        write_manifest(temporary, kind, facts)
