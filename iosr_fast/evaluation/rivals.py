"""scikit-learn's classifiers on the same tasks, for comparison: they see the support images' embeddings, never texts.

Their parameters are chosen by cross-validation on the support set: stratified, five folds or as many as the smallest
class has images. If a class has one image, each takes the first value of its grid.
"""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from iosr_fast.methods.support_set import SupportSet
from iosr_fast.methods.tuning.tune import Tuned
from iosr_fast.utils.require import require

FOLDS = 5


@dataclass(frozen=True)
class Rival:
    """A class of scikit-learn, its fixed options and the grid of one parameter."""

    module: str
    options: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


RIVALS = {
    "LogisticRegression": Rival("linear_model", {"max_iter": 300}, {"C": (1.0, 10.0, 100.0, 1e3, 1e4)}),
    "LinearDiscriminantAnalysis": Rival(
        "discriminant_analysis", {"solver": "lsqr"}, {"shrinkage": (0.1, 0.3, 0.5, 0.7, 0.9)}
    ),
    "NearestCentroid": Rival("neighbors"),
    "KNeighborsClassifier": Rival("neighbors", {}, {"n_neighbors": (1, 3, 5, 10)}),
}


def rival_unavailable_reason(name: str, support: SupportSet) -> str | None:
    """Why scikit-learn can't fit it; None if it can."""
    if name == "LinearDiscriminantAnalysis" and len(support.embeddings) <= support.n_classes:
        return f"{name} needs more images than classes"
    if not support.counts.all():
        return f"{name} needs an image of each class"
    return None


def fit_rival(name: str, support: SupportSet, seed: int) -> tuple[Any, Tuned]:
    """The fitted estimator, and its choice of parameters."""
    rival, rows, labels = RIVALS[name], support.embeddings.plain, support.labels
    started = time.perf_counter()
    require("sklearn", "sklearn")
    estimator = getattr(importlib.import_module(f"sklearn.{rival.module}"), name)(**rival.options)
    parameters = {key: values[0] for key, values in rival.grid.items()}
    folds = min(FOLDS, int(support.counts.min()))
    accuracy, protocol = float("nan"), "none" if folds < 2 else "cross-validation"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few images of many classes, and of a fit that stops at max_iter
        if folds > 1:
            selection = require("sklearn.model_selection", "sklearn")
            splits = selection.StratifiedKFold(folds, shuffle=True, random_state=seed)
            search = selection.GridSearchCV(estimator, {key: list(v) for key, v in rival.grid.items()}, cv=splits)
            search.fit(rows, labels)
            parameters, accuracy = search.best_params_, float(search.best_score_)
        estimator.set_params(**parameters).fit(rows, labels)
    scored = len(labels) if folds > 1 else 0
    seconds = time.perf_counter() - started
    return estimator, Tuned(name, "none", dict(parameters), accuracy, scored, protocol, seconds=seconds)  # type: ignore[arg-type]


def rival_accuracy(estimator: Any, queries: np.ndarray, labels: np.ndarray) -> float:
    """The share of rows (B, D) whose predicted class is their label."""
    return float((estimator.predict(queries) == labels).mean())
