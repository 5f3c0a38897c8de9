"""Head: a fitted classifier of one label a picture, on embeddings, at one version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.head_data import HeadData
from iosr_fast.head.labels import class_ids
from iosr_fast.methods import METHODS
from iosr_fast.methods.conformal import LeftOutLabels, of_logits
from iosr_fast.methods.models.gaussian import GaussianModel
from iosr_fast.methods.out_of_fold import OutOfFold, out_of_fold
from iosr_fast.methods.support_audit import SupportAudit, audit_support
from iosr_fast.methods.support_set import SupportSet, image_rows
from iosr_fast.methods.tuned import Tuned
from iosr_fast.methods.unknown import Unknown, fit_unknown
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reference import softmax


@dataclass(frozen=True, eq=False)
class Head(HeadData):
    """Classes, their support images and a method.

    unknown_images  embeddings of pictures of none of the classes, by which these are recognised, or None
    """

    unknown_images: Embeddings | None = None

    @cached_property
    def support(self) -> SupportSet:
        """The support images as methods take them."""
        return self.examples.as_support(self.uids, self.text, self.tau)

    @cached_property
    def plan(self) -> ScoringPlan:
        """The method, compiled for the support images; given where it was stored (`with_computed`)."""
        return self.config.compile(self.support)

    @property
    def tuned(self) -> Tuned | None:
        """The search that chose the config, `stale` if the head has changed since; None if there was none."""
        tuned = self.config.tuned
        return tuned if tuned is None or tuned.version == self.version else replace(tuned, stale=True)

    # What left-out support images answer, each at its first use

    @cached_property
    def out_of_fold(self) -> OutOfFold:
        """The logits of support images that are left out, from which the rest follows; those of the search that chose
        the parameters, if it has seen these support images."""
        config, tuned = self.config, self.tuned
        if tuned is not None and not tuned.stale and tuned.out_of_fold is not None:
            return tuned.out_of_fold
        return out_of_fold(METHODS[config.method], self.support, config.reducer, config.parameters, config.factor)

    @cached_property
    def left_out_labels(self) -> LeftOutLabels:
        """What the method says of support images that are left out."""
        return of_logits(self.out_of_fold.logits, self.out_of_fold.labels)

    @cached_property
    def unknown(self) -> Unknown:
        """How pictures of no class are recognised, by the embeddings that queries have."""
        return fit_unknown(self.support, self.needs_adapted, self.unknown_images)

    def audit(self, images: np.ndarray, classes: np.ndarray) -> SupportAudit:
        """What is wrong with the support images; `images` (N,) and `classes` (C,) are their names in the result."""
        names = {"images": images, "classes": classes}
        return audit_support(self.support, self.out_of_fold, self.config.compile, which=self.config.which, **names)

    @property
    def left_out_accuracy(self) -> float:
        """The share of left-out support images that are right, as the fit reports it; where the parameters were given,
        or the head has changed since, with the present ones. NaN if none can be left out."""
        tuned = self.tuned
        if tuned is None or tuned.stale or tuned.interval is None:
            return self.left_out_labels.reliability.accuracy
        return tuned.accuracy

    def summary(self) -> str:
        """What is known of the accuracy, in a line."""
        return "accuracy not measured: the parameters were given" if self.tuned is None else self.tuned.summary()

    @cached_property
    def compared(self) -> np.ndarray:
        """The rows (N, D) that the method compares with a query; neighbours are found by them."""
        return image_rows(self.examples.embeddings, self.config.which, self.config.reducer)

    @cached_property
    def adapted_bias(self) -> np.ndarray:
        """Of a plan whose linear term reads both embeddings (methods.stack), the bias (C,) of the adapted half."""
        given, factor = self.config.parameters, self.config.factor
        model = GaussianModel(self.support, "adapted", copies=given.get("text_images", 0.0))
        bias: np.ndarray = factor * given["discriminant_adapted"] * model.gaussians.bias
        return bias

    # What a MultiLabelHead answers in its own way

    def one_label(self, call: str, instead: str = "") -> Head:
        """The head itself: it has an answer to every call. MultiLabelHead.one_label refuses."""
        return self

    def read_labels(self, images: Sequence[Any], labels: Any, integers: bool) -> np.ndarray:
        """Each image's class by its position, (N,) int64 (labels.class_ids); integer labels are uids if `integers`."""
        return class_ids(images, labels, self.class_names, self.uids if integers else None)

    def decision(self, logits: np.ndarray) -> np.ndarray:
        """`decision_function` of logits (B, C): of two classes (B,), the second one's logit minus the first one's."""
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """softmax of the logits, (B, C)."""
        return softmax(logits)

    def answers(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The label (B,) of each query's largest logit, of equal ones the first; `labels` (C,) are the classes'."""
        return labels[logits.argmax(1)]

    def quality(self, truth: np.ndarray, logits: np.ndarray) -> float:
        """The share of queries whose largest logit is that of their class, `truth` (B,)."""
        if not len(truth):
            raise IosrFastError("expected at least one image to score, got none")
        return float((logits.argmax(1) == truth).mean())

    def classes_shown(self, top: int) -> int:
        """How many classes a table shows of each image, where `top` are asked for."""
        return min(top, len(self.uids))
