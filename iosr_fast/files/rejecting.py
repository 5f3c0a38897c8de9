"""What a run over many images does with pictures of none of the classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.names import check_unknown_label
from iosr_fast.methods.unknown import check_unknown

if TYPE_CHECKING:
    from iosr_fast.head.head import Head

UNKNOWN_LABEL = "unknown"


@dataclass(frozen=True)
class Rejecting:
    """Pictures that belong to none of the classes get `label`; a share `keep` of known pictures does not."""

    label: str
    keep: float

    def check(self, head: Head) -> None:
        """Raise IosrFastError, before any image is read, where a class has that label, or where there are too few
        support images for the promise (Unknown.threshold)."""
        check_unknown_label(self.label, head.class_names)
        head.unknown.threshold(self.keep)


def check_rejecting(unknown: str | None, label: str, keep: float) -> Rejecting | None:
    """The arguments of predict_folder, checked; None if no picture is to be rejected. IosrFastError for wrong ones."""
    share = check_unknown(unknown, keep)
    if not isinstance(label, str):
        raise IosrFastError(f"expected unknown_label to be a text, like {UNKNOWN_LABEL!r}, got {label!r}")
    check_unknown_label(label, ())
    return None if share is None else Rejecting(label, share)
