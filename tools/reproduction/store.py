"""Embeddings on disk, each part under a hash of all that it depends on: nothing stale is ever read.

A part is a folder of at most PART images: a safetensors file and a manifest with the facts behind its name. It appears
whole or not at all, so that a run that is killed loses the part in work.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.images import pixels
from iosr_fast.images.preprocess import BadImageError, open_image, resize_and_crop
from iosr_fast.methods.support_set import encode_support
from iosr_fast.utils.files import new_folder
from iosr_fast.utils.machine import usable_threads
from iosr_fast.utils.manifest import read_manifest, write_manifest
from iosr_fast.utils.temporaries import remove_leftovers
from tools.reproduction.models import Model
from tools.reproduction.problems import PictureSet

VERSION = 1  # goes up when the same facts give other embeddings than before
PART = 1024
KIND, TEXT_KIND = "embeddings", "text embeddings"
FILE = "embeddings.safetensors"


@dataclass(frozen=True, eq=False)
class Wanted:
    """Images of a split, `rows` (N,), each as the mean of `views` random views, or with 1 as CLIP crops it."""

    data: PictureSet
    split: str
    rows: np.ndarray
    views: int = 1
    mirror: bool = False
    seed: int = 0

    def parts(self) -> Iterator[Wanted]:
        for start in range(0, len(self.rows), PART):
            rows = self.rows[start : start + PART]
            yield Wanted(self.data, self.split, rows, self.views, self.mirror, self.seed)

    def facts(self, model: Model) -> dict[str, Any]:
        """All that the embeddings of a part depend on. One view is the same for every seed."""
        several = self.views > 1
        # Sizes of files are in the set's fingerprint, but a changed image may have the same. So a copy of a set shares
        # embeddings where times of change were copied too (cp -p, rsync -t, tar).
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
        told = f"{self.data.fingerprint} {self.split} {self.rows.tolist()} {self.seed}"
        return np.random.default_rng(int(hashlib.sha256(told.encode()).hexdigest(), 16))


class Store:
    """`tell` is told of damaged parts, `encoded` of how many images were encoded since it was last called."""

    def __init__(
        self,
        folder: Path,
        model: Model,
        tell: Callable[[str], None] = lambda _: None,
        encoded: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.folder, self.model, self.tell, self.encoded = folder, model, tell, encoded
        remove_leftovers(folder, of=".+-[0-9a-f]{32}")  # --embeddings may be any folder
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"expected a folder for embeddings, got the file {folder}; choose another place")
        folder.mkdir(parents=True, exist_ok=True)
        self._held: dict[str, Embeddings] = {}

    def keys(self, wanted: Wanted) -> list[str]:
        """The names of its parts."""
        return [_key(part.facts(self.model)) for part in wanted.parts()]

    def text_key(self, data: PictureSet) -> str:
        return _key(self._text_facts(data))

    def missing(self, wanted: Wanted) -> int:
        """How many of its images are not stored yet (damage aside)."""
        return sum(len(part.rows) for part in wanted.parts() if not self._place(part).is_dir())

    def embeddings(self, wanted: Wanted) -> Embeddings:
        """Read, or encoded and written, part by part. Raises BadImageError for an image that can't be read."""
        parts = [self._part(part) for part in wanted.parts()]
        adapted = [part.adapted for part in parts if part.adapted is not None]
        return Embeddings(np.concatenate([p.plain for p in parts]), np.concatenate(adapted) if adapted else None)

    def text(self, data: PictureSet) -> np.ndarray:
        """(C, D) float32: the class names in the set's templates."""
        facts = self._text_facts(data)
        folder = self.folder / f"{data.name}-text-{_key(facts)[:32]}"
        found = self._read(folder, TEXT_KIND, facts, ("text",), len(data.class_names))
        if found is None:
            found = {"text": self.model.embed_text(list(data.class_names), list(data.templates))}
            _write(folder, TEXT_KIND, facts, found)
        return found["text"]

    def forget(self) -> None:
        """Let go of what is held in memory; what is on disk stays."""
        self._held.clear()

    def _part(self, part: Wanted) -> Embeddings:
        facts = part.facts(self.model)
        key = _key(facts)
        if key not in self._held:
            names = ("plain",) if self.model.adapter is None else ("plain", "adapted")
            folder = self._place(part)
            found = self._read(folder, KIND, facts, names, len(part.rows))
            if found is None:
                made = encode(part, self.model, self.encoded)
                found = {name: getattr(made, name) for name in names}
                _write(folder, KIND, {**facts, "first": part.data.splits[part.split].keys[int(part.rows[0])]}, found)
            self._held[key] = Embeddings(found["plain"], found.get("adapted"))
        return self._held[key]

    def _place(self, part: Wanted) -> Path:
        return self.folder / f"{part.data.name}-{part.split}-{_key(part.facts(self.model))[:32]}"

    def _text_facts(self, data: PictureSet) -> dict[str, Any]:
        clip = self.model.clip.fingerprint
        return {"version": VERSION, "clip": clip, "names": list(data.class_names), "templates": list(data.templates)}

    def _read(
        self, folder: Path, kind: str, facts: dict[str, Any], names: Sequence[str], rows: int
    ) -> dict[str, np.ndarray] | None:
        """What is stored, or None where nothing is; what is damaged or of something else is told, removed, and None."""
        if not folder.exists():
            return None
        try:
            manifest = read_manifest(folder, kind)
            if other := [name for name, value in facts.items() if manifest.get(name) != value]:
                raise ValueError(f"it is of another {', '.join(other)}")
            return _load(folder / FILE, names, rows)
        except (ValueError, FileNotFoundError, NotADirectoryError) as error:  # no other OSError is the folder's fault
            self.tell(f"{folder.name} is damaged and is made again: {error}")
            with suppress(FileNotFoundError):  # another run on the same folder may have removed it
                shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
            return None


