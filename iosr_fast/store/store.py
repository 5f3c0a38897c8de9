"""Store: the newest head of a classifier, and how it is replaced; readers keep the one that they hold."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.fit import Fit
from iosr_fast.head.ids import class_id, example_id
from iosr_fast.store.audit import open_log
from iosr_fast.store.changes import Change, ChangeResult
from iosr_fast.store.log_writer import AuditLog
from iosr_fast.utils.estimator import not_fitted

T = TypeVar("T")
_REFIT = "fit again with all pictures and their labels"


class Store:
    """The fit of a classifier, its changes, and their log.

    `fit` is immutable and replaced in one step: whoever reads it once has a head and the encoder that belongs to it.
    Readers take no lock. Writers wait for one another (`changing`); with a log, a change is on the disk before any
    reader sees it.
    """

    def __init__(self) -> None:
        self.fit: Fit | None = None
        self.log: AuditLog | None = None
        self.lock = threading.Lock()

    def fitted(self) -> Fit:
        """The fit. Raises NotFittedError before there is one."""
        if self.fit is None:
            raise not_fitted("this Classifier is not fitted yet: call fit or fit_folder first")
        return self.fit

    def changeable(self, call: str) -> Fit:
        """The fit. Raises IosrFastError where its head takes no changes."""
        fit = self.fitted()
        fit.head.one_label(call, _REFIT)
        return fit

    @contextmanager
    def changing(self, fit: Fit) -> Iterator[Fit]:
        """Holds the lock of writers; gives the current version of `fit`, with which something was encoded before.

        Raises IosrFastError where another fit has taken its place.
        """
        with self.lock:
            current = self.fitted()
            if (current.clip, current.views) != (fit.clip, fit.views):
                raise IosrFastError(
                    "the classifier was fitted again while images or texts were encoded: repeat the change"
                )
            yield current

    def make(self, change: Change) -> ChangeResult:
        """Under the lock: apply a change, compile the plan of the new head, log the change, and publish the head.

        Raises LogWriteError where it can't be logged; then, as with any interrupt, the change was not made.
        """
        fit, log = self.fitted(), self.log
        head = before = fit.head.one_label(change.op, _REFIT)
        if log is not None:
            log.compact(before)
        head = change.apply(before).compiled()
        if log is None:
            self.fit = replace(fit, head=head)
        else:
            try:
                log.append(change, before, head)
                self.fit = replace(fit, head=head)
            except BaseException:
                log.try_to_settle(self.fitted().head)
                raise
        ids = tuple(example_id(number) for number in change.example_numbers)
        return ChangeResult(head.version, class_id(change.uid) if change.uid >= 0 else "", ids)

    def replace(self, fit: Fit, instead_of: Fit | None = None) -> None:
        """Take over the result of a fit, or of a choice of the engine for the fit `instead_of`.

        Raises IosrFastError where a log is open, and where the fit is not `instead_of` any more.
        """
        with self.lock:
            self.check_no_log()
            if instead_of is not None and self.fit is not instead_of:
                raise IosrFastError("the classifier has changed while engines were tried: optimize again")
            self.fit = fit

    def check_no_log(self) -> None:
        """Raise IosrFastError where a log is open."""
        if self.log is not None:
            raise IosrFastError(
                f"expected no audit log to be open, got {self.log.path}: it has no line for a fit or another engine"
            )

    def open_log(self, path: str | Path, recover: bool) -> None:
        """Log every change from now on, after making those that the log has already (audit.open_log).

        Raises IosrFastError where one is open, and what audit.open_log raises.
        """
        self.changeable("open_log")
        with self.lock:
            if self.log is not None:
                raise IosrFastError(f"expected no log to be open, got {self.log.path}; close_log closes it")
            fit = self.fitted()
            log, head = open_log(path, fit.head.one_label("open_log", _REFIT), recover)
            self.log, self.fit = log, replace(fit, head=head)

    def close_log(self) -> None:
        """Close the log; later changes are not written."""
        with self.lock:
            if self.log is not None:
                log, self.log = self.log, None
                log.close(self.fitted().head)


class FittedAttribute(Generic[T]):
    """An attribute of Classifier that is read from its fit. Raises NotFittedError before there is one."""

    def __init__(self, read: Callable[[Fit], T]) -> None:
        self._read = read

    def __get__(self, classifier: Any, owner: type | None = None) -> T:
        return self._read(classifier._store.fitted())
