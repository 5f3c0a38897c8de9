"""Data sets as few-shot problems: where support images come from, how a seed draws them, and what is asked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from tools.evaluation.tasks import POOL

DEMO = "demo"
DEMO_SHOTS, SHOTS = (1, 2, 4), (1, 2, 4, 8, 16)
# Where a set has no training images of its own, its support comes from this one: a shift of domain.
SHIFTED_FROM = "imagenet"


class Split(Protocol):
    """Images with labels (N,) int64 and keys, a stable name of each; those in files with `times` (N,) of change too."""

    labels: np.ndarray
    keys: list[str]

    def __len__(self) -> int: ...

    def image(self, row: int) -> Any: ...


class PictureSet(Protocol):
    """What is used of an iosr_fast.training.data.evaluation_sets.EvaluationSet."""

    @property
    def name(self) -> str: ...
    @property
    def class_names(self) -> Sequence[str]: ...
    @property
    def templates(self) -> Sequence[str]: ...
    @property
    def splits(self) -> Mapping[str, Any]: ...
    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class OwnSet:
    """A PictureSet of what lies in no data set's folder."""

    name: str
    class_names: Sequence[str]
    templates: Sequence[str]
    splits: Mapping[str, Split]
    fingerprint: str


@dataclass(frozen=True, eq=False)
class Problem:
    """Support and validation images of `source`, queries of `target`.

    `classes` (C,) int64: which of the source's labels each of the target's C classes is. `apart` is for sets whose
    "train" and "test" are the same images: so many of each class, a seed's first, are never asked (0: all are).
    """

    source: PictureSet
    target: PictureSet
    classes: np.ndarray
    apart: int = 0
    _draws: dict[int, list[np.ndarray]] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def shifted(self) -> bool:
        return self.source.name != self.target.name

    @property
    def validated(self) -> bool:
        return "val" in self.source.splits

    @cached_property
    def available(self) -> np.ndarray:
        """(C,) int64, the images of each class that support can be drawn from."""
        counts = np.bincount(self.source.splits["train"].labels, minlength=len(self.source.class_names))
        found: np.ndarray = counts[self.classes]
        return np.minimum(found, self.apart) if self.apart else found

    def most_shots(self, fewer: bool = False) -> int:
        """What the smallest class has; with `fewer` what the largest has, if none is empty."""
        smallest = int(self.available.min())
        return int(self.available.max()) if fewer and smallest else smallest

    def support(self, shots: int, seed: int) -> list[np.ndarray]:
        """Rows of "train", `shots` arrays: the first image drawn of each class of the source, the second, and so on.

        A class with fewer images gives all that it has.


        The draw: numpy.random.default_rng(seed) permutes the rows of one class after another (`draw`), and k shots are
        each class's first k. So more shots keep the images of fewer, and sets that share a source share its draw.
        """
        if seed not in self._draws:
            self._draws[seed] = draw(self.source.splits["train"].labels, len(self.source.class_names), seed)
        drawn = self._draws[seed]
        return [np.array([rows[j] for rows in drawn if len(rows) > j]) for j in range(shots)]

    def queries(self, seed: int) -> np.ndarray:
        """Rows of the target's "test"."""
        test = self.target.splits["test"]
        if not self.apart:
            return np.arange(len(test))
        return np.concatenate([rows[self.apart :] for rows in draw(test.labels, len(self.target.class_names), seed)])

    def labels_of(self, source_labels: np.ndarray) -> np.ndarray:
        """The target's labels (N,) int64 of the source's; -1 where the target has no such class."""
        number = np.full(len(self.source.class_names), -1)
        number[self.classes] = np.arange(len(self.classes))
        return number[source_labels]


def draw(labels: np.ndarray, n_classes: int, seed: int) -> list[np.ndarray]:
    """The rows of each class, shuffled: one generator, numpy.random.default_rng(seed), permutes class after class."""
    rng = np.random.default_rng(seed)
    ends = np.cumsum(np.bincount(labels, minlength=n_classes))[:-1]
    return [rng.permutation(rows) for rows in np.split(np.argsort(labels, kind="stable"), ends)]


