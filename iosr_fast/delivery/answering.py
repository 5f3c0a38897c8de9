"""Answering: the questions that a fitted classifier answers, of Classifier and FewShotHead alike."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Generic, Literal, TypeVar

import numpy as np

from iosr_fast.delivery.fitted import FittedClassifier
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.head.head import Head
from iosr_fast.head.ids import example_id
from iosr_fast.head.labels import read_label_sets
from iosr_fast.head.predictions import Prediction, predict, predict_jointly
from iosr_fast.head.verdict import NONE_WITHHELD, Abstention, judge, node_labels, nodes_above
from iosr_fast.methods.automation import Automation, automation
from iosr_fast.methods.checks import CheckedPromise, check
from iosr_fast.methods.config import Evidence
from iosr_fast.methods.conformal import COVERAGE, Reliability, sets_of_labels
from iosr_fast.methods.joint import JointPrediction
from iosr_fast.methods.support_audit import SupportAudit, audit_support
from iosr_fast.methods.unknown import KEEP, Unknown
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.utils.html import Html, element, overview
from iosr_fast.utils.numbers import check_integer, check_share

T = TypeVar("T")


class FittedAttribute(Generic[T]):
    """An attribute that is read from what is fitted. Raises NotFittedError before a fit."""

    def __init__(self, read: Callable[[Any], T]) -> None:
        self._read = read

    def __get__(self, classifier: Any, owner: type | None = None) -> T:
        return self._read(classifier._fitted())


class Answering:
    """Questions and answers. Each reads what is fitted once, so that it is of one version whatever is fitted or changed
    meanwhile, and refuses before X is encoded what this head, or so few support images, can't answer.

    X are the queries: images (Classifier) or rows of embeddings (FewShotHead), B of them.
    """

    _probability_dtype: ClassVar[Any] = np.float32
    _unit_rows: ClassVar[bool] = True  # whether scoring refuses queries that are not of unit length

    @abstractmethod
    def _fitted(self) -> FittedClassifier:
        """What is fitted. Raises NotFittedError before a fit."""

    def _queries(self, fitted: FittedClassifier, X: Any) -> Iterator[Embeddings]:
        """The embeddings of X as `fitted` compares them, in blocks, each encoded when it is taken."""
        return fitted.queries(X)

    def _score(self, fitted: FittedClassifier, block: Embeddings) -> np.ndarray:
        """Logits (B, C) float32 of a block."""
        return fitted.head.score(block, self._unit_rows)

    def _labels(self, fitted: FittedClassifier, logits: np.ndarray) -> np.ndarray:
        """What `predict` answers to queries with these logits, where it withholds no label."""
        return self._in_form(fitted, fitted.head.link.named(fitted.head.link.decide(logits), fitted.labels))

    def _in_form(self, fitted: FittedClassifier, labels: np.ndarray) -> np.ndarray:
        """Labels in the form of those of the fit."""
        return labels

    def _name_of(self, number: int) -> Any:
        """What `audit` calls a support image of this number."""
        return example_id(number)

    def _logits(self, fitted: FittedClassifier, X: Any) -> np.ndarray:
        blocks = (self._score(fitted, block) for block in self._queries(fitted, X))
        return np.concatenate([np.zeros((0, len(fitted.labels)), np.float32), *blocks])

    def _repr_html_(self) -> Html:
        """What a notebook shows: the method, the accuracy and the classes; before a fit the parameters."""
        if not self.__sklearn_is_fitted__():  # type: ignore[attr-defined]
            return element("pre", repr(self))
        head = self._fitted().head
        known = f"{self!r}\n{len(head.uids):,} classes, {len(head.examples):,} images, method {head.config.method}"
        return overview(f"{known}\n{head.summary()}", {"class": head.class_names, "images": head.counts})

    classes_ = FittedAttribute[np.ndarray](lambda fitted: fitted.labels)
    plan_ = FittedAttribute[ScoringPlan](lambda fitted: fitted.head.plan)
    method_ = FittedAttribute[str](lambda fitted: fitted.head.config.method)
    reducer_ = FittedAttribute[str](lambda fitted: fitted.head.config.reducer)
    parameters_ = FittedAttribute[dict[str, float]](lambda fitted: dict(fitted.head.config.parameters))
    tuned_ = FittedAttribute[Evidence | None](lambda fitted: fitted.head.evidence)
    thresholds_ = FittedAttribute[np.ndarray | None](lambda fitted: fitted.head.thresholds)
    unknown_ = FittedAttribute[Unknown](lambda fitted: fitted.head.unknown)

    def snapshot(self) -> Head:
        """The current head, which never changes: all predictions of it are of one version."""
        return self._fitted().head

    def predict(
        self,
        X: Any,
        unknown: Literal["reject"] | None = None,
        unknown_label: Any = None,
        keep: float = KEEP,
        max_error: float | None = None,
    ) -> np.ndarray:
        """The labels (B,) out of `classes_`, of the largest logit; of equal ones the first. With several labels a
        picture a frozenset of labels for each, (B,) of dtype object, or an indicator (B, C) of integers if the labels
        of `fit` were one (of FewShotHead of their dtype).

        unknown="reject" gives None, or `unknown_label`, for pictures that `unknown_score` says belong to none of the
        classes: a share `keep` of those that do belong to one keeps its label. Refused where there are too few support
        images for that promise: 0.95 takes 19 that can be left out.

        `max_error` gives None for pictures at which somebody has to look: of the labels that stay at most this share
        is wrong, with 95% confidence, for pictures like the support images (methods.automation). Of several labels a
        picture those stay that are sure enough. With a tree a label is the deepest node that is sure enough, a class
        or the name of a node above it: wrong is one above another class. Refused where there are too few support
        images for that promise: 0.01 takes 299 that can be left out, 0.05 takes 59. Of pictures of no class it says
        nothing: `unknown` does.
        """
        abstention = Abstention.of(unknown, unknown_label, keep, max_error)
        fitted = self._fitted()
        if abstention == NONE_WITHHELD:
            return self._labels(fitted, self._logits(fitted, X))
        head, nodes = fitted.head, node_labels(fitted.head, fitted.labels)
        abstention.check(head, nodes.tolist())
        blocks = self._queries(fitted, X)
        verdicts = (judge(head, block, abstention, self._score(fitted, block)) for block in blocks)
        named = [verdict.named(head.link, nodes, abstention.label) for verdict in verdicts]
        return self._in_form(fitted, np.concatenate(named)) if named else self._labels(fitted, self._logits(fitted, X))

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits (B, C) float32; of two classes (B,), the second one's minus the first one's, unless pictures may have
        several labels."""
        fitted = self._fitted()
        return fitted.head.link.decision(self._logits(fitted, X))

    def predict_proba(self, X: Any) -> np.ndarray:
        """softmax of the logits over their temperature (Head.temperature), (B, C), float32 of images and float64 of
        rows, in the order of `classes_`. With several labels a picture the probability of each class by itself,
        1 / (1 + exp(-logit))."""
        fitted = self._fitted()
        return fitted.head.probabilities(self._logits(fitted, X).astype(self._probability_dtype, copy=False))

    def explain(
        self,
        X: Any,
        top: int = 5,
        nearest: int = 0,
        unknown: Literal["reject"] | None = None,
        keep: float = KEEP,
        max_error: float | None = None,
    ) -> list[Prediction]:
        """A Prediction for each query: the `top` classes with what texts, examples and their adapted embeddings
        contribute to each, and the `nearest` support images. With unknown="reject" and `keep` as in `predict`, its
        `unknown` has the score, and `label` is None for a picture of none of the classes; with `max_error`, `accepted`
        is whether `predict` gives the label."""
        top, nearest = check_integer("top", top, 1), check_integer("nearest", nearest, 0)
        abstention = Abstention.of(unknown, None, keep, max_error)
        fitted = self._fitted()
        head = fitted.head
        abstention.check(head)
        predictions: list[Prediction] = []
        for block in self._queries(fitted, X):
            predictions += predict(head, block, top, nearest, abstention, self._score(fitted, block))
        return predictions

    def predict_jointly(self, X: Any) -> JointPrediction:
        """Probabilities (B, C) float32 of pictures that are classified together (methods.joint), which gains most with
        few shots and many pictures. Where left-out support images say that it harms, `refused` says why, and the
        probabilities are those of `predict_proba`."""
        fitted = self._fitted()
        head = fitted.head
        NONE_WITHHELD.check(head, joint=True)
        blocks = [block.to_numpy() for block in self._queries(fitted, X)] or [head.examples.embeddings[:0]]
        return predict_jointly(head, Embeddings.concatenate(blocks), fitted.labels, self._unit_rows)

    def predict_sets(self, X: Any, coverage: float = COVERAGE, per_class: bool = False) -> list[np.ndarray]:
        """For each query the labels that it may have, most likely first, or none: a share `coverage` of the sets has
        the picture's label (methods.conformal), with `per_class` of the pictures of each class. Refused where support
        images are too few for that: 0.9 takes 9 that can be left out, with `per_class` 9 of each class."""
        fitted = self._fitted()
        head = fitted.head.require_single_label("predict_sets")
        coverage = check_share("coverage", coverage)
        left_out = head.judged
        classes = fitted.labels if per_class else None
        left_out.thresholds(coverage, classes)
        logits = head.calibrated(self._logits(fitted, X))
        return sets_of_labels(fitted.labels, logits, left_out.sets(logits, coverage, classes))

    def unknown_score(self, X: Any) -> np.ndarray:
        """How unlike all classes each query is, (B,) float64: of left-out support images the mean is 0, the standard
        deviation 1. 95% of pictures of the classes do not exceed `unknown_.threshold(0.95)` (methods.unknown)."""
        fitted = self._fitted()
        model = fitted.head.unknown
        return np.concatenate([np.zeros(0), *(model.score(block.to_numpy()) for block in self._queries(fitted, X))])

    def automation(self) -> Automation:
        """What may be automated, as left-out support images say; print it. For each promised error: the least
        probability of a label that `predict` accepts, the share of images whose label is accepted, and how many of
        these are wrong. `smallest` is the smallest error that so many images can promise."""
        head = self._fitted().head
        return automation(head.judged, notes=head.doubts)

    def check(self, answers: Any, labels: Any, max_error: float) -> CheckedPromise:
        """As checks.check, by the tree of this classifier."""
        fitted = self._fitted()
        if fitted.head.is_multi_label:
            classes = fitted.labels.tolist()
            given = (read_label_sets(one, len(answers), classes)[1] for one in (answers, labels))
            answers, labels = ([set(np.flatnonzero(row).tolist()) for row in indicator] for indicator in given)
        return check(answers, labels, max_error, nodes_above(fitted.head, fitted.labels))

    def calibration(self) -> Reliability:
        """How right the probabilities of left-out support images are, by bins of the probability; print it."""
        return self._fitted().head.judged.reliability

    def audit(self) -> SupportAudit:
        """What is wrong with the support images, as left-out ones tell: likely wrong labels, of several a picture the
        missing ones, too, near duplicates, classes that are confused or have too few or too alike images
        (methods.support_audit). Images are named by their ids and files, rows by their positions in the X of `fit`."""
        fitted = self._fitted()
        head = fitted.head
        images = np.array([self._name_of(number) for number in head.examples.ids.tolist()])
        names: dict[str, Any] = {"images": images, "classes": fitted.labels, "paths": head.examples.paths}
        names |= {"notes": head.look_alike_warning, "link": head.link}
        return audit_support(head.support, head.calibrated_out_of_fold, which=head.config.which, **names)
