"""What a classifier says of one image: the label, how sure, how much of it texts say and how much the examples."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

# One form for each number: "~07" and other scripts' digits, which int() takes, are no ids.
CLASS_ID, EXAMPLE_ID = "~(?:0|[1-9][0-9]{0,17})", "e(?:0|[1-9][0-9]{0,17})"


def class_id(uid: int) -> str:
    """The id of a class by its number: "~7". The sign keeps ids apart from names, which may be "7" or "c7"."""
    return f"~{uid}"


def uid_of(given: str) -> int | None:
    """The number of a class id; None for what is none."""
    return int(given[1:]) if re.fullmatch(CLASS_ID, given) else None


def example_id(number: int) -> str:
    """The id of a support image by its number: "e7"."""
    return f"e{number}"


def example_number(given: str) -> int | None:
    """The number of a support image's id; None for what is none."""
    return int(given[1:]) if re.fullmatch(EXAMPLE_ID, given) else None


@dataclass(frozen=True)
class ClassInfo:
    """A class as it stands: `class_id` stays through renames, `examples` counts its support images."""

    class_id: str
    name: str
    examples: int


@dataclass(frozen=True)
class ChangeResult:
    """What an update did: the version it made, the class it was about ("" for none), the examples it added or took."""

    version: int
    class_id: str = ""
    example_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClassScore:
    """One class's share: logit = zero_shot + cache, what the texts say and what the support images add to it.

    `probability` is the softmax of all classes' logits, those not shown included.
    """

    label: str
    class_id: str
    probability: float
    logit: float
    zero_shot: float
    cache: float


@dataclass(frozen=True)
class Neighbour:
    """A support image near the query, as the method compares images: `similarity` is the cosine, in [-1, 1]."""

    example_id: str
    label: str
    class_id: str
    similarity: float


@dataclass(frozen=True)
class Prediction:
    """One image's label and why. All of it is of one `version` of the classifier, never of two."""

    label: str
    class_id: str
    probability: float
    logit: float
    zero_shot: float
    cache: float
    top: tuple[ClassScore, ...]  # best first; top[0] is the label's own
    nearest: tuple[Neighbour, ...]  # nearest support images, best first; empty unless asked for
    version: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        top, nearest = ([dict(vars(one)) for one in group] for group in (self.top, self.nearest))
        return {**vars(self), "top": top, "nearest": nearest}  # a tenth of what dataclasses.asdict takes
