"""Parts of an Evaluation: its classes, mistakes, and what promises of single labels are worth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from iosr_fast.head.predictions import Neighbour


@dataclass(frozen=True)
class ClassResult:
    """A class: of the `images` with its label, `right` were given it; `predicted` images were given it in all.

    >>> cat = ClassResult("cat", images=4, right=3, predicted=6)
    >>> cat.recall, cat.precision
    (0.75, 0.5)
    """

    label: str
    images: int
    right: int
    predicted: int

    @property
    def recall(self) -> float:
        """The share of its images that are right; NaN without images."""
        return self.right / self.images if self.images else math.nan

    @property
    def precision(self) -> float:
        """The share of images given this label that have it; NaN if none was given it."""
        return self.right / self.predicted if self.predicted else math.nan


@dataclass(frozen=True)
class Mixup:
    """Of the `images` with `label`, `mistaken` were taken for `other`."""

    label: str
    other: str
    images: int
    mistaken: int


@dataclass(frozen=True)
class Mistake:
    """An image that is `label` (None: of no class) and was taken for `predicted`, with the probability of both, and the
    support images that are nearest to it, nearest first. Where images may have several labels it is one label: `label`
    is one that was missed, `predicted` one that the image has not, and the other is None, of probability 0."""

    image: Any
    label: str | None
    label_probability: float
    predicted: str | None
    probability: float
    nearest: tuple[Neighbour, ...]

    def __str__(self) -> str:
        if self.predicted is None:
            return f"{self.label} missed ({self.label_probability:.0%})"
        label = "" if self.label is None else f"{self.label} "
        return f"{label}taken for {self.predicted} ({self.probability:.0%})"


@dataclass(frozen=True)
class SetCoverage:
    """Sets of labels (predict_sets): a share `covered` has the image's label where `promised` is the promise; `size`
    labels on the mean; a share `empty` has none. NaN where nothing can be promised, for the `reason`."""

    promised: float
    covered: float = math.nan
    size: float = math.nan
    empty: float = math.nan
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return self.reason
        covered = f"{self.covered:.1%} have the right label ({self.promised:.4g} promised)"
        return f"{covered}, {self.empty:.1%} are empty, {self.size:.2f} labels on average"


@dataclass(frozen=True)
class UnknownResult:
    """predict(unknown="reject", keep=promised): the share of images of the classes that is `kept`, and of `images` of
    no class the share that is `rejected`; NaN where nothing can be promised, for the `reason`, or without `images`.

    auroc     how well scores tell both apart, whatever the threshold: 1 at best, 0.5 by chance
    accepted  images of no class that keep a label, the one that looks most like a class first
    """

    promised: float
    kept: float = math.nan
    images: int = 0
    rejected: float = math.nan
    auroc: float = math.nan
    accepted: tuple[Mistake, ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        kept = f"{self.kept:.1%} of these images keep their label ({self.promised:.4g} promised)"
        rejected = "" if self.reason else f"{self.rejected:.1%} rejected, "
        others = f"\n{self.images:,} images of no class: {rejected}AUROC {self.auroc:.3f}" if self.images else ""
        return f"rejection of unknown images: {self.reason or kept}{others}"
