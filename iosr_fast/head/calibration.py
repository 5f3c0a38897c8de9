"""Labelled images beside a support set: which are like its images, and on which promises can rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.examples import Examples
from iosr_fast.methods.conformal import CALIBRATION, COVERAGE, counted_as, images_needed
from iosr_fast.methods.folds import NearSupport, join_units, make_folds
from iosr_fast.methods.look_alikes import find_look_alikes
from iosr_fast.methods.support_set import SupportSet, make_support_set


@dataclass(frozen=True, eq=False)
class Beside:
    """Of L labelled images beside a support set, each (L,):

    near      bool, near duplicates of a support image of any class
    siblings  bool, others in a group of look-alikes with a support image, as images of its session are; none where no
              more look like one than of independent images: test images look so, too
    units     int64, the same for images that count as one: near duplicates, those of a group, and those that look alike
              where more do than of independent images
    """

    near: np.ndarray
    siblings: np.ndarray
    units: np.ndarray

    @property
    def new(self) -> np.ndarray:
        """(L,) bool, the images that are neither."""
        return ~(self.near | self.siblings)

    @property
    def warning(self) -> tuple[str, ...]:
        """What is wrong where there are siblings, and what to do, in a sentence."""
        if not self.siblings.any():
            return ()
        return (
            f"{self.siblings.sum():,} of {len(self.near):,} labelled pictures are siblings of support pictures, as of "
            "one session: they say little of new ones, and promises may break; take them from other sessions than the "
            "support",
        )


def compare_with_support(
    support: SupportSet, images: Embeddings, labels: np.ndarray, groups: np.ndarray | None, look_alikes: bool
) -> Beside:
    """How images (L, D) with `labels` (L,) and `groups` (L,) relate to a support set; without `look_alikes` only near
    duplicates are found. Where images may have several labels, an indicator (L, C), no siblings are told: images of one
    session show other things each."""
    plain = Embeddings(images.plain)
    if support.owners is not None:
        units = make_folds(make_support_set(plain, labels, None, support.tau, groups=groups)).units
        return Beside(NearSupport(support)(images.plain), np.zeros(len(labels), bool), units)
    order = np.argsort(labels, kind="stable")
    own = make_support_set(plain, labels, None, support.tau, support.n_classes, groups=groups)
    near, siblings, of_own = NearSupport(support)(images.plain), np.zeros(len(labels), bool), None
    if look_alikes:
        both = Embeddings(np.concatenate([support.embeddings.plain, images.plain]))
        all_labels = np.concatenate([support.labels, labels])
        rows = np.argsort(all_labels, kind="stable")  # of `joint`
        joint = make_support_set(both, all_labels, None, support.tau, support.n_classes)
        given = rows >= len(support.labels)
        beside = find_look_alikes(joint, beside=given)
        if beside.many:
            siblings[rows[given] - len(support.labels)] = np.isin(beside.groups[given], beside.groups[~given])
        among = find_look_alikes(own)
        of_own = among.groups if among.many else None
    units = np.empty(len(labels), np.int64)
    units[order] = join_units(own, of_own)
    return Beside(near, siblings & ~near, units)


@dataclass(frozen=True, eq=False)
class Calibration:
    """The images of calibrate_on that count: `embeddings` (L, D), `labels` positions of classes (L,), or an indicator
    (L, C) where images may have several, `units` (L,) as of folds.Folds. `beside` tells of all that were given."""

    embeddings: Embeddings
    labels: np.ndarray
    units: np.ndarray
    beside: Beside

    @property
    def left_out(self) -> str:
        """Which images do not count, in words; "" if all do."""
        near, siblings = int(self.beside.near.sum()), int(self.beside.siblings.sum())
        parts = (f"{near:,} near duplicates", near), (f"{siblings:,} siblings", siblings)
        words = " and ".join(text for text, number in parts if number)
        return words and f"{words} of support images"


def calibration_of(support: SupportSet, uids: Sequence[int], given: Examples, look_alikes: bool) -> Calibration:
    """What of the images `given` is new to a support set of the classes `uids`: near duplicates and siblings of support
    images are left out."""
    if given.owners is None:
        labels: np.ndarray = np.searchsorted(np.array(uids), given.class_ids)
    else:
        labels = given.as_support(uids, None, support.tau).indicator
    beside = compare_with_support(support, given.embeddings, labels, given.groups, look_alikes)
    rows = np.flatnonzero(beside.new)
    return Calibration(given.embeddings[rows], labels[rows], beside.units[rows], beside)


def check_calibration(images: int, count: float, left_out: str = "") -> None:
    """Raise IosrFastError where images that count as `count` can't take the place of left-out ones; `left_out` says
    which others can't."""
    if count < (needed := images_needed(COVERAGE)) - 1e-6:
        beside = f" beside {left_out}" if left_out else ""
        raise IosrFastError(
            f"expected at least {needed} {CALIBRATION} that the classifier has not seen, got "
            f"{counted_as(images, count)}{beside}: give more pictures, taken independently and in other "
            "sessions than the support"
        )