def pose(target: PictureSet, source: PictureSet | None = None) -> Problem:
    """The problem of a set, with its own "train" or that of `source`, whose classes are found by their names.

    Raises ValueError for a split that is missing, a class of the target that the source has not, or has twice.
    """
    source = target if source is None else source
    for data, split in ((source, "train"), (target, "test")):
        if split not in data.splits:
            raise ValueError(f"expected a split {split!r} of {data.name}, got {sorted(data.splits)}")
    names, wanted = list(source.class_names), list(target.class_names)
    if names == wanted:
        return Problem(source, target, np.arange(len(names)))
    if missing := [name for name in wanted if name not in names]:
        raise ValueError(f"expected every class of {target.name} among those of {source.name}, got {missing[:5]}")
    found = np.array([names.index(name) for name in wanted])
    if several := [label for label, name in enumerate(wanted) if names.count(name) > 1]:
        # Classes of ImageNet may share a name: the folders of their images, called by WordNet ids, tell them apart.
        folders = _folders(source.splits["train"])
        for label in several:
            own = _folders(target.splits["test"])[label]
            same = [other for other, of_other in folders.items() if own & of_other and names[other] == wanted[label]]
            if len(same) != 1:
                raise ValueError(f"expected one class of {source.name} called {wanted[label]!r}, got several")
            found[label] = same[0]
    return Problem(source, target, found)


def _folders(split: Split) -> dict[int, set[str]]:
    """The names of the folders that each label's images lie in."""
    found: dict[int, set[str]] = {}
    for key, label in zip(split.keys, split.labels.tolist(), strict=True):
        found.setdefault(label, set()).add(PurePosixPath(key).parent.name)
    return found


def open_problems(wanted: Sequence[str], root: Path | None) -> list[Problem]:
    """The problems of `--data`: demo, names of evaluation_sets, or all of those.

    Raises ValueError for an unknown name, FileNotFoundError that lists what is missing of every set.
    """
    if list(wanted) == [DEMO]:
        return [demo()]
    from iosr_fast.training.data import evaluation_sets

    known = evaluation_sets.names()
    names = list(dict.fromkeys(name for word in wanted for name in (known if word == "all" else [word])))
    if unknown := [name for name in names if name not in (DEMO, *known)]:
        raise ValueError(f"expected --data out of {DEMO}, all, {', '.join(known)}; got {', '.join(unknown)}")
    if root is None:
        raise ValueError(f"expected --root, the folder that holds {', '.join(name for name in names if name != DEMO)}")
    opened: dict[str, PictureSet] = {}
    missing: list[str] = []

    def look(name: str) -> None:
        try:
            opened[name] = evaluation_sets.open_evaluation_set(name, root)
        except (OSError, ValueError, ImportError) as error:
            missing.append(str(error))

    for name in names:
        if name != DEMO:
            look(name)
    shifted = [name for name, data in opened.items() if "train" not in data.splits]
    if shifted and SHIFTED_FROM not in names:
        look(SHIFTED_FROM)
    if missing:
        raise FileNotFoundError("\n".join(["expected the data sets that were asked for:", *missing]))
    return [
        demo() if name == DEMO else pose(opened[name], opened[SHIFTED_FROM] if name in shifted else None)
        for name in names
    ]


class DemoSplit:
    """The demo's pictures as a split."""

    def __init__(self, pictures: Any) -> None:
        self.pictures = pictures
        self.labels: np.ndarray = np.asarray(pictures.concepts, np.int64)
        self.keys = [
            f"{pictures.style_names[style]}/{pictures.names[concept]}"
            for style, concept in zip(pictures.styles, pictures.concepts, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, row: int) -> Any:
        from PIL import Image

        return Image.fromarray(self.pictures.images[row])


def demo() -> Problem:
    """The demo's held-out concepts, drawn as tools/evaluate.py does: a seed's first POOL of each are its support."""
    from iosr_fast.clip.prompts import DEMO_TEMPLATES
    from tools.evaluation.demo import held_out

    pictures, _ = held_out()
    split = DemoSplit(pictures)
    digest = hashlib.sha256(pictures.images.tobytes())
    digest.update("\n".join([*split.keys, *pictures.names]).encode() + split.labels.tobytes())
    data = OwnSet(DEMO, pictures.names, DEMO_TEMPLATES, {"train": split, "test": split}, digest.hexdigest())
    return Problem(data, data, np.arange(len(data.class_names)), apart=POOL)
