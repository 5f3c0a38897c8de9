"""Labels as callers give them, checked: one an image, or several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Number
from operator import is_not
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.names import check_names, check_separable
from iosr_fast.images.crop import picture_of
from iosr_fast.utils.numbers import refuse_masked
from iosr_fast.utils.text import abbreviate

_MOST = 2**53  # of numbers of classes, which JSON has
SEPARATOR = ";"  # of the labels of one picture in tables
_SETS = (set, frozenset)
_ROWS = (*_SETS, list, tuple, np.ndarray)
_HINTS: dict[type, str] = {
    float: "; integers are made by labels.astype(int)",
    bytes: "; decode it",
    **dict.fromkeys(_SETS, "; a classifier that was fitted with one label an image takes one"),
}
# What missing values become when NumPy or pandas turn a column into text.
_MISSING_AS_TEXT = frozenset({"nan", "NaN", "None", "null", "<NA>", "NaT"})


class Labels(NamedTuple):
    """The labels of N images for a fit: the `names` of the C classes, and of each image its class `ids` (N,).

    Where images may have several labels each, `ids` say which of the label `sets` an image has, distinct rows (P, C)
    bool; otherwise these are None. `numbers` (C) are the classes' integers, rising, where labels are integers or an
    indicator; otherwise None.
    """

    names: list[str]
    ids: np.ndarray
    sets: np.ndarray | None
    numbers: Sequence[int] | None

    @classmethod
    def of(cls, read: np.ndarray, names: Sequence[str]) -> Labels:
        """Those that a head has read (Head.read_labels)."""
        if read.ndim == 1:
            return cls(list(names), read, None, None)
        sets, ids = np.unique(read, axis=0, return_inverse=True)
        return cls(list(names), ids.reshape(-1), sets, None)

    @property
    def shown(self) -> list[str]:
        """The text of each id."""
        if self.sets is None:
            return self.names
        return [SEPARATOR.join(np.array(self.names)[row]) for row in self.sets]

    @property
    def sessions(self) -> np.ndarray:
        """(N,) what parts of one picture share as of one session (`read_groups`): their class, or where images may have
        several labels anything."""
        return self.ids if self.sets is None else np.zeros_like(self.ids)

    def counts(self, ids: np.ndarray) -> np.ndarray:
        """(C,) how many images with these ids have the label of each class."""
        if self.sets is None:
            return np.bincount(ids, minlength=len(self.names))
        counts: np.ndarray = self.sets[ids].sum(0)
        return counts


def check_labels(images: Sequence[Any], labels: Any, class_names: Any) -> Labels:
    """The labels of images for a fit; several for each image if `are_label_sets`. Raises IosrFastError as `class_ids`,
    `read_label_sets` and `names.check_names`."""
    named = None if class_names is None else check_names(class_names)
    if are_label_sets(labels):
        names_in_sets, indicator = read_label_sets(labels, len(images), named)
        numbers: Sequence[int] | None = range(indicator.shape[1]) if names_in_sets is None else None
        names = named or _names_of(names_in_sets or numbers or ())
        check_separable(names, SEPARATOR)
        return Labels.of(indicator, names)._replace(numbers=numbers)
    values = _read_labels(labels, len(images))
    numbers = None
    if values and isinstance(values[0], int):
        numbers = _check_numbers(values) if named is None else range(len(named))
    names = named or _names_of(numbers or sorted(set(values)))
    return Labels(names, _ids(values, names, numbers or ()), None, numbers)


def _check_numbers(values: Sequence[int]) -> list[int]:
    """Integer labels without names, distinct and rising. Raises IosrFastError for those that are no uids."""
    numbers = sorted(set(values))
    if wrong := [str(number) for number in numbers if not 0 <= number < _MOST]:
        raise IosrFastError(
            f"expected integer labels from 0 to {_MOST - 1}, got {abbreviate(wrong)}: number the classes from 0, as "
            "scikit-learn's LabelEncoder does, or label by names"
        )
    return numbers


def _names_of(labels: Sequence[Any]) -> list[str]:
    """The class names of distinct labels, where no others are given."""
    if not labels:
        raise IosrFastError("expected labelled images or class_names, got neither: without them there are no classes")
    if missing := sorted(_MISSING_AS_TEXT.intersection(labels)):
        raise IosrFastError(
            f"expected a label for every image, got {abbreviate(missing)}, which is what a missing value becomes as "
            "text; leave those images out, or pass class_names if a class is called so"
        )
    return check_names([str(label) for label in labels])


# --- one label an image ---


def class_ids(
    images: Sequence[Any], labels: Any, names: Sequence[str], numbers: Sequence[int] | None = None
) -> np.ndarray:
    """Each image's class id (N,) int64, the position of its class in `names`; `labels` are names, or integers: the
    classes' `numbers` (None: positions).

    Raises IosrFastError, naming the position, for a missing label (None, NaN, NaT), one that is neither text nor an
    integer, a mixture of both, one without a class, and for another number of labels than images.
    """
    return _ids(_read_labels(labels, len(images)), names, range(len(names)) if numbers is None else numbers)


def _ids(values: Sequence[Any], names: Sequence[str], numbers: Sequence[int]) -> np.ndarray:
    if not values or isinstance(values[0], str):
        position = positions(names, values)
    else:
        position = {number: i for i, number in enumerate(numbers)}
        if outside := sorted(set(values) - set(position)):
            known, shown = (abbreviate([*map(str, some)]) for some in (numbers, outside))
            raise IosrFastError(f"expected the integers of the {len(numbers)} classes, {known}, got {shown}")
    return np.array([position[value] for value in values], np.int64)


def positions(names: Sequence[Any], used: Iterable[Any]) -> dict[Any, int]:
    """The position of each of the `names`. Raises IosrFastError unless all that are `used` are among them."""
    position = {name: c for c, name in enumerate(names)}
    if unknown := sorted(set(used) - set(position)):
        raise IosrFastError(f"the labels {abbreviate(unknown)} are not among the {len(names)} class names")
    return position


def _read_labels(labels: Any, n_images: int) -> list[Any]:
    """Labels as Python's str or int, all of one kind."""
    if isinstance(labels, np.ma.MaskedArray):
        labels = list(labels)  # asarray would drop the mask
    if not isinstance(labels, list | tuple):
        labels = np.asarray([] if labels is None else labels)
        if labels.ndim != 1:
            raise IosrFastError(
                f"expected one label for each of {n_images} images in a sequence, got labels of shape {labels.shape}"
            )
    if len(labels) != n_images:
        raise IosrFastError(f"expected one label for each of {n_images} images, got {len(labels)} labels")
    values = [value.item() if isinstance(value, np.generic) else value for value in labels]
    if missing := [i for i, value in enumerate(values) if _is_missing(value)]:
        at = missing[0]
        raise IosrFastError(
            f"expected a label for every image, got {labels[at]!r} at position {at}: leave that image out or label it"
        )
    first: dict[type, int] = {}
    for i, value in enumerate(values):
        kind = str if isinstance(value, str) else int
        if isinstance(value, bool) or not isinstance(value, kind):
            raise IosrFastError(
                f"expected labels to be class names or integers, got {type(labels[i]).__name__} ({labels[i]!r}) at "
                f"position {i}{_HINTS.get(type(value), '')}"
            )
        first.setdefault(kind, i)
    if len(first) > 1:
        text, number = first[str], first[int]
        raise IosrFastError(
            f"expected labels to be all class names or all integers, got {values[text]!r} at position {text} and "
            f"{values[number]!r} at position {number}"
        )
    return [str.__str__(value) if isinstance(value, str) else int(value) for value in values]


