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
from iosr_fast.methods.config import Config
from iosr_fast.methods.tree import Path
from iosr_fast.methods.tune import Tuning, tune

NO_TREE = "several labels a picture take no tree: a node above a class can be another label of it"


def fit_head(
    asked: Config,
    tuning: Tuning,
    seconds: float,
    names: Sequence[str],
    text: np.ndarray | None,
    tau: float,
    examples: Examples,
    label_sets: np.ndarray | None,
    unknown_images: Embeddings | None,
    paths: tuple[Path, ...] | None = None,
    numbers: Sequence[int] | None = None,
) -> Head:
    """The head of support images whose class ids are positions in `names` (C), or in `label_sets` (P, C) bool. The
    config is chosen as it is `asked` for (methods.tune.tune); `paths` as of Head, `numbers` (C) become its uids."""
    if label_sets is None:
        examples = examples.sorted_by_class()
    else:
        examples = examples.labelled(label_sets[examples.class_ids], range(len(names)))
    support = examples.as_support(range(len(names)), text, tau)
    if tuning != "none":
        support.check_memory()
    config, reducer, plan = tune(asked, support, tuning=tuning, seconds=seconds)
    if numbers is not None:
        examples = replace(examples, class_ids=np.array(numbers)[examples.class_ids])
    fields: dict[str, Any] = {"unknown_images": unknown_images, "paths": paths, "uids": numbers}
    head = Head.first(names, text, tau, examples, config, reducer, **fields)
    # Where pictures may have several labels, the head fits scale and biases, as it does after each change.
    return head.with_computed(support=support, plan=plan if label_sets is None else None)


def warn_of_look_alikes(head: Head) -> None:
    """Warn the caller of a fit where promises may break (LookAlikesWarning)."""
    if head.look_alike_warning:
        warnings.warn("; ".join(head.look_alike_warning), LookAlikesWarning, stacklevel=3)


def check_multi_label(asked: Config, unknown_images: Any, tree: Any) -> None:
    """Raise IosrFastError for what does not go with several labels a picture: some methods, a reducer, unknown images
    and a tree."""
    if (reason := asked.multi_label_reason) is not None:
        raise IosrFastError(reason)
    if unknown_images is not None:
        raise IosrFastError("several labels a picture take no unknown_images: give them as pictures of no label")
    if tree is not None:
        raise IosrFastError(NO_TREE)
