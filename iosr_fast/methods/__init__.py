"""Training-free methods: each compiles a support set into a ScoringPlan, independent of any device.

`tune.tune` is the way of a fit: `folds.make_folds` leaves images out, `out_of_fold.HeldOut` asks each model of
`models/` for its logits of them, `stack_weights.fit_stack` or, for a named method, `search.ParameterSearch` chooses by
these; `fit_stack` and, for a named method, `compile_method` add the terms up to a plan. `out_of_fold.OutOfFold` has the
logits of what was chosen, by folds that leave look-alikes (`look_alikes.find_look_alikes`) out together: promises, sets
of labels, calibration, audit and joint prediction read them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.papers import MAX_KEYS, METHODS, PARAMETER_RANGES, Method
from iosr_fast.methods.support_set import SupportSet, image_rows
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reducers import Reducer, fit_reducer
from iosr_fast.scoring.validation import check_number
from iosr_fast.utils.text import abbreviate, did_you_mean

__all__ = [
    "METHODS",
    "Method",
    "check_parameters",
    "compile_method",
    "fit_method_reducer",
    "reason_against",
    "unavailable_reason",
]


def unknown_method(name: str, known: Iterable[str]) -> IosrFastError:
    """The error of a method's name that is none of `known`."""
    listed = list(known)
    return IosrFastError(f"{did_you_mean(str(name), listed)}expected a method of {', '.join(listed)}, got {name!r}")


def check_parameters(name: str, **parameters: float | None) -> dict[str, float]:
    """The parameters that are not None, as floats. Raises IosrFastError for an unknown method, a parameter that the
    method does not have, or a value out of range.
    """
    method = METHODS.get(name)
    if method is None:
        raise unknown_method(name, METHODS)
    values = {key: value for key, value in parameters.items() if value is not None}
    unknown = sorted(set(values) - set(method.parameters))
    if unknown:
        raise IosrFastError(f"{name} has the parameters {sorted(method.parameters)}, got {unknown}")
    fixes = {key: f"{method.parameters[key]:g} is the default" for key in values}
    return {
        key: check_number(f"{key} of {name}", value, *PARAMETER_RANGES[key], fixes[key])
        for key, value in values.items()
    }


def unavailable_reason(name: str, support: SupportSet) -> str | None:
    """Why a method can't be fitted to a support set; None if it can."""
    if support.owners is not None and (reason := _against_label_sets(name, support)) is not None:
        return reason
    has_adapted = support.embeddings.adapted is not None
    return reason_against(name, support.counts, support.text is not None, has_adapted)


def reason_against(name: str, counts: np.ndarray, has_text: bool, has_adapted: bool) -> str | None:
    """As unavailable_reason, of classes with `counts` (C,) images, with texts and adapted embeddings or without."""
    method = METHODS[name]
    n_images = int(counts.sum())
    if method.needs_text and not has_text:
        return (
            f"{name} compares images with texts, and there are no text embeddings: take a CLIP, or in FewShotHead give "
            "text=, an array (C, D)"
        )
    if method.needs_support and n_images == 0:
        return f"{name} needs support images, got none; give a few a class, or use method='zero-shot'"
    if method.needs_adapter and not has_adapted:
        return (
            f"{name} compares adapted embeddings, and there are none: use {name.removesuffix('++')!r}, an encoder with "
            "an adapter, or in FewShotHead adapted=True and X of (n, 2 D)"
        )
    if method.needs_every_class and not counts.all():
        return f"{name} needs at least one image of each class, got none of {int((counts == 0).sum())} classes"
    if method.max_support is not None and n_images > method.max_support:
        return f"{name}: expected at most {method.max_support} support images, got {n_images}"
    return None


def multi_label_reason(method: str, reducer: str | None = None) -> str | None:
    """Why a method, or "auto", can't learn from images with several labels; None if it can.

    >>> multi_label_reason("gda++")
    "gda++ can't learn from several labels an image: its formula has one label an image; use 'auto'"
    """
    if method in METHODS and not METHODS[method].takes_label_sets:
        return f"{method} can't learn from several labels an image: its formula has one label an image; use 'auto'"
    if reducer not in (None, "none"):
        return f"several labels an image take no reducer, got {reducer!r}: leave it out"
    return None


def _against_label_sets(name: str, support: SupportSet) -> str | None:
    """What images with any number of labels lack for a method."""
    if (reason := multi_label_reason(name)) is not None:
        return reason
    n_images = len(support.embeddings)
    if not support.n_classes:
        return "several labels an image: expected labels of at least one class, got empty sets alone"
    if not 2 <= n_images <= MAX_KEYS:
        return f"several labels an image: expected 2 to {MAX_KEYS} support images, got {n_images}"
    if METHODS[name].needs_support and len(empty := np.flatnonzero(support.counts == 0)):
        columns = abbreviate([str(column) for column in empty])
        return f"{name} needs at least one image of each class, got none of the classes at {columns}"
    return None


def fit_method_reducer(method: Method, reducer: str, support: SupportSet) -> Reducer | None:
    """The named reducer, fitted on the embeddings that the method compares; None if it uses no support images."""
    if not method.takes_reducer:
        return None
    return fit_reducer(reducer, image_rows(support.embeddings, method.which, None))


def compile_method(
    name: str, support: SupportSet, *, reducer: str | Reducer | None = None, **parameters: Any
) -> ScoringPlan:
    """The plan of a method by name; a parameter that is None or missing takes the method's default.

    `reducer` is a fitted one, or the name of one to fit on the embeddings that the method compares
    (scoring.reducers.fit_reducer). Raises IosrFastError for an unknown method, parameter or reducer, a value out of
    range, and if the support set lacks what the method needs: images, texts, adapted embeddings.

    >>> import numpy as np
    >>> from iosr_fast import Embeddings, score
    >>> from iosr_fast.methods.support_set import make_support_set
    >>> images = Embeddings(np.eye(4, dtype=np.float32)[:3])
    >>> support = make_support_set(images, labels=np.array([0, 0, 1]), text=np.eye(2, 4), tau=10.0)
    >>> plan = compile_method("tip-adapter", support, beta=3.0, reducer="centre")
    >>> plan.alpha, plan.beta, plan.keys.shape
    (1.0, 3.0, (3, 4))
    >>> score(plan, images).argmax(1)
    array([0, 1, 1])
    """
    values = check_parameters(name, **parameters)
    reason = unavailable_reason(name, support)
    if reason is not None:
        raise IosrFastError(reason)
    method = METHODS[name]
    if isinstance(reducer, str):
        reducer = fit_method_reducer(method, reducer, support)
    return method.compile(support, reducer, {**method.parameters, **values})