def classes_of(y: Any, n_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The classes (C,) in the labels of n rows, sorted, of their type in y; each row's class by its position (n,); and
    None. Labels are any that can be sorted, of at least two classes.

    Where rows have several labels each, the classes are names, or the columns' numbers of an indicator, and rows have
    the positions (n,) of rows of the third, an indicator (n, C) bool. Raises IosrFastError as `read_label_sets`.
    """
    if are_label_sets(y):
        names, sets = read_label_sets(y, n_rows)
        return np.arange(sets.shape[1]) if names is None else np.array(names, str), np.arange(n_rows), sets
    classes, ids = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise IosrFastError(f"expected labels of at least two classes, got one class: {classes[0]!r}")
    return classes, ids.astype(np.int64), None


def read_groups(
    groups: Any, n_images: int, images: Sequence[Any] = (), ids: Sequence[Any] | np.ndarray = ()
) -> np.ndarray | None:
    """The group of each image (N,) int64, numbered by first images; None where each image is its own group. An image
    without a group, or with a missing value, is its own; where `images` are given, with the `ids` of their classes,
    parts of one picture and class are a group, as they show one session. Parts of other classes are not: by way of
    look-alikes they would join all pictures, and none could be left out. Raises IosrFastError for another number than
    images, and a value without a hash."""
    alone: Iterable[Any] = range(n_images)
    pictures = list(map(picture_of, images))
    if any(map(is_not, pictures, images)):
        names = (str(one) if isinstance(one, str | Path) else id(one) for one in pictures)
        alone = zip(names, map(int, ids), strict=True)
    numbers: dict[Any, int] = {}
    try:
        values = [groups] if isinstance(groups, str) else [None] * n_images if groups is None else list(groups)
        if len(values) != n_images:
            raise IosrFastError(f"expected one group for each of {n_images} images, got {len(values)}")
        keys = [("picture", own) if _is_missing(one) else one for one, own in zip(values, alone, strict=True)]
        group_of = [numbers.setdefault(key, len(numbers)) for key in keys]
    except TypeError as error:
        raise IosrFastError(f"expected groups of numbers or texts, None for an image of its own: {error}") from error
    return np.array(group_of, np.int64) if len(numbers) < n_images else None


def _is_missing(value: Any) -> bool:
    """None, NaN of any kind, NaT, a masked value and pandas.NA (whose comparison has no truth value)."""
    if value is None or type(value).__name__ in ("NAType", "NaTType", "MaskedConstant"):
        return True
    return isinstance(value, Number) and bool(value != value)


# --- several labels an image: sets of names, or an indicator ---


def are_label_sets(labels: Any) -> bool:
    """Whether labels are those of images with any number of classes: sets, lists, tuples or arrays, or an array (N, C)
    with C > 1.

    >>> are_label_sets([{"cat"}, set()]), are_label_sets(np.eye(2, dtype=int)), are_label_sets(["cat", "dog"])
    (True, True, False)
    """
    if getattr(labels, "ndim", 1) == 2:
        return bool(labels.shape[1] > 1)
    if isinstance(labels, str | bytes | dict) or not hasattr(labels, "__len__"):
        return False
    rows = [row for row in labels if isinstance(row, _ROWS) and getattr(row, "ndim", 1) == 1]
    # A column (N, 1) of numbers is one label an image.
    return any(isinstance(row, _SETS) or len(row) != 1 or not _is_number(row[0]) for row in rows)


def read_label_sets(
    labels: Any, n_images: int, classes: Sequence[Any] | None = None
) -> tuple[list[Any] | None, np.ndarray]:
    """The names in the sets, sorted, or `classes` (C), and an indicator (N, C) bool in that order; None for the names
    where the labels are an indicator themselves.

    Sets, lists and tuples hold names (str); an empty one is an image with none of the classes. Rows of numbers, all 0
    or 1, are an indicator, as scikit-learn has it, sparse or not. Raises IosrFastError, naming the position, for what
    is neither, another number of rows than images, and names or columns that are not those of `classes`.

    >>> read_label_sets([{"sofa", "cat"}, {"dog"}, []], 3)
    (['cat', 'dog', 'sofa'], array([[ True, False,  True],
           [False,  True, False],
           [False, False, False]]))
    """
    refuse_masked("labels", labels)
    rows = list(dense(labels)) if getattr(labels, "ndim", 1) == 2 else list(labels)
    if len(rows) != n_images:
        raise IosrFastError(f"expected a set of labels for each of {n_images} images, got {len(rows)}")
    for i, row in enumerate(rows):
        if not isinstance(row, _ROWS):
            fix = f": write {{{row!r}}}" if isinstance(row, str) else ""
            raise IosrFastError(f"expected sets of labels for all images or for none, got {row!r} at position {i}{fix}")
    values = [value for row in rows for value in row]
    if values and all(map(_is_number, values)) and not any(isinstance(row, _SETS) for row in rows):
        return None, _read_indicator(rows, classes)
    for i, row in enumerate(rows):
        if others := [label for label in row if not isinstance(label, str)]:
            got = f"{type(others[0]).__name__} ({others[0]!r})"
            raise IosrFastError(f"expected sets of class names, got {got} in the one at position {i}")
    names = sorted({str.__str__(name) for name in values}) if classes is None else list(classes)
    position = positions(names, values)
    indicator = np.zeros((len(rows), len(names)), bool)
    for i, row in enumerate(rows):
        indicator[i, [position[name] for name in row]] = True
    return names, indicator


def _read_indicator(rows: Sequence[Any], classes: Sequence[Any] | None) -> np.ndarray:
    lengths = sorted({len(row) for row in rows})
    expected = lengths[-1] if classes is None else len(classes)
    if lengths != [expected]:
        shown = abbreviate([str(length) for length in lengths])
        raise IosrFastError(
            f"expected an indicator (N, {expected}) with a column for each class, got rows of {shown} values"
        )
    values = np.array([list(row) for row in rows], np.float64)
    if len(wrong := values[~np.isin(values, (0.0, 1.0))]):
        raise IosrFastError(
            f"several labels an image: expected an indicator (N, C) of 0 and 1, or sets of names, got {wrong[0]:g}"
        )
    return values > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number | np.bool_)


def dense(indicator: Any) -> np.ndarray:
    """An indicator as an array; one of SciPy may be sparse."""
    return np.asarray(indicator.toarray() if hasattr(indicator, "toarray") else indicator)
