"""scikit-learn's classifiers on the same tasks, for comparison: they see the support images' embeddings, never texts.

Their parameters are chosen by cross-validation on the support set: stratified, five folds or as many as the smallest
class has images. If a class has one image, each takes the first value of its grid. LogisticRegression chooses C by
log-loss, which on few images is better than by accuracy, where many values are equal. "X++" is X on adapted embeddings.
"""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.config import Config, Evidence
from iosr_fast.methods.conformal import of_logits
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.utils.require import require

FOLDS = 5
ADAPTED = "++"


@dataclass(frozen=True)
class Rival:
    """A class of scikit-learn, its fixed options and the grid of one parameter.

    `path`: the class that fits all values of the grid in turn, each from the one before, and its argument for them.
    """

    module: str
    options: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    path: tuple[str, str] | None = None


_PLAIN = {
    "LogisticRegression": Rival(
        "linear_model", {"max_iter": 300}, {"C": (1.0, 10.0, 100.0, 1e3, 1e4)}, ("LogisticRegressionCV", "Cs")
    ),
    "LinearDiscriminantAnalysis": Rival(
        "discriminant_analysis", {"solver": "lsqr"}, {"shrinkage": (0.1, 0.3, 0.5, 0.7, 0.9)}
    ),
    "NearestCentroid": Rival("neighbors"),
    "KNeighborsClassifier": Rival("neighbors", {}, {"n_neighbors": (1, 3, 5, 10)}),
}
RIVALS = {name + suffix: rival for name, rival in _PLAIN.items() for suffix in ("", ADAPTED)}
# In every table: the field's usual linear probe, and the class means.
DEFAULT_RIVALS = tuple(name for name in RIVALS if name.startswith(("LogisticRegression", "NearestCentroid")))


def rival_unavailable_reason(name: str, support: SupportSet) -> str | None:
    """Why scikit-learn can't fit it; None if it can."""
    if find_spec("sklearn") is None:
        return f"{name} needs scikit-learn, which is not installed: pip install 'iosr_fast[sklearn]'"
    if name.endswith(ADAPTED) and support.embeddings.adapted is None:
        return f"{name} needs an encoder with an adapter; this one has none: use {name.removesuffix(ADAPTED)!r}"
    images = len(support.embeddings)
    fitted_on = images - images // _folds(support) if _folds(support) > 1 else images
    if name.startswith("LinearDiscriminantAnalysis") and fitted_on <= support.n_classes:
        return f"{name} needs more images than classes, also without those of a fold"
    if not support.counts.all():
        return f"{name} needs an image of each class"
    return None


def _folds(support: SupportSet) -> int:
    return min(FOLDS, int(support.counts.min()))


def fit_rival(name: str, support: SupportSet, seed: int) -> tuple[Any, Config]:
    """The fitted estimator, and its choice of parameters."""
    rival, rows, labels = RIVALS[name], _rows(name, support.embeddings), support.labels
    started = time.perf_counter()
    require("sklearn", "sklearn")
    parameters = {key: values[0] for key, values in rival.grid.items()}
    known = dict[str, Any]()
    folds = _folds(support)
    module = importlib.import_module(f"sklearn.{rival.module}")
    estimator = getattr(module, name.removesuffix(ADAPTED))(**rival.options, **parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few images of many classes, and of a fit that stops at max_iter
        if folds > 1 and rival.grid:
            selection = require("sklearn.model_selection", "sklearn")
            splits = selection.StratifiedKFold(folds, shuffle=True, random_state=seed)
            known = {"scored": len(labels), "protocol": "cross-validation"}
            if rival.path is None:
                grid = {key: list(values) for key, values in rival.grid.items()}
                estimator = selection.GridSearchCV(estimator, grid, cv=splits).fit(rows, labels)
                parameters = dict(estimator.best_params_)
                known["accuracy"] = float(estimator.best_score_)
            else:
                path, argument = rival.path
                options = {**rival.options, argument: rival.grid["C"], "scoring": "neg_log_loss"}
                estimator = getattr(module, path)(**options, cv=splits).fit(rows, labels)
                parameters, known["log_loss"] = _best_of_path(estimator)
        else:
            estimator.fit(rows, labels)
    evidence = Evidence(**known, seconds=time.perf_counter() - started)
    return estimator, Config(method=name, parameters=parameters, evidence=evidence)


def _best_of_path(estimator: Any) -> tuple[dict[str, float], float]:
    """C of LogisticRegressionCV, one for all classes, and its log-loss."""
    scores = estimator.scores_
    if isinstance(scores, dict):  # in some versions of scikit-learn the same array for each class
        scores = next(iter(scores.values()))
    return {"C": float(np.ravel(estimator.C_)[0])}, -float(np.mean(scores, axis=0).max())


def score_rival(name: str, estimator: Any, queries: Embeddings, labels: np.ndarray) -> tuple[float, ...]:
    """Accuracy on queries (B,) by its own `predict`, and, if it has probabilities, log-loss and calibration error
    (conformal.Reliability). A probability of 0 counts as the smallest step of float64 from 1, as scikit-learn's."""
    rows = _rows(name, queries)
    accuracy = float((estimator.predict(rows) == labels).mean())
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            probabilities = estimator.predict_proba(rows)
    except (AttributeError, ValueError):  # NearestCentroid of one image a class has no variance to compute them with
        return (accuracy,)
    found = of_logits(np.log(np.maximum(probabilities, np.finfo(np.float64).eps, dtype=np.float64)), labels).reliability
    return accuracy, found.log_loss, found.error


def _rows(name: str, embeddings: Embeddings) -> np.ndarray:
    rows = embeddings.adapted if name.endswith(ADAPTED) else embeddings.plain
    assert rows is not None, "guaranteed by rival_unavailable_reason"
    return np.asarray(rows)
