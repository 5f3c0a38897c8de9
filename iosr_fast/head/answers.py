"""What a fitted classifier answers to queries, in the labels of its caller: of Classifier and FewShotHead alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.head.abstention import NONE_WITHHELD, Abstention
from iosr_fast.head.predictions import AnyHead, Prediction, predict, predict_jointly
from iosr_fast.methods.automation import Automation, automation
from iosr_fast.methods.conformal import Reliability, check_share, sets_of_labels
from iosr_fast.methods.joint import JointPrediction
from iosr_fast.methods.support_audit import SupportAudit
from iosr_fast.methods.unknown import Unknown, without_rejected


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers of `head`, with `labels` (C,) for its classes: names, integers, or what scikit-learn was given.

    Queries are blocks of embeddings (B, D), of unit length unless `check` is False. They may be encoded as they are
    taken: what the head has no answer to (MultiLabelHead), or too few support images for, is refused before the first.
    Of `fill` rows and fewer, a block is scored as one of `fill` rows: a row's logits then have the same bits in any.
    Methods have the arguments, results and errors of Classifier's methods of the same names.
    """

    head: AnyHead
    labels: np.ndarray
    check: bool = True
    fill: int = 0

    def _score(self, block: Embeddings) -> np.ndarray:
        rows = len(block)
        filled = block[np.minimum(np.arange(self.fill), rows - 1)] if 0 < rows < self.fill else block
        return self.head.score(filled, self.check)[:rows]

    def logits(self, queries: Iterable[Embeddings]) -> np.ndarray:
        """(B, C) float32."""
        return np.concatenate([np.zeros((0, len(self.labels)), np.float32), *map(self._score, queries)])

    def predict(self, queries: Iterable[Embeddings], abstention: Abstention) -> np.ndarray:
        if abstention == NONE_WITHHELD:
            return self.head.answers(self.logits(queries), self.labels)
        head = self.head.require_single_label("predict with unknown or max_error", "each class is judged by itself")
        abstention.check(head, self.labels.tolist())
        keep, max_error = abstention.keep, abstention.max_error
        answers = [self.labels[:0]]
        for block in queries:
            logits = self._score(block)
            labels = self.labels[logits.argmax(1)]
            if max_error is not None:
                labels = without_rejected(labels, ~head.accepts(logits, max_error), None)
            if keep is not None:
                labels = without_rejected(labels, head.unknown.rejects(block.to_numpy(), keep), abstention.label)
            answers.append(labels)
        return np.concatenate(answers)

    def explain(
        self, queries: Iterable[Embeddings], top: int, nearest: int, abstention: Abstention
    ) -> list[Prediction]:
        head = self.head.require_single_label("explain", "predict_proba gives the probability of each class")
        abstention.check(head)
        return [one for block in queries for one in predict(head, block, top, nearest, abstention)]

    def unknown(self, call: str) -> Unknown:
        """Head.unknown, for a `call`."""
        return self.head.require_single_label(call).unknown

    def unknown_score(self, queries: Iterable[Embeddings]) -> np.ndarray:
        unknown = self.unknown("unknown_score")
        return np.concatenate([np.zeros(0), *(unknown.score(block.to_numpy()) for block in queries)])

    def predict_sets(self, queries: Iterable[Embeddings], coverage: float, per_class: bool) -> list[np.ndarray]:
        head, share = self.head.require_single_label("predict_sets"), check_share("coverage", coverage)
        left_out, classes = head.left_out_labels, self.labels if per_class else None
        left_out.thresholds(share, classes)
        logits = self.logits(queries)
        return sets_of_labels(self.labels, logits, left_out.sets(logits, share, classes))

    def predict_jointly(self, queries: Iterable[Embeddings]) -> JointPrediction:
        head = self.head.require_single_label("predict_jointly")
        rows = [block.to_numpy() for block in queries] or [head.examples.embeddings[:0]]
        return predict_jointly(head, Embeddings.concatenate(rows), self.labels, self.check)

    def automation(self) -> Automation:
        head = self.head.require_single_label("automation")
        return automation(head.left_out_labels, notes=head.doubts)

    def calibration(self) -> Reliability:
        return self.head.require_single_label("calibration").left_out_labels.reliability

    def audit(self, name: Callable[[int], Any]) -> SupportAudit:
        """`name` is how the support image of a number is called."""
        head = self.head.require_single_label("audit")
        return head.audit(np.array([name(number) for number in head.examples.ids.tolist()]), self.labels)
