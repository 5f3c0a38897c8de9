"""Several labels an image, as callers give them: sets of names, or an indicator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.names import check_names, check_separable
from iosr_fast.utils.numbers import refuse_masked
from iosr_fast.utils.text import abbreviate

_ROWS = (set, frozenset, list, tuple, np.ndarray)


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
    columns = [row for row in rows if not isinstance(row, set | frozenset) and len(row) == 1 and _is_number(row[0])]
    return len(columns) < len(rows)  # a column (N, 1) of numbers is one label an image


def read_label_sets(labels: Any, n_images: int) -> tuple[list[str] | None, np.ndarray]:
    """The names in the sets, sorted, and an indicator (N, C) bool in that order; no names of an indicator.

    Sets, lists and tuples hold names (str); an empty one is an image with none of the classes. Rows of numbers, all 0
    or 1, are an indicator, as scikit-learn has it, sparse or not.

    Raises IosrFastError, naming the position, for plain labels among sets, a label that is no text, and another number
    of rows than images; for an indicator with other values than 0 and 1 or rows of different lengths.

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
    if _are_numbers(rows):
        return None, _indicator(rows)
    sets = [[_name(label, i) for label in row] for i, row in enumerate(rows)]
    names = sorted({name for row in sets for name in row})
    position = {name: c for c, name in enumerate(names)}
    indicator = np.zeros((len(rows), len(names)), bool)
    for i, row in enumerate(sets):
        indicator[i, [position[name] for name in row]] = True
    return names, indicator


def check_label_sets(
    labels: Any, n_images: int, class_names: Any, separator: str
) -> tuple[list[str], np.ndarray, np.ndarray, bool]:
    """For a fit: the class names, and of each image (N,) which of the label sets it has; these sets, an indicator
    (P, C) bool of distinct rows; and whether the labels were an indicator.

    Raises IosrFastError as read_label_sets and labels.check_names, for labels without a name in `class_names`, an
    indicator without class names, and names that hold the separator of tables.
    """
    found, indicator = read_label_sets(labels, n_images)
    if found is None and class_names is None:
        raise IosrFastError("an indicator has no names: pass class_names, the name of each of its columns in order")
    names = check_names(found if class_names is None else class_names)
    check_separable(names, separator)
    known = indicator if found is None else known_label_sets(labels, n_images, np.array(names))
    if known.shape[1] != len(names):
        raise IosrFastError(f"expected an indicator of {len(names)} columns, one for each class, got {known.shape[1]}")
    sets, ids = np.unique(known, axis=0, return_inverse=True)
    return names, ids.reshape(-1), sets, found is None


def known_label_sets(labels: Any, n_images: int, classes: np.ndarray) -> np.ndarray:
    """An indicator (N, C) bool of labels of the fitted `classes` (C,); raises IosrFastError as read_label_sets, and for
    other classes.

    >>> known_label_sets([{"dog"}, []], 2, np.array(["cat", "dog"]))
    array([[False,  True],
           [False, False]])
    """
    names, given = read_label_sets(labels, n_images)
    if names is None:
        if given.shape[1] != len(classes):
            raise IosrFastError(f"expected an indicator of {len(classes)} columns, got {given.shape[1]}")
        return given
    position = {name: c for c, name in enumerate(classes.tolist())}
    if unknown := [name for name in names if name not in position]:
        raise IosrFastError(f"the labels {abbreviate(unknown)} are not among the {len(classes)} class names")
    indicator = np.zeros((n_images, len(classes)), bool)
    indicator[:, [position[name] for name in names]] = given
    return indicator


def dense(indicator: Any) -> np.ndarray:
    """An indicator as an array; one of SciPy may be sparse."""
    return np.asarray(indicator.toarray() if hasattr(indicator, "toarray") else indicator)


def label_sets(classes: np.ndarray, indicator: np.ndarray) -> np.ndarray:
    """The classes of each row of an indicator (B, C) as an array (B,) of frozensets.

    >>> label_sets(np.array(["cat", "dog"]), np.array([[True, False], [False, False]])).tolist()
    [frozenset({'cat'}), frozenset()]
    """
    sets = np.empty(len(indicator), object)
    for i, row in enumerate(indicator):
        sets[i] = frozenset(classes[row].tolist())
    return sets


def _are_numbers(rows: Sequence[Any]) -> bool:
    """Whether the rows are those of an indicator; a set has no order."""
    values = [value for row in rows for value in row]
    return bool(values) and not any(isinstance(row, set | frozenset) for row in rows) and all(map(_is_number, values))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number | np.bool_)


def _indicator(rows: Sequence[Any]) -> np.ndarray:
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise IosrFastError(
            f"expected an indicator with a column for each class, got rows of {abbreviate([*map(str, lengths)])} values"
        )
    values = np.array([list(row) for row in rows], np.float64)
    if not np.isin(values, (0.0, 1.0)).all():
        wrong = values[~np.isin(values, (0.0, 1.0))][0]
        raise IosrFastError(
            f"several labels an image: expected an indicator (N, C) of 0 and 1, or sets of names, got {wrong:g}"
        )
    return values > 0


def _name(label: Any, position: int) -> str:
    if not isinstance(label, str):
        raise IosrFastError(
            f"expected sets of class names, got {type(label).__name__} ({label!r}) in the one at position {position}"
        )
    return str.__str__(label)
