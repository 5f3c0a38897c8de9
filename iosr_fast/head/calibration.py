"""Labelled pictures from production, on which promises rest in place of left-out support images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.examples import Examples
from iosr_fast.methods.conformal import CALIBRATION, COVERAGE, counted_as, images_needed
from iosr_fast.methods.folds import NearSupport, make_folds
from iosr_fast.methods.look_alikes import find_look_alikes
from iosr_fast.methods.support_set import SupportSet, make_support_set


class Calibration(NamedTuple):
    """The images that count: `embeddings` (L, D), `labels` (L,) positions of classes, `units` (L,) as of folds.Folds.
    `near` images were near duplicates of support images and are left out."""

    embeddings: Embeddings
    labels: np.ndarray
    units: np.ndarray
    near: int


def calibration_of(support: SupportSet, uids: Sequence[int], given: Examples, look_alikes: bool) -> Calibration:
    """What of the images `given` is new to a support set of the classes `uids`. Repeated images, those of one group
    and, with `look_alikes`, those that look alike are a unit, as in folds.make_folds."""
    near = NearSupport(support)(given.embeddings.plain)
    labels = np.searchsorted(np.array(uids), given.class_ids)
    rows = np.flatnonzero(~near)[np.argsort(labels[~near], kind="stable")]
    images = given.embeddings[rows]
    labels = labels[rows]
    groups = None if given.groups is None else given.groups[rows]
    own = make_support_set(images, labels, None, support.tau, len(uids), groups=groups)
    alike = find_look_alikes(own).groups if look_alikes else None
    return Calibration(images, labels, make_folds(own, alike).units, int(near.sum()))


def check_calibration(images: int, count: float, near: int = 0) -> None:
    """Raise IosrFastError where images that count as `count` can't take the place of left-out ones; `near` more are
    near duplicates of support images."""
    if count < (needed := images_needed(COVERAGE)) - 1e-6:
        beside = f" beside {near:,} near duplicates of support images" if near else ""
        raise IosrFastError(
            f"expected at least {needed} {CALIBRATION} that the classifier has not seen, got "
            f"{counted_as(images, count)}{beside}: give more pictures, taken independently"
        )
