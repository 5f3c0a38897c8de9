"""What every head holds: classes, support images and parameters; how they are found, and how queries are scored."""

from __future__ import annotations

import copy
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np

from iosr_fast.encoders.encoder import Embeddings, as_numpy
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.examples import Examples
from iosr_fast.head.ids import class_id, example_number, uid_of
from iosr_fast.head.method_config import MethodConfig
from iosr_fast.methods.multi_label_set import MultiLabelSet
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.score import score
from iosr_fast.utils.text import abbreviate


@dataclass(frozen=True)
class ClassInfo:
    """A class: `class_id` stays through renames, `examples` counts its support images."""

    class_id: str
    name: str
    examples: int


@dataclass(frozen=True, eq=False)
class HeadData:
    """A fitted classifier on embeddings at one version: data that never changes, and what is computed from it once.

    class_names, uids  of the C classes, in order; uids rise and are never reused
    text               (C, D) float32, unit rows; None without class names
    tau                the CLIP's logit scale
    examples           the support images (N), sorted by class
    config             the method and its parameters
    version            rises by one with every change
    next_class, next_example  the numbers of the next class and the next support image
    """

    class_names: tuple[str, ...]
    uids: tuple[int, ...]
    text: np.ndarray | None
    tau: float
    examples: Examples
    config: MethodConfig
    version: int
    next_class: int
    next_example: int

    @classmethod
    def first(
        cls,
        class_names: Sequence[str],
        text: np.ndarray | None,
        tau: float,
        examples: Examples,
        config: MethodConfig,
        **fields: Any,
    ) -> Self:
        """The head of a fit: version 1, and classes numbered from 0. `fields` are those of the class itself."""
        n, following = len(class_names), int(examples.ids.max(initial=-1)) + 1
        return cls(tuple(class_names), tuple(range(n)), text, tau, examples, config, 1, n, following, **fields)

    @cached_property
    def plan(self) -> ScoringPlan:
        """What scores queries."""
        raise NotImplementedError

    @cached_property
    def support(self) -> SupportSet | MultiLabelSet:
        """The support images as methods take them."""
        raise NotImplementedError

    @cached_property
    def counts(self) -> np.ndarray:
        """(C,) int64, the support images of each class."""
        return self.support.counts

    def examples_of(self, uid: int) -> list[int]:
        """The numbers of a class's support images, rising."""
        return np.sort(self.examples.ids[self.examples.class_ids == uid]).tolist()

    @property
    def needs_adapted(self) -> bool:
        """Whether the method compares the adapted embeddings of queries."""
        return self.config.which == "adapted"

    def computed(self, name: str) -> Any:
        """The cached property `name` if it is known already; None if it would have to be computed."""
        return vars(self).get(name)

    def with_computed(self, **values: Any) -> Self:
        """The same head, for which these cached properties are known: a stored plan, say. None leaves one out."""
        head = copy.copy(self)
        vars(head).update({name: value for name, value in values.items() if value is not None})
        return head

    def compiled(self) -> Self:
        """The same head, after computing its plan, so that no reader waits for it."""
        self.plan  # noqa: B018
        return self

    def score(self, embeddings: Embeddings, check: bool = True) -> np.ndarray:
        """Logits (B, C) float32; embeddings on a GPU are scored there. `check` is that of scoring.score."""
        return as_numpy(score(self.plan, embeddings, check=check))

    def classes(self, after: int = -1, limit: int | None = None) -> list[ClassInfo]:
        """Classes in their order: all, or at most `limit` of those whose uid is above `after`."""
        start = bisect_right(self.uids, after)
        chosen = slice(start, None if limit is None else start + limit)
        rows = zip(self.uids[chosen], self.class_names[chosen], self.counts[chosen].tolist(), strict=True)
        return [ClassInfo(class_id(uid), name, count) for uid, name, count in rows]

    def name_of(self, class_id: str) -> str | None:
        """The name of a class by its id; None for an unknown class."""
        uid = uid_of(class_id)
        if uid is None:
            return None
        at = bisect_left(self.uids, uid)
        return self.class_names[at] if self.uids[at : at + 1] == (uid,) else None

    def find_class(self, name_or_id: str) -> int:
        """The uid of a class by id ("~7") or name. Raises ValueError for an unknown class."""
        if not isinstance(name_or_id, str):
            raise IosrFastError(f"expected the name or the id (like '~3') of a class, got {name_or_id!r}")
        uid = uid_of(name_or_id)
        if uid is not None and self.name_of(name_or_id) is not None:
            return uid
        if name_or_id in self.class_names:
            return self.uids[self.class_names.index(name_or_id)]
        raise IosrFastError(f"no class {name_or_id!r}; there are {abbreviate(self.class_names)}")

    def find_examples(self, example_ids: Sequence[str]) -> list[int]:
        """Example numbers of ids ("e7"). Raises ValueError for an unknown or repeated id."""
        numbers = [-1 if (number := example_number(text)) is None else number for text in example_ids]
        present = set(self.examples.ids[np.isin(self.examples.ids, numbers)].tolist())
        wrong = [text for text, number in zip(example_ids, numbers, strict=True) if number not in present]
        if wrong or not numbers or len(set(numbers)) < len(numbers):
            raise IosrFastError(
                f"expected ids of examples that are there, each once, got {abbreviate(wrong or example_ids)}"
            )
        return numbers

    def picture(self, example_id: str) -> bytes | None:
        """The thumbnail of a support image, WebP; None where none was stored. Raises ValueError for an unknown id."""
        (number,) = self.find_examples([example_id])
        return self.examples.pictures[int(np.flatnonzero(self.examples.ids == number)[0])]
