"""The errors that iosr_fast raises on purpose, one hierarchy below `IosrFastError`.

Every one of them is a ValueError, so `except ValueError` catches them too; some are a second built-in error as well
(ImportError, RuntimeError, TimeoutError, AttributeError). Python's own errors stay as they are: FileNotFoundError,
FileExistsError and PermissionError for files, TypeError for an argument of a wrong type, MemoryError. A RuntimeError
that is no IosrFastError is a fault of this package, or of a runtime or driver while it works.

A message says what was expected, what came and how to fix it. Wrong arguments are named before any work starts.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path

# Format characters (category Cf) that names need: joiners of emoji and scripts, and the tags of flags.
JOINERS = {"\u200c", "\u200d", *map(chr, range(0xE0020, 0xE0080))}


def printable(text: str, keep: str = "") -> str:
    """`text` with escapes for what steers a terminal or hides in a line: control characters but those in `keep`, marks
    of direction, invisible characters, line separators, and bytes of a file name that are not UTF-8.

    >>> print(printable("caf\\u00e9 \\x1b[31m \\u202e"))
    café \\x1b[31m \\u202e
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char in keep or _is_shown(char) else ascii(char)[1:-1] for char in text)


def _is_shown(char: str) -> bool:
    return char.isprintable() or char in JOINERS or unicodedata.category(char) == "Zs"


class LookAlikesWarning(UserWarning):
    """Support images look alike, as in bursts: left-out ones say too much of new ones, and promises may break."""


class IosrFastError(ValueError):
    """An input that cannot be handled: base of all errors of this package, and a ValueError.

    >>> from iosr_fast import IosrFastError, ScoringPlan
    >>> try:
    ...     ScoringPlan(n_classes=2)
    ... except IosrFastError as error:
    ...     print(error)
    expected at least one term: give text, keys (with class_offsets) or linear; got none
    """

    def __init__(self, *args: object) -> None:
        """A message may have names of files and classes, so it is made `printable`."""
        super().__init__(*(printable(part, keep="\n") if isinstance(part, str) else part for part in args))


class BadImageError(IosrFastError):
    """An image that is missing or cannot be decoded. `fit` and `predict_folder` can skip such images (`skip_bad`).

    path      the file; None for an image that did not come from a file
    position  its place among the images of the call, from 0
    reason    what is wrong with it
    where     the path, or "number 3" without one
    """

    def __init__(self, path: Path | None, position: int, reason: str) -> None:
        self.path, self.position, self.reason = path, position, reason
        self.where = f"number {position}" if path is None else str(path)
        super().__init__(f"can't read image {self.where}: {reason}")

    def __reduce__(self) -> tuple[type[BadImageError], tuple[Path | None, int, str]]:
        """Pickle with all fields; by default only the message is kept."""
        return BadImageError, (self.path, self.position, self.reason)

    def moved(self, offset: int) -> BadImageError:
        """The same error with `offset` added to the position."""
        return BadImageError(self.path, self.position + offset, self.reason)


class DamagedFileError(IosrFastError):
    """A saved classifier, engine, adapter, result file or log that is incomplete, was changed, or has another format.

    Nothing of it is used. Restore the file from a copy, or make it again with the command that the message names.
    """


class NotFittedError(IosrFastError, AttributeError):
    """`predict` or another method was called before `fit`. It is an AttributeError too, as scikit-learn's is."""


class MissingPackageError(IosrFastError, ImportError):
    """An optional package is not installed. The message names the pip command that installs it. An ImportError too."""


class UnavailableError(IosrFastError, RuntimeError):
    """A runtime, kernel or decoder that was named cannot run on this machine; "auto" never chooses such a one.

    The message gives the reason: no GPU, a missing driver, an extension that was not built, a file that the installed
    version cannot load. A RuntimeError too.
    """


class QueueFullError(IosrFastError, RuntimeError):
    """The batching queue refused an image: it is full, or the deadline cannot be met. A RuntimeError too.

    `retry_after_s` (seconds) is when to try again. The HTTP server answers 503 with this time in Retry-After.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[QueueFullError], tuple[str, float]]:
        return QueueFullError, (str(self), self.retry_after_s)


class DeadlineExceededError(IosrFastError, TimeoutError):
    """The batching queue accepted an image and could not encode it before its deadline. A TimeoutError too."""


class ClosedError(IosrFastError, RuntimeError):
    """The batching queue is closed, or was closed before the image had its turn. A RuntimeError too."""
