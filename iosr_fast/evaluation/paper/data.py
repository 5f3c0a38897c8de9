"""The data sets of the paper's tables, and their few-shot tasks.

The protocol (Kravets & Namboodiri, BMVC 2024, and Tip-Adapter's, whose code theirs starts from): support is `shots`
random training images of each class; a key is the mean of `views` random views of its image; queries are all test
images, in one view. Parameters are chosen on the validation split or, without one, by leave-one-out on the support,
whose images are then queried in one view. No test image or label has a part in that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.evaluation.paper.embeddings import Images, KeptEmbeddings, digest
from iosr_fast.evaluation.sets import EvaluationSet, catalog, open_evaluation_set
from iosr_fast.evaluation.tasks import Task, TaskSource
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.support_set import make_support_set

# A set without training images of its own takes its support from this one: a shift of domain.
SHIFTED_FROM = "imagenet"


@dataclass(frozen=True, eq=False)
class PaperSet:
    """Support and validation images of `source`, queries of `target`, which are one set unless the domain is shifted.

    `classes` (C,) int64: which of the source's labels each of the target's C classes is.
    """

    source: EvaluationSet
    target: EvaluationSet
    classes: np.ndarray

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def shifted(self) -> bool:
        return self.source.name != self.target.name

    @cached_property
    def available(self) -> np.ndarray:
        """(C,) int64, the images of each class that support can be drawn from."""
        counts = np.bincount(self.source.splits["train"].labels, minlength=len(self.source.class_names))
        of_class: np.ndarray = counts[self.classes]
        return of_class

    @property
    def fingerprint(self) -> str:
        """Of everything that an accuracy on it depends on, with the files' times of change."""
        times = [split.times.tolist() for one in (self.source, self.target) for split in one.splits.values()]
        return digest([self.source.fingerprint, self.target.fingerprint, self.target.templates, times])

    def support(self, shots: int, seed: int) -> list[np.ndarray]:
        """Rows of "train", `shots` arrays: the first image drawn of each class of the source, the second, and so on.

        numpy.random.default_rng(seed) permutes the rows of one class after another, and k shots are each class's first
        k: more shots keep the images of fewer, and sets that share a source share its draw. A class with fewer images
        gives all of them.
        """
        rng, labels = np.random.default_rng(seed), self.source.splits["train"].labels
        ends = np.cumsum(np.bincount(labels, minlength=len(self.source.class_names)))[:-1]
        drawn = [rng.permutation(rows) for rows in np.split(np.argsort(labels, kind="stable"), ends)]
        return [np.array([rows[j] for rows in drawn if len(rows) > j]) for j in range(shots)]

    def as_source(
        self, embeddings: KeptEmbeddings, views: int, shots: Sequence[int], seeds: Sequence[int]
    ) -> TaskSource:
        """Its tasks; images are encoded where a task first needs them."""

        def draw(k: int, seed: int) -> Task:
            train = self.support(k, seed)
            keys, labels = self._embed(embeddings, [Images(self.source, "train", rows, views, seed) for rows in train])
            test = np.arange(len(self.target.splits["test"]))
            queries, validation = self._embed(embeddings, [Images(self.target, "test", test)]), None
            single_views = None  # of the support, for leave-one-out
            if "val" in self.source.splits:
                rows = np.flatnonzero(self._labels_of(self.source.splits["val"].labels) >= 0)
                validation = self._embed(embeddings, [Images(self.source, "val", rows)])
            elif views > 1:
                single_views, _ = self._embed(embeddings, [Images(self.source, "train", rows) for rows in train])
            text, tau = embeddings.text(self.target), embeddings.clip.logit_scale
            return Task(make_support_set(keys, labels, text, tau, queries=single_views), *queries, validation)

        return TaskSource(self.name, tuple(shots), tuple(seeds), draw, tuple(self._notes(max(shots))))

    def _embed(self, embeddings: KeptEmbeddings, parts: Sequence[Images]) -> tuple[Embeddings, np.ndarray]:
        """Embeddings and the target's labels, without images of classes that the target has not."""
        rows = Embeddings.concatenate([embeddings.images(part) for part in parts])
        labels = np.concatenate([part.data.splits[part.split].labels[part.rows] for part in parts])
        labels = labels if parts[0].split == "test" else self._labels_of(labels)
        return rows[labels >= 0], labels[labels >= 0]

    def _labels_of(self, source_labels: np.ndarray) -> np.ndarray:
        """The target's labels (N,) int64 of the source's; -1 for a class that the target has not."""
        number = np.full(len(self.source.class_names), -1)
        number[self.classes] = np.arange(len(self.classes))
        return number[source_labels]

    def _notes(self, most: int) -> list[str]:
        """What a reader of its table has to know; `most` is the largest number of shots."""
        notes = [f"split: {self.target.layout}"]
        if self.shifted:
            notes.append(
                f"a shift of domain: support from {self.source.name}, {len(self.classes)} of its "
                f"{len(self.source.class_names)} classes"
            )
        if few := int((self.available < most).sum()):
            notes.append(
                f"{few} of {len(self.classes)} classes have fewer than {most} images to draw from "
                f"({self.available.min()} and more) and give all that they have"
            )
        if "val" not in self.source.splits:
            notes.append(f"{self.source.name} has no validation split: leave-one-out on the support set in its place")
        return notes


def match_classes(target: EvaluationSet, source: EvaluationSet) -> PaperSet:
    """`target` with the training images of `source`, whose classes are matched by their ids.

    Raises IosrFastError for a missing split, a class of the target that the source has not, or one without training
    images.
    """
    for data, split in ((source, "train"), (target, "test")):
        if split not in data.splits:
            raise IosrFastError(f"expected a split {split!r} of {data.name}, got {sorted(data.splits)}")
    number = {name: label for label, name in enumerate(source.class_ids)}
    if missing := [name for name in target.class_ids if name not in number]:
        raise IosrFastError(f"expected every class of {target.name} among those of {source.name}, got {missing[:5]}")
    matched = PaperSet(source, target, np.array([number[name] for name in target.class_ids]))
    if not matched.available.all():
        empty = target.class_names[int(matched.available.argmin())]
        raise IosrFastError(f"expected training images of every class of {source.name}, got none of {empty!r}")
    return matched


def open_paper_sets(words: Sequence[str], root: Path) -> list[PaperSet]:
    """The sets of `--data`: names of sets.toml, or "all".

    Raises IosrFastError for an unknown name, FileNotFoundError that lists what is missing of every set.
    """
    known = list(catalog())
    names = list(dict.fromkeys(name for word in words for name in (known if word == "all" else [word])))
    if unknown := [name for name in names if name not in known]:
        raise IosrFastError(f"expected --data out of all, {', '.join(known)}; got {', '.join(unknown)}")
    opened: dict[str, EvaluationSet] = {}
    missing: list[str] = []
    pending = [*names]
    for name in pending:  # one more may be appended on the way
        try:
            opened[name] = open_evaluation_set(name, root)
        except (OSError, ValueError, ImportError) as error:
            missing.append(str(error))
            continue
        if "train" not in opened[name].splits and SHIFTED_FROM not in pending:
            pending.append(SHIFTED_FROM)
    if missing:
        raise FileNotFoundError("\n".join(["expected the data sets that were asked for:", *missing]))
    return [
        match_classes(opened[name], opened[name if "train" in opened[name].splits else SHIFTED_FROM]) for name in names
    ]
