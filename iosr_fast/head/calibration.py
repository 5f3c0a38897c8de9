"""Labelled pictures from production, on which promises rest in place of left-out support images."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.examples import Examples
from iosr_fast.methods.conformal import CALIBRATION, COVERAGE, counted_as, images_needed, of_logits
from iosr_fast.methods.folds import make_folds, near_support
from iosr_fast.methods.log_loss import refit_factor
from iosr_fast.methods.look_alikes import find_look_alikes
from iosr_fast.methods.support_set import make_support_set

if TYPE_CHECKING:
    from iosr_fast.head.head import Head


class Calibration(NamedTuple):
    """The images that count: `embeddings` (L, D), `labels` (L,) positions of classes, `units` (L,) as of folds.Folds.
    `near` images were near duplicates of support images and are left out."""

    embeddings: Embeddings
    labels: np.ndarray
    units: np.ndarray
    near: int


def calibration_of(head: Head, given: Examples) -> Calibration:
    """What of the images `given` is new to the support set of `head`. Repeated images, look-alikes and those of one
    group are a unit, as in folds.make_folds."""
    near = near_support(head.support, given.embeddings.plain)
    labels = np.searchsorted(np.array(head.uids), given.class_ids)
    rows = np.flatnonzero(~near)[np.argsort(labels[~near], kind="stable")]
    images, labels, groups = given.embeddings[rows], labels[rows], None if given.groups is None else given.groups[rows]
    own = make_support_set(images, labels, None, head.tau, len(head.uids), groups=groups)
    alike = find_look_alikes(own).groups if head.config.look_alikes else None
    return Calibration(images, labels, make_folds(own, alike).units, int(near.sum()))


def calibrated_on(head: Head, images: Embeddings, labels: np.ndarray, groups: np.ndarray | None) -> Head:
    """The next version of a head, whose promises rest on these images; `labels` (L,) are positions of classes, `groups`
    (L,) as of SupportSet.

    The factor of the logits is fitted again (log_loss.refit_factor), so that probabilities are those of these images;
    no label changes.

    Raises IosrFastError where too few of them are new (Calibration).
    """
    given = Examples(images, np.array(head.uids)[labels], np.arange(len(labels)), (None,) * len(labels), groups=groups)
    new = calibration_of(head, given)
    logits, version = head.score(new.embeddings), head.version + 1
    check_calibration(len(new.labels), of_logits(logits, new.labels, units=new.units).count, new.near)
    ratio = refit_factor(logits, new.labels)
    config = replace(head.config, factor=head.config.factor * ratio)
    if (tuned := head.tuned) is not None and not tuned.stale:  # it stays evidence of this fit
        config = replace(config, tuned=replace(tuned, version=version))
    made = replace(head, config=config, version=version, calibration_images=given)
    return made.with_computed(plan=head.plan.scaled(ratio), folds=head.computed("folds"))


def check_calibration(images: int, count: float, near: int = 0) -> None:
    """Raise IosrFastError where images that count as `count` can't take the place of left-out ones; `near` more are
    near duplicates of support images."""
    if count < (needed := images_needed(COVERAGE)) - 1e-6:
        beside = f" beside {near:,} near duplicates of support images" if near else ""
        raise IosrFastError(
            f"expected at least {needed} {CALIBRATION} that the classifier has not seen, got "
            f"{counted_as(images, count)}{beside}: give more pictures, taken independently"
        )
