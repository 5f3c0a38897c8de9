"""Labels and support images as callers give them, checked before anything is encoded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from iosr_fast.predictions import uid_of
from iosr_fast.preprocess import find_bad

logger = logging.getLogger(__name__)


def some(values: Sequence[str]) -> str:
    shown = ", ".join(repr(value) for value in values[:5])
    return shown if len(values) <= 5 else f"{shown} and {len(values) - 5} more"


def check_labels(images: Sequence[Any], labels: Any, class_names: Sequence[str] | None) -> tuple[list[str], np.ndarray]:
    """The class names and each image's class id."""
    given = np.asarray([] if labels is None else labels)
    if given.shape != (len(images),):
        raise ValueError(f"expected one label for each of {len(images)} images, got labels of shape {given.shape}")
    if len(given) and given.dtype.kind not in "iuUS":
        raise ValueError(f"expected labels to be class names or integers, got {given.dtype}")
    numbered = given.dtype.kind in "iu"
    if class_names is None:
        if not len(given):
            raise ValueError("expected labelled images or class_names, got neither: without them there are no classes")
        if numbered:
            raise ValueError("integer labels have no names: pass class_names, the name of each class in order")
        class_names = sorted(set(given.tolist()))
    names = [str(name) for name in class_names]
    if len(names) < 2:
        raise ValueError(f"expected at least two classes to tell apart, got {len(names)}: {names}")
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"expected class names to differ, got {some(twice)} more than once")
    reserved = [name for name in names if uid_of(name) is not None or not name.strip()]
    if reserved:
        raise ValueError(f"expected class names, got {some(reserved)}: empty ones and ~7 (an id's form) are not names")
    if not len(given):
        return names, np.zeros(0, np.int64)
    if numbered:
        outside = sorted({str(i) for i in given.tolist() if not 0 <= i < len(names)})
        if outside:
            raise ValueError(f"expected labels in 0..{len(names) - 1}, one for each class name, got {some(outside)}")
        return names, given.astype(np.int64)
    index = {name: i for i, name in enumerate(names)}
    unknown = sorted({name for name in given.tolist() if name not in index})
    if unknown:
        raise ValueError(f"the labels {some(unknown)} are not among the {len(names)} class names")
    return names, np.array([index[name] for name in given.tolist()])


def leave_out_bad(
    images: Sequence[Any], ids: np.ndarray, skip_bad: bool
) -> tuple[Sequence[Any], np.ndarray, list[str]]:
    """Decode everything once before any work starts; unreadable images are left out or refused, all of them by name."""
    bad = find_bad(images)
    if not bad:
        return images, ids, []
    if not skip_bad:
        if len(bad) == 1:
            raise next(iter(bad.values()))
        shown = "; ".join(str(error) for error in list(bad.values())[:5])
        raise ValueError(f"{len(bad)} of {len(images)} images can't be read (skip_bad leaves them out): {shown}")
    for error in bad.values():
        logger.warning("left out: %s", error)
    kept = [i for i in range(len(images)) if i not in bad]
    return [images[i] for i in kept], ids[kept], [error.where for error in bad.values()]