def encode(part: Wanted, model: Model, encoded: Callable[[int], None]) -> Embeddings:
    """The embeddings of a part, threads decoding ahead. Raises BadImageError naming the set and the image."""
    with Ahead(part, model.clip.image_size, encoded) as images:
        rng = part.generator()
        return encode_support(model.encoder, images, part.views, part.mirror, rng)  # type: ignore[arg-type]


class Ahead:
    """A part's images for cache.encode_support, which takes slices in order: the next ones are being decoded meanwhile.

    Where one view is wanted the threads bring it to size as well: the crop that follows then leaves it as it is. For
    several views images wait at their full size, so fewer are decoded ahead.
    """

    def __init__(self, part: Wanted, size: int, encoded: Callable[[int], None]) -> None:
        self.part, self.size, self.encoded = part, size, encoded
        self._split = part.data.splits[part.split]
        threads = max(2, usable_threads())
        self._pool = ThreadPoolExecutor(threads)
        self._ahead = 128 if part.views == 1 else 2 * threads
        self._waiting: dict[int, Future[Any]] = {}

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __len__(self) -> int:
        return len(self.part.rows)

    def __getitem__(self, asked: slice) -> list[Any]:
        rows = range(*asked.indices(len(self)))
        for row in range(rows.start, min(rows.stop + self._ahead, len(self))):
            if row not in self._waiting:
                self._waiting[row] = self._pool.submit(self._decode, row)
        found = [self._waiting.pop(row).result() for row in rows]
        self.encoded(len(found) * self.part.views)
        return found

    def _decode(self, position: int) -> Any:
        row = int(self.part.rows[position])
        try:
            image = open_image(self._split.image(row), row)
            return resize_and_crop(image, self.size) if self.part.views == 1 else image
        except Exception as error:  # whatever a decoder raises
            if isinstance(error, BadImageError) and error.path is not None:
                raise
            where = Path(self.part.data.name) / self.part.split / self._split.keys[row]
            raise BadImageError(where, row, str(error)) from error


def _hash(numbers: np.ndarray) -> str:
    return hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()


def _key(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _write(folder: Path, kind: str, facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    with new_folder(folder) as made:
        save_file({name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}, made / FILE)
        write_manifest(made, kind, facts)


def _load(path: Path, names: Sequence[str], rows: int) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays: dict[str, np.ndarray] = load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    for name in names:
        if name not in arrays or arrays[name].ndim != 2 or len(arrays[name]) != rows:
            raise ValueError(f"expected {name} of {rows} rows, got {arrays[name].shape if name in arrays else 'none'}")
    return {name: arrays[name] for name in names}
