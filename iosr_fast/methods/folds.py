"""Support images that are left out of a fit together: near duplicates, groups and look-alikes count as one image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from iosr_fast.methods.look_alikes import find_look_alikes
from iosr_fast.methods.support_set import SupportSet, blocks, image_rows

MAX_FOLDS = 16
# A tenth of the usual distance. Of Caltech-101 and Flowers at 16 images a class, in CLIP ViT-B/32, under 1% are closer.
_SHARE = 0.1
# Cosines of rows that are equal but for float32 rounding differ from 1 by less.
_ROUNDING = 1e-6
# Images of a class that are compared with one another; of a larger class those that follow one another.
_BLOCK = 512


@dataclass(frozen=True, eq=False)
class Folds:
    """Which of the N images of a support set are left out of a fit together, and which are then scored by it.

    fold      (N,) int64; negative for an image that is never left out
    scored    (N,) bool
    distinct  (C,) int64, the units of each class; 1 where they are all in one fold
    units     (N,) int64, the same for the images of a unit, which count as one image: they are never on both sides
    """

    fold: np.ndarray
    scored: np.ndarray
    distinct: np.ndarray
    units: np.ndarray

    @property
    def number(self) -> int:
        """How many folds there are."""
        return int(self.fold.max(initial=-1)) + 1

    @property
    def are_alone(self) -> bool:
        """Whether each image is a unit of its own."""
        return int(self.units.max(initial=-1)) + 1 == len(self.units)

    @cached_property
    def splits(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each fold the rows that are scored, rising, and (N,) bool, those that are left out."""
        folds = [self.fold == number for number in range(self.number)]
        return [(rows, out) for out in folds if len(rows := np.flatnonzero(out & self.scored))]

    @property
    def rows(self) -> np.ndarray:
        """(V,) int64: the images that are scored, rising."""
        return np.flatnonzero(self.scored)

    def first(self, most: int) -> Folds:
        """The first folds, until `most` images are scored; at least one."""
        sizes = np.bincount(self.fold[self.scored], minlength=self.number)
        kept = int((np.cumsum(sizes) < most).sum()) + 1
        chosen = self.fold < kept
        return replace(self, fold=np.where(chosen, self.fold, -1), scored=self.scored & chosen)


def unit_weights(units: np.ndarray) -> np.ndarray:
    """(V,) float64: what each of V images counts in a promise: a unit counts once, so each of its m images 1 / m.

    The sum of the weights is the effective number of images, and weighted sums stand for counts (Korn & Graubard,
    Survey Methodology 1998). Images of a unit may be right or wrong together; units are independent. The weights do not
    depend on what is right, so a wrong answer in place of a right one never loosens a promise.

    >>> unit_weights(np.array([0, 0, 1, 1, 2]))
    array([0.5, 0.5, 0.5, 0.5, 1. ])
    """
    of_unit, sizes = np.unique(units, return_inverse=True, return_counts=True)[1:]
    weights: np.ndarray = 1.0 / sizes[of_unit]
    return weights


def make_folds(support: SupportSet, look_alikes: np.ndarray | None = None) -> Folds:
    """One image of each class is left out at a time.

    If one image alone were left out, its class would have one key less than the others, which biases sums over keys.
    Near duplicates of a class count as one image (`group_near_duplicates`): they are left out together. A class of a
    single group loses one of its images at a time, as the others do, but none of them is scored: if it stayed whole
    among classes of one image each, it alone would give the covariance. The number of folds is the number of images of
    the largest class, at most MAX_FOLDS (then a 16th of each class is left out at a time). The only image of a class is
    never left out.

    With the groups (N,) of `look_alikes` (look_alikes.find_look_alikes), or of a support set with groups, a unit is
    all images that these and near duplicates join, of any classes, and `assign_folds` chooses its fold. A class of a
    single unit stays, unless another class has images in it; none is scored. What is promised of new images rests on
    these folds: their siblings are not in the support set. Weights are fitted without `look_alikes`, with which classes
    that look alike (variants of a product) would lose 0.4 to 1.9 points.

    Of images with several labels or none every one is in one of up to MAX_FOLDS folds and is scored, as it says of each
    class whether it has it. They share a unit, too, where they are near duplicates of a class or of no label, and where
    more look alike than independent ones do.
    """
    if support.owners is not None:
        return _fold_label_sets(support)
    labels = support.labels
    if look_alikes is not None or support.groups is not None:
        return _fold_units(support, join_units(support, look_alikes))
    groups = group_near_duplicates(support)
    distinct = np.zeros(support.n_classes, np.int64)
    np.maximum.at(distinct, labels, groups + 1)
    number = min(MAX_FOLDS, int(distinct.max(initial=1)))
    units = np.where(distinct[labels] > 1, groups, np.arange(len(labels)) - support.class_offsets[labels])
    fold = np.where((support.counts[labels] > 1) & (number > 1), units % number, -1)
    return Folds(fold, (fold >= 0) & (distinct[labels] > 1), distinct, support.class_offsets[labels] + groups)


