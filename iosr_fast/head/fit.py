"""How a head is made of embeddings and labels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError, LookAlikesWarning
from iosr_fast.head.examples import Examples
from iosr_fast.head.head import Head
from iosr_fast.methods import multi_label_reason
from iosr_fast.methods.multi_label import fit_multi_label
from iosr_fast.methods.tree import Path
from iosr_fast.methods.tune import Options


def fit_head(
    options: Options,
    names: Sequence[str],
    text: np.ndarray | None,
    tau: float,
    examples: Examples,
    label_sets: np.ndarray | None,
    unknown_images: Embeddings | None,
    paths: tuple[Path, ...] | None = None,
    numbers: Sequence[int] | None = None,
) -> Head:
    """The head of support images whose class ids are positions in `names` (C), or in `label_sets` (P, C) bool; `paths`
    as of Head, `numbers` (C) become its uids."""
    if label_sets is None:
        examples = examples.sorted_by_class()
        support = examples.as_support(range(len(names)), text, tau)
        if options.tune != "none":
            support.check_memory()
        fit = options.fit(support)
        fields: dict[str, Any] = {"unknown_images": unknown_images, "paths": paths, "uids": numbers}
        if numbers is not None:
            examples = replace(examples, class_ids=np.array(numbers)[examples.class_ids])
        head = Head.first(names, text, tau, examples, fit.config, fit.reducer, **fields)
        return head.with_computed(support=support, plan=fit.plan)
    examples = examples.labelled(label_sets[examples.class_ids], range(len(names)))
    asked = options.config
    support = examples.as_support(range(len(names)), text, tau)
    setting = None if options.searched else asked.parameters
    of_sets = fit_multi_label(support, asked.method, setting, asked.key_precision, options.seconds)
    head = Head.first(names, text, tau, examples, of_sets.config, thresholds=of_sets.thresholds)
    return head.with_computed(plan=of_sets.plan)


def warn_of_look_alikes(head: Head) -> None:
    """Warn the caller of a fit where promises may break (LookAlikesWarning)."""
    if head.look_alike_warning:
        warnings.warn("; ".join(head.look_alike_warning), LookAlikesWarning, stacklevel=3)


def check_multi_label(options: Options, unknown_images: Any, tree: Any) -> None:
    """Raise IosrFastError for what does not go with several labels a picture: some methods, a reducer, unknown images
    and a tree."""
    if (reason := multi_label_reason(options.config.method, options.config.reducer)) is not None:
        raise IosrFastError(reason)
    if unknown_images is not None:
        raise IosrFastError("several labels a picture take no unknown_images: give them as pictures of no label")
    if tree is not None:
        raise IosrFastError("several labels a picture take no tree: a node above a class can be another label of it")
