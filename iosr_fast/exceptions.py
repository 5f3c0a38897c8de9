"""The errors that iosr_fast raises on purpose, one hierarchy below `IosrFastError`.

Missing and existing files, and files that the system refuses, raise Python's own OSErrors. A message says what was
expected, what came and how to fix it.
"""

from __future__ import annotations

from pathlib import Path


class IosrFastError(ValueError):
    """An input that cannot be handled: base of all errors of this package, and a ValueError.

    >>> from iosr_fast import Classifier, IosrFastError
    >>> try:
    ...     Classifier.load(".")
    ... except (IosrFastError, OSError) as error:
    ...     print(type(error).__name__)
    FileNotFoundError
    """


class BadImageError(IosrFastError):
    """An image that is missing or can't be decoded; `where` is its path, or its position without one."""

    def __init__(self, path: Path | None, position: int, reason: str) -> None:
        self.path, self.position, self.reason = path, position, reason
        self.where = f"number {position}" if path is None else str(path)
        super().__init__(f"can't read image {self.where}: {reason}")

    def __reduce__(self) -> tuple[type[BadImageError], tuple[Path | None, int, str]]:
        """Keep all fields when sent between processes: by default only the message is."""
        return BadImageError, (self.path, self.position, self.reason)

    def moved(self, offset: int) -> BadImageError:
        """The same error with `offset` added to the position."""
        return BadImageError(self.path, self.position + offset, self.reason)


class DamagedFileError(IosrFastError):
    """A saved folder or log that is incomplete, changed or of an unknown format."""


class NotFittedError(IosrFastError, AttributeError):
    """A classifier is asked before it is fitted."""


class MissingPackageError(IosrFastError, ImportError):
    """An optional package is not installed; the message names the pip command that installs it."""


class UnavailableError(IosrFastError, RuntimeError):
    """A runtime, kernel or decoder that was asked for cannot run on this machine; the message gives the reason."""


class QueueFullError(IosrFastError, RuntimeError):
    """Refused at submit: the queue is full, or the deadline can't be met. `retry_after_s`: when to try again."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[QueueFullError], tuple[str, float]]:
        return QueueFullError, (str(self), self.retry_after_s)


class DeadlineExceededError(IosrFastError, TimeoutError):
    """Accepted, but not encoded before its deadline."""


class ClosedError(IosrFastError, RuntimeError):
    """Refused at submit, or abandoned by a close() whose timeout ran out."""
