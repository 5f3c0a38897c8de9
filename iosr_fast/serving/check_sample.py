"""A random sample of accepted answers, for somebody to check, and what the checks say of the promise."""

from __future__ import annotations

import logging
import time

import numpy as np

from iosr_fast.head.head import Head
from iosr_fast.head.labels import SEPARATOR
from iosr_fast.head.predictions import Prediction
from iosr_fast.head.verdict import nodes_above
from iosr_fast.methods.checks import checked
from iosr_fast.serving.fairness import Shares
from iosr_fast.serving.kept_folder import CHECKS, KeptFolder, picture_name, time_text
from iosr_fast.serving.limits import Deadlines

_RULE = "rule 2"  # by which thresholds are computed: rises where those of the same classifier change
log = logging.getLogger(__name__)


class CheckSample:
    """Keeps a share of accepted pictures, which no client can choose, and counts the labels that they get.

    The table CHECKS lists them: the row of a picture that is drawn has no `checked` label yet, and a later one has the
    label that counts. Labels come from the folder's LABELS. A picture counts once, by its first label that two readings
    agree on, so that none is read while it is written. It is `checked` as the answer where that is a node above it, by
    the tree of that time; every other text is another label. Answers count that were promised as now, by `max_error`,
    the `digest` of the classifier's folder and _RULE; others that nobody checked are no longer of the sample. Where
    pictures may have `several` labels, the accepted ones are `answered`, joined by SEPARATOR, and one of them is wrong
    unless it is `checked`, too. At most `limit` pictures wait for a label, of a client its share (Shares); meanwhile
    none is drawn.

    For one thread; `result` and `beside` may be read in any. `beside` counts labels of pictures that were not drawn: as
    somebody chose them, they say nothing of the promise. Raises OSError where the folder can't be read or written,
    IosrFastError for LABELS that are no CSV.
    """

    def __init__(
        self, folder: KeptFolder, share: float, limit: int, max_error: float, digest: str, several: bool = False
    ) -> None:
        self._folder, self._share, self._limit, self._max_error = folder, share, limit, max_error
        self._several = several
        self._promise = {"max_error": str(max_error), "classifier": f"{digest} {_RULE}"}
        self._labels: dict[str, str] = {}  # of the last reading
        self._next_reading, self.beside = 0.0, 0
        rows, drawn = folder.rows(CHECKS), self._drawn()
        folder.change(CHECKS, gone=[path for path, row in rows.items() if path not in drawn and not row["checked"]])
        if rows and not drawn:
            log.warning(
                "checks of accepted labels start anew: another --max-error or classifier is served, or this version "
                "computes promises otherwise"
            )
        self.result = checked([], max_error)
        self._judge()

    def offer(self, image: bytes, prediction: Prediction, client: str) -> bool:
        """Keep a picture of which a label was accepted, if it is drawn, for the first time; `client` has its key."""
        name = picture_name(image)
        if int(self._folder.keyed(name)[:16], 16) >= self._share * 2.0**64:
            return False
        drawn, files, waiting = self._drawn(), self._folder.pictures(), Shares(self._limit)
        for path, row in drawn.items():
            if not row["checked"] and path in files:
                waiting.add(row["client"], 1)
        fits = waiting.fits(client, 1) if client else waiting.used < self._limit
        if name in drawn or not fits:
            return False
        self._folder.write(name, image)
        answered = SEPARATOR.join(prediction.accepted_labels)
        answer = {"answered": answered, "version": str(prediction.version), "time": time_text()}
        self._folder.change(CHECKS, [{"path": name, "client": client, **self._promise, **answer}])
        return True

    def read_labels(self, head: Head) -> None:
        """Count new labels, by the tree of `head`, unless the last reading was just now."""
        if time.monotonic() < self._next_reading:
            return
        self._next_reading = time.monotonic() + Deadlines.read_labels_s
        drawn, labels = self._drawn(), self._folder.labels(self._several)
        self.beside = len(labels.keys() - drawn.keys())
        agreed = dict(labels.items() & self._labels.items())
        self._labels = labels
        new = [row for name, row in drawn.items() if name in agreed and not row["checked"]]
        if new:
            above = nodes_above(head, np.array(head.class_names))
            for row in new:
                label, answered = agreed[row["path"]], row["answered"]
                label = answered if answered in above.get(label, ()) else label
                row.update(checked=label, time=time_text())
            self._folder.change(CHECKS, new)
            self._judge()

    def _drawn(self) -> dict[str, dict[str, str]]:
        """The rows of this promise."""
        return {path: row for path, row in self._folder.rows(CHECKS).items() if self._promise.items() <= row.items()}

    def _judge(self) -> None:
        pairs = [(row["answered"], row["checked"]) for row in self._drawn().values() if row["checked"]]
        wrong = [[answered != checked] for answered, checked in pairs]
        if self._several:
            wrong = [[one not in _parts(checked) for one in _parts(answered)] for answered, checked in pairs]
        before, self.result = self.result, checked(wrong, self._max_error)
        if self.result.refuted and not before.refuted:
            log.warning("%s", self.result)


def _parts(labels: str) -> list[str]:
    return [label.strip() for label in labels.split(SEPARATOR)]
