"""Data sets as few-shot problems: the source of support images, how a seed draws them, and the queries."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from iosr_fast.clip.demo.pictures import POOL
from iosr_fast.exceptions import IosrFastError

if TYPE_CHECKING:
    from iosr_fast.evaluation.sets import EvaluationSet, FileSplit

DEMO = "demo"
# A set without training images of its own takes its support from this one: a shift of domain.
SHIFTED_FROM = "imagenet"


@dataclass(frozen=True, eq=False)
class Problem:
    """Support and validation images of `source`, queries of `target`.

    `classes` (C,) int64: which of the source's labels each of the target's C classes is. `apart` is for sets whose
    "train" and "test" are the same images: a seed's first `apart` images of each class are never queries (0: all are).
    """

    source: EvaluationSet
    target: EvaluationSet
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
        of_class: np.ndarray = counts[self.classes]
        return np.minimum(of_class, self.apart) if self.apart else of_class

    def most_shots(self, fewer: bool = False) -> int:
        """The images of the smallest class; with `fewer` those of the largest, if no class is empty."""
        smallest = int(self.available.min())
        return int(self.available.max()) if fewer and smallest else smallest

    def support(self, shots: int, seed: int) -> list[np.ndarray]:
        """Rows of "train", `shots` arrays: the first image drawn of each class of the source, the second, and so on.

        A class with fewer images gives all of them. numpy.random.default_rng(seed) permutes the rows of one class after
        another (`draw`), and k shots are each class's first k: more shots keep the images of fewer, and sets that share
        a source share its draw.
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
        """The target's labels (N,) int64 of the source's; -1 for a class that the target has not."""
        number = np.full(len(self.source.class_names), -1)
        number[self.classes] = np.arange(len(self.classes))
        return number[source_labels]


def draw(labels: np.ndarray, n_classes: int, seed: int) -> list[np.ndarray]:
    """The rows of each class, shuffled: one generator, numpy.random.default_rng(seed), permutes class after class."""
    rng = np.random.default_rng(seed)
    ends = np.cumsum(np.bincount(labels, minlength=n_classes))[:-1]
    return [rng.permutation(rows) for rows in np.split(np.argsort(labels, kind="stable"), ends)]


def pose(target: EvaluationSet, source: EvaluationSet | None = None) -> Problem:
    """The problem of a set, with its own "train" or that of `source`, whose classes are matched by name.

    Raises ValueError for a missing split, or a class of the target that the source has not, or has twice.
    """
    source = target if source is None else source
    for data, split in ((source, "train"), (target, "test")):
        if split not in data.splits:
            raise IosrFastError(f"expected a split {split!r} of {data.name}, got {sorted(data.splits)}")
    names, wanted = list(source.class_names), list(target.class_names)
    if names == wanted:
        return Problem(source, target, np.arange(len(names)))
    if missing := [name for name in wanted if name not in names]:
        raise IosrFastError(f"expected every class of {target.name} among those of {source.name}, got {missing[:5]}")
    classes = np.array([names.index(name) for name in wanted])
    if several := [label for label, name in enumerate(wanted) if names.count(name) > 1]:
        # Classes of ImageNet may share a name; the folders of their images, named by WordNet ids, tell them apart.
        folders = _folders(source.splits["train"])
        for label in several:
            own = _folders(target.splits["test"])[label]
            same = [other for other, of_other in folders.items() if own & of_other and names[other] == wanted[label]]
            if len(same) != 1:
                raise IosrFastError(f"expected one class of {source.name} called {wanted[label]!r}, got several")
            classes[label] = same[0]
    return Problem(source, target, classes)


def _folders(split: FileSplit) -> dict[int, set[str]]:
    """The names of the folders of each label's images."""
    folders: dict[int, set[str]] = {}
    for key, label in zip(split.keys, split.labels.tolist(), strict=True):
        folders.setdefault(label, set()).add(PurePosixPath(key).parent.name)
    return folders


def open_problems(wanted: Sequence[str], root: Path | None) -> list[Problem]:
    """The problems of `--data`: demo, names of evaluation_sets, or all of those.

    Raises ValueError for an unknown name, FileNotFoundError that lists what is missing of every set.
    """
    if list(wanted) == [DEMO]:
        return [demo()]
    from iosr_fast.evaluation import sets as evaluation_sets

    known = list(evaluation_sets.catalog())
    names = list(dict.fromkeys(name for word in wanted for name in (known if word == "all" else [word])))
    if unknown := [name for name in names if name not in (DEMO, *known)]:
        raise IosrFastError(f"expected --data out of {DEMO}, all, {', '.join(known)}; got {', '.join(unknown)}")
    if root is None:
        raise IosrFastError(
            f"expected --root, the folder that holds {', '.join(name for name in names if name != DEMO)}"
        )
    opened: dict[str, EvaluationSet] = {}
    missing: list[str] = []
    pending = [name for name in names if name != DEMO]
    for name in pending:  # one more may be appended on the way
        try:
            opened[name] = evaluation_sets.open_evaluation_set(name, root)
        except (OSError, ValueError, ImportError) as error:
            missing.append(str(error))
            continue
        if "train" not in opened[name].splits and SHIFTED_FROM not in pending:
            pending.append(SHIFTED_FROM)
    if missing:
        raise FileNotFoundError("\n".join(["expected the data sets that were asked for:", *missing]))
    return [
        demo() if name == DEMO else pose(data := opened[name], None if "train" in data.splits else opened[SHIFTED_FROM])
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
    """The demo's held-out concepts, drawn as `evaluate.py demo` does: a seed's first POOL of each are its support."""
    from iosr_fast.clip.demo.pictures import held_out
    from iosr_fast.clip.prompts import DEMO_TEMPLATES
    from iosr_fast.evaluation.sets import EvaluationSet

    pictures, _ = held_out()
    split = DemoSplit(pictures)
    digest = hashlib.sha256(pictures.images.tobytes())
    digest.update("\n".join([*split.keys, *pictures.names]).encode() + split.labels.tobytes())
    splits: dict[str, Any] = {"train": split, "test": split}
    data = EvaluationSet(DEMO, pictures.names, list(DEMO_TEMPLATES), splits, digest.hexdigest())
    return Problem(data, data, np.arange(len(data.class_names)), apart=POOL)
