"""When a picture gets no label, and what is said in its place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.names import check_unknown_label
from iosr_fast.methods.automation import check_promise
from iosr_fast.methods.conformal import check_share
from iosr_fast.methods.unknown import KEEP

if TYPE_CHECKING:
    from iosr_fast.head.head import Head

UNKNOWN_LABEL = "unknown"  # in tables


@dataclass(frozen=True)
class Abstention:
    """Which labels are withheld.

    keep       pictures that belong to none of the classes are rejected, and a share `keep` of the others is not
               (methods.unknown); None rejects none
    label      what rejected pictures get instead
    max_error  a label is accepted if of all accepted ones at most this share is wrong (methods.automation); None
               accepts all
    """

    keep: float | None = None
    label: Any = None
    max_error: float | None = None

    @classmethod
    def of(cls, unknown: str | None, label: Any, keep: float, max_error: float | None = None) -> Self:
        """The arguments of `predict`, checked. IosrFastError for wrong ones."""
        if unknown not in (None, "reject"):
            raise IosrFastError(f"expected unknown to be 'reject' or None, got {unknown!r}")
        keep = check_share("keep", keep)
        if max_error is not None:
            max_error = check_share("max_error", max_error, like=0.01)
        if unknown is not None:
            return cls(keep, label, max_error)
        if label is not None:
            raise IosrFastError(f"expected unknown_label only with unknown='reject', got {label!r} without it")
        if keep != KEEP:
            raise IosrFastError(f"expected keep only with unknown='reject', got {keep} without it")
        return cls(max_error=max_error)

    def check(self, head: Head, labels: Iterable[Any] | None = None, joint: bool = False) -> None:
        """Raise IosrFastError, before any image is read, where a node has the label of rejected pictures (one of
        `labels`, or the names), where there are too few support images for a promise (Unknown.threshold,
        automation.check_promise), and for a promise about errors of pictures that are classified together (`joint`).
        What the promises rest on is computed now."""
        if joint and self.max_error is not None:
            raise IosrFastError(
                "expected no max_error (--max-error) with joint (--joint): the promise rests on support images that "
                "are classified alone; leave one of both out"
            )
        if self.keep is not None:
            check_unknown_label(self.label, head.node_names if labels is None else labels)
            head.unknown.threshold(self.keep)
        if self.max_error is not None:
            check_promise(head.judged, self.max_error)


NONE_WITHHELD = Abstention()


def check_abstention(unknown: str | None, label: str, keep: float, max_error: float | None = None) -> Abstention:
    """As Abstention.of, for tables: the label is a text, and UNKNOWN_LABEL by default."""
    if not isinstance(label, str):
        raise IosrFastError(f"expected unknown_label to be a text, like {UNKNOWN_LABEL!r}, got {label!r}")
    check_unknown_label(label, ())
    return Abstention.of(unknown, None if unknown is None and label == UNKNOWN_LABEL else label, keep, max_error)
