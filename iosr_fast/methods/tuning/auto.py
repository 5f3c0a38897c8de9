"""method="auto": method, reducer, plain or adapted embeddings and all parameters, from the support set alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods import METHODS, unavailable_reason
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.methods.tuning.tune import Tuned, is_level, tune
from iosr_fast.scoring.reducers import REDUCERS

# Of what can't be told apart on the support set, the one that the field's comparisons find stronger.
PREFERENCE = ("proker", "gda", "ape", "tip-x", "tip-adapter", "zero-shot")
# Kernel ridge takes an inverse of the images' kernel for each setting: beyond this many it isn't tried.
MOST_FOR_PROKER = 4096
_log = logging.getLogger("iosr_fast")


def tune_auto(support: SupportSet, queries: Embeddings | None = None, labels: np.ndarray | None = None) -> Tuned:
    """The best of all methods by leave-one-out on the support set (tune.tune), or on a validation set where given.

    First every method that the support set allows, on plain embeddings and, where there are any, on adapted ones,
    without a reducer; then the best of them with each reducer. What can't be told from the most accurate
    (tune.is_level) is level with it; of that the method that comes first in PREFERENCE wins, then the lowest log-loss
    (on a validation set: the highest accuracy). Where each class has one image, ProKeR (++ with an adapter) with
    one_shot.one_shot_parameters, or Tip-Adapter where there are too many images for it.

    Raises ValueError where there are no support images and no text embeddings.
    """
    started = time.perf_counter()
    if queries is None and int(support.counts.max(initial=0)) < 2:
        if len(support.embeddings):
            name = "proker" if len(support.embeddings) <= MOST_FOR_PROKER else "tip-adapter"
            return tune(name if support.embeddings.adapted is None else f"{name}++", support)
        if support.text is None:
            raise ValueError("expected support images or text embeddings, got neither")
        return Tuned("zero-shot", "none", {}, float("nan"), 0, "none")
    tried = [tune(name, support, queries, labels) for name in METHODS if _worth_trying(name, support)]
    best = _choose(tried)
    if METHODS[best.method].needs_support:
        others = [name for name in REDUCERS if name != "none"]
        tried += [tune(best.method, support, queries, labels, reducer=name) for name in others]
        best = _choose(tried)
    for one in tried:
        _log.info("auto: %s, reducer %s: %.4f on %d images", one.method, one.reducer, one.accuracy, one.scored)
    settings = sum(one.settings for one in tried)
    return replace(best, settings=settings, seconds=time.perf_counter() - started)


def _worth_trying(name: str, support: SupportSet) -> bool:
    told = unavailable_reason(name, support)
    if told is None and name.startswith("proker") and len(support.embeddings) > MOST_FOR_PROKER:
        told = f"proker is not tried on more than {MOST_FOR_PROKER} images"
    if told is not None:
        _log.info("auto: %s", told)
    return told is None


def _choose(tried: Sequence[Tuned]) -> Tuned:
    top = max(tried, key=lambda t: t.accuracy)
    level = [t for t in tried if is_level(t.right, top.right)]
    return min(
        level,
        key=lambda t: (
            PREFERENCE.index(t.method.removesuffix("++")),
            -t.accuracy if t.protocol == "validation" else t.log_loss,
        ),
    )
