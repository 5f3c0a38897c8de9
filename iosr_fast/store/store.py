"""Store: the newest head of a classifier, and how it is replaced; readers keep the one that they hold."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from iosr_fast.delivery.fitted import FittedClassifier
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.head import Head
from iosr_fast.store.change_log import ChangeLog
from iosr_fast.store.changes import Change, ChangeResult
from iosr_fast.utils.estimator import not_fitted


class Store:
    """The fit of a classifier, its changes, and their log.

    `fit` is immutable and replaced in one step: whoever reads it once has a head and the encoder that belongs to it.
    Readers take no lock. Writers wait for one another (`change`); with a log, a change is on the disk before any
    reader sees it. What readers need of a head is computed by the writer, before it is published (`_ready`).
    """

    def __init__(self) -> None:
        self.fit: FittedClassifier | None = None
        self.log: ChangeLog | None = None
        self.lock = threading.Lock()
        self._serves = False

    def fitted(self) -> FittedClassifier:
        """The fit. Raises NotFittedError before there is one."""
        fit = self.fit
        if fit is None:
            raise not_fitted("this Classifier is not fitted yet: call fit or fit_folder first")
        return fit

    def serve_promises(self) -> None:
        """As Classifier.serve_promises."""
        with self.lock:
            self._serves = True
            self._ready(self.fitted().head)

    def _ready(self, head: Head, before: Head | None = None) -> Head:
        """The head, with its plan, and where promises are served with what these rest on (Head.with_promises)."""
        return head.with_promises(before) if self._serves else head.compiled()

    def change(self, fit: FittedClassifier, make: Callable[[Head], Change]) -> ChangeResult:
        """Apply a change to the newest version of `fit`, with which something was encoded before: make the new head
        ready, log the change, and publish the head. `make` makes the change for that version.

        Raises IosrFastError where another fit has taken its place, LogWriteError where the change can't be logged;
        then, as with any other error, it was not made.
        """
        with self.lock:
            current = self.fitted()
            if current.token is not fit.token:
                raise IosrFastError(
                    "the classifier was fitted again while images or texts were encoded: repeat the change"
                )
            before = current.head
            if self.log is not None and (recovered := self.log.settle(before)) is not before:
                before = recovered
                self.fit = current = replace(current, head=before)  # at once: this change may be refused
            change = make(before)
            head = change.apply(before)
            self._ready(head, before)
            if self.log is not None:
                self.log.append(change, before, head)
            self.fit = replace(current, head=head)
            return ChangeResult(head.version, *change.result_ids(before))

    def replace(self, fit: FittedClassifier, instead_of: FittedClassifier | None = None) -> None:
        """Take over the result of a fit, or what was made of the fit `instead_of`.

        Raises IosrFastError where a log is open, and where the fit is not `instead_of` any more.
        """
        with self.lock:
            self.check_no_log()
            if instead_of is not None and self.fit is not instead_of:
                raise IosrFastError("the classifier has changed while images were encoded: repeat the call")
            self._ready(fit.head)
            self.fit = fit

    def check_no_log(self) -> None:
        """Raise IosrFastError where a log is open."""
        if self.log is not None:
            raise IosrFastError(
                f"expected no log to be open, got {self.log.path}: a log has no fit, engine or calibrate_on"
            )

    def open_log(self, path: str | Path) -> None:
        """Log every change from now on, after making those that the log has already (ChangeLog.open).

        Raises IosrFastError where one is open, and what ChangeLog.open raises.
        """
        with self.lock:
            fit = self.fitted()
            if self.log is not None:
                raise IosrFastError(f"expected no log to be open, got {self.log.path}; close_log closes it")
            log, head = ChangeLog.open(path, fit.head)
            self.log = log
            self.fit = replace(fit, head=self._ready(head, fit.head))

    def close_log(self) -> None:
        """Close the log; later changes are not written."""
        with self.lock:
            if self.log is not None:
                log = self.log
                self.log = None
                log.close()