def _fold_units(support: SupportSet, units: np.ndarray) -> Folds:
    """The folds of images in `units` (N,), numbered from 0."""
    labels, n_classes = support.labels, support.n_classes
    of_unit, of_class = np.divmod(np.unique(units * n_classes + labels), n_classes)
    distinct = np.bincount(of_class, minlength=n_classes)
    number = min(MAX_FOLDS, int(distinct.max(initial=1)))
    fold = assign_folds(units, np.arange(len(labels)), labels, number)
    # Of a class whose units are all in one fold, no image is left to be compared with.
    apart = np.bincount(np.unique(labels * number + fold) // number, minlength=n_classes) > 1
    stays = (distinct[labels] == 1) & (np.bincount(of_unit)[units] == 1) | (number == 1)
    return Folds(np.where(stays, -1, fold), apart[labels], np.where(apart, distinct, np.minimum(distinct, 1)), units)


def _fold_label_sets(support: SupportSet) -> Folds:
    """The folds of images with any number of labels, which are compared within each of their classes; "no label" is the
    last one."""
    images, n_classes = np.arange(len(support.embeddings)), support.n_classes
    owners, classes = support.of_labels(images), support.labels
    pairs, rows = support.pairs()
    alike = find_look_alikes(pairs)
    units = np.empty(len(images), np.int64)
    units[rows] = join_units(pairs, alike.groups if alike.many else None)
    fold = assign_folds(units, owners, classes, min(MAX_FOLDS, int(units.max(initial=0)) + 1))
    folds = Folds(fold, np.ones(len(images), bool), support.counts, units)
    if folds.are_alone:
        return folds
    distinct, in_folds = (_distinct(ids[owners], classes, n_classes) for ids in (units, fold))
    return replace(folds, distinct=np.where(in_folds > 1, distinct, in_folds))


def _distinct(ids: np.ndarray, classes: np.ndarray, n_classes: int) -> np.ndarray:
    """(C,) int64: of each class how many of the `ids` (M,) its labels `classes` (M,) have."""
    of_class = np.unique(ids * n_classes + classes) % n_classes
    return np.bincount(of_class, minlength=n_classes)


def assign_folds(units: np.ndarray, images: np.ndarray, classes: np.ndarray, number: int) -> np.ndarray:
    """(N,) int64, of `number` folds that of each image; units (N,) from 0 stay whole. Large units come first, each into
    the fold with fewest images of its classes, then fewest at all. Image images[i] has the class classes[i]."""
    sizes = np.bincount(units)
    order = np.argsort(units[images], kind="stable")
    of_units = np.split(classes[order], np.cumsum(np.bincount(units[images], minlength=len(sizes)))[:-1])
    of_class = np.zeros((number, classes.max(initial=0) + 1))
    filled = np.zeros(number)
    folds = np.zeros(len(sizes), np.int64)
    for unit in np.argsort(-sizes, kind="stable").tolist():
        unit_classes = of_units[unit]
        fold = folds[unit] = np.lexsort((filled, of_class[:, unit_classes].sum(1)))[0]
        np.add.at(of_class[fold], unit_classes, 1)
        filled[fold] += sizes[unit]
    return folds[units]


def join_units(support: SupportSet, look_alikes: np.ndarray | None = None) -> np.ndarray:
    """(N,) int64 from 0: the unit of each image, with all that it shares a near duplicate, a group of the support set
    or one of `look_alikes` (N,) with."""
    near_duplicates = support.class_offsets[support.labels] + group_near_duplicates(support)
    others = [ids for ids in (support.groups, look_alikes) if ids is not None]
    return _joined(near_duplicates, *others)


def _joined(*groupings: np.ndarray) -> np.ndarray:
    """(N,) int64 from 0, by first images: the same for images that are equal in one of them, or by way of others."""
    joined = np.arange(len(groupings[0]))
    before = None
    while before is None or (joined != before).any():
        before = joined
        for ids in groupings:
            least = np.full(ids.max(initial=-1) + 1, len(joined))
            np.minimum.at(least, ids, joined)
            joined = least[ids]
    return np.unique(joined, return_inverse=True)[1]


def group_near_duplicates(support: SupportSet) -> np.ndarray:
    """(N,) int64: the group of each support image within its class, numbered from 0 in the order of their first images.

    Two images of a class are near duplicates, as a series of shots gives them, if the distance 1 - cosine of their
    plain embeddings is at most a tenth of the usual one; a group has the images that are near its first one, so a chain
    of images makes no group. The usual distance is the median over the pairs of the class, but at least half, and at
    most the whole, of the median class's: a class of duplicates alone has no distance of its own to compare with, and a
    class of varied images no reason for wider groups. Images of a class of more than 512 are compared with those of
    their block of 512: O(N D) operations.
    """
    plain = image_rows(support.embeddings, "plain", None)
    offsets = support.class_offsets
    groups = np.zeros(len(plain), np.int64)
    if not (support.counts > 1).any():
        return groups
    medians = class_distances(plain, support, np.median)
    usual = np.clip(medians, np.nanmedian(medians) / 2, np.nanmedian(medians))
    for c in np.flatnonzero(support.counts > 1):
        rows = plain[offsets[c] : offsets[c + 1]]
        count = 0
        for block in blocks(len(rows), _BLOCK):
            of_block = _leaders(1.0 - rows[block] @ rows[block].T <= _SHARE * usual[c] + _ROUNDING)
            groups[offsets[c] : offsets[c + 1]][block] = count + of_block
            count += int(of_block.max()) + 1
    return groups


class NearSupport:
    """Finds near duplicates of support images of any class, which say little about new images. The usual distance is
    that of the median class; without a class of two images, only equal rows are near."""

    def __init__(self, support: SupportSet) -> None:
        support = support if support.owners is None else support.pairs()[0]
        self._rows = image_rows(support.embeddings, "plain", None)
        self._limit = _limit(self._rows, support)

    def __call__(self, plain: np.ndarray, more: Sequence[np.ndarray] = ()) -> np.ndarray:
        """(B,) bool: which plain embeddings (B, D) are near a support image, or one of `more` embeddings (D,)."""
        near = np.zeros(len(plain), bool)
        for keys in (self._rows, np.array(more)):
            for block in blocks(len(plain), _BLOCK) if len(keys) else ():
                near[block] |= 1.0 - (plain[block] @ keys.T).max(1).astype(float) <= self._limit
        return near


def near_pairs(rows: np.ndarray, support: SupportSet) -> list[tuple[int, int, float]]:
    """The pairs (first, second, cosine) of support images, of any classes, whose `rows` (N, D) are near duplicates, as
    NearSupport has them; the nearest pair first."""
    limit = _limit(rows, support)
    pairs = list[tuple[int, int, float]]()
    for block in blocks(len(rows), _BLOCK):
        cosines = rows[block] @ rows.T
        first, second = np.nonzero(1.0 - cosines <= limit)
        below = block.start + first < second
        near = cosines[first[below], second[below]].clip(-1.0, 1.0)
        pairs += zip((block.start + first[below]).tolist(), second[below].tolist(), near.tolist(), strict=True)
    return sorted(pairs, key=lambda pair: -pair[2])


def class_distances(rows: np.ndarray, support: SupportSet, of: Callable[[np.ndarray], Any]) -> np.ndarray:
    """(C,) float64: `of`, the mean or the median, over the pairs of a class of the distance 1 - cosine of their `rows`
    (N, D); NaN for a class without a pair."""
    rows = support.of_labels(rows)
    distances = np.full(support.n_classes, np.nan)
    offsets = support.class_offsets
    for c in np.flatnonzero(support.counts > 1):
        of_class = rows[offsets[c] : offsets[c + 1]][:_BLOCK]
        distances[c] = of((1.0 - of_class @ of_class.T)[np.triu_indices(len(of_class), 1)])
    return distances


def _limit(rows: np.ndarray, support: SupportSet) -> float:
    """The distance up to which two rows are near duplicates."""
    usual = class_distances(rows, support, np.median) if (support.counts > 1).any() else np.zeros(1)
    return _SHARE * float(np.nanmedian(usual)) + _ROUNDING


def _leaders(close: np.ndarray) -> np.ndarray:
    """The group (n,) of each of n images; close (n, n) bool. The first image without a group leads the next one, of all
    images without a group that are close to it."""
    groups = np.full(len(close), -1)
    count = 0
    for leader in range(len(close)):
        if groups[leader] < 0:
            groups[close[leader] & (groups < 0)] = count
            groups[leader] = count
            count += 1
    return groups
