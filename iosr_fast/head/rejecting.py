"""Pictures of none of the classes: whether they are rejected, and what is said in the place of a label."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.names import check_unknown_label
from iosr_fast.methods.conformal import check_share
from iosr_fast.methods.unknown import KEEP

if TYPE_CHECKING:
    from iosr_fast.head.head import Head

UNKNOWN_LABEL = "unknown"  # in tables


@dataclass(frozen=True)
class Rejecting:
    """Pictures that belong to none of the classes get `label`; a share `keep` of known pictures does not."""

    label: Any
    keep: float

    @classmethod
    def of(cls, unknown: str | None, label: Any, keep: float) -> Self | None:
        """The arguments of `predict`, checked; None if no picture is to be rejected. IosrFastError for wrong ones."""
        if unknown not in (None, "reject"):
            raise IosrFastError(f"expected unknown to be 'reject' or None, got {unknown!r}")
        keep = check_share("keep", keep)
        if unknown is not None:
            return cls(label, keep)
        if label is not None:
            raise IosrFastError(f"expected unknown_label only with unknown='reject', got {label!r} without it")
        if keep != KEEP:
            raise IosrFastError(f"expected keep only with unknown='reject', got {keep} without it")
        return None

    def check(self, head: Head, labels: Iterable[Any] | None = None) -> None:
        """Raise IosrFastError, before any image is read, where a class has that label (one of `labels`, or the names),
        or where there are too few support images for the promise (Unknown.threshold)."""
        check_unknown_label(self.label, head.class_names if labels is None else labels)
        head.unknown.threshold(self.keep)


def check_rejecting(unknown: str | None, label: str, keep: float) -> Rejecting | None:
    """As Rejecting.of, for tables: the label is a text, and UNKNOWN_LABEL by default."""
    if not isinstance(label, str):
        raise IosrFastError(f"expected unknown_label to be a text, like {UNKNOWN_LABEL!r}, got {label!r}")
    check_unknown_label(label, ())
    return Rejecting.of(unknown, None if unknown is None and label == UNKNOWN_LABEL else label, keep)
