"""A fit: class names and support images become the first State of a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Encoder
from iosr_fast.encoders.text_encoder import TextSource
from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.preprocess import as_image_list
from iosr_fast.methods import METHODS
from iosr_fast.methods.tuning.tune import Tuned
from iosr_fast.scoring.precision import Precision
from iosr_fast.state.labels import check_labels
from iosr_fast.state.method_config import choose_config, is_searched
from iosr_fast.state.state import State
from iosr_fast.state.support_images import SupportViews, encode_images
from iosr_fast.utils.progress import progress as bar
from iosr_fast.utils.text import abbreviate


@dataclass(frozen=True)
class Fit:
    """The result of `fit`: `tuned` is None where no parameter was searched, `skipped` names unreadable images."""

    state: State
    views: SupportViews
    tuned: Tuned | None
    skipped: list[str]


def fit(
    encoder: Encoder,
    text: TextSource,
    tau: float,
    images: Any,
    labels: Any,
    class_names: Sequence[str] | None,
    *,
    method: str,
    reducer: str | None,
    tune: str | None,
    parameters: dict[str, float],
    views: SupportViews,
    key_precision: Precision,
    skip_bad: bool,
    progress: bool,
) -> Fit:
    """As Classifier.fit; `method`, `reducer`, `tune` and `parameters` are those that `check_choice` has checked."""
    listed = [] if images is None else as_image_list(images)
    names, ids = check_labels(listed, labels, class_names)
    _check_classes(method, ids, names)
    if method != "auto" and METHODS[method].needs_adapter and not encoder.adapted:
        raise IosrFastError(f"{method} needs an encoder with an adapter; this one has none: use {method[:-2]!r}")
    searched = is_searched(method, tune, parameters)
    # Later queries are single views, so that is what leave-one-out has to score.
    views = replace(views, single=searched and views.views > 1)
    embedded = text.embed_classes(names, views.templates)
    with bar("encode", len(listed), shown=progress) as step:
        examples, errors = encode_images(encoder, listed, ids, views, skip_bad, names, step)
    if errors:
        _check_classes(method, examples.class_ids, names)
    examples = examples.rows(np.argsort(examples.class_ids, kind="stable"))
    support = examples.as_support(range(len(names)), embedded, tau)
    with bar("tune", None, shown=progress and searched and bool(len(examples))):
        config, tuned = choose_config(
            method, support, reducer=reducer, tune=tune, parameters=parameters, key_precision=key_precision
        )
    state = State.first(names, embedded, tau, examples, config)
    views = replace(views, single=examples.queries is not None)
    return Fit(state, views, tuned, [error.where for error in errors])


def _check_classes(method: str, ids: np.ndarray, names: Sequence[str]) -> None:
    """Raise ValueError where a class has no image and the method needs one."""
    if method == "auto" or METHODS[method].needs_support:
        empty = [name for name, count in zip(names, np.bincount(ids, minlength=len(names)), strict=True) if not count]
        if empty:
            raise IosrFastError(f"{method} needs at least one image of each class, got none of {abbreviate(empty)}")
