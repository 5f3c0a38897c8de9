"""What a fitted classifier is at one moment. Every change makes another one; nobody writes to one that is there.

A request holds on to a State and is answered by it whole, whatever happens meanwhile. A change of an additive method
(Method.additive) costs what is added: arrays of the others are shared, not copied. "gda" is made from moments, whose
size is that of the classes. Other methods are compiled again from the embeddings; nothing is ever encoded again.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods import METHODS, unavailable_reason
from iosr_fast.methods.support_set import SupportSet, image_rows
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.state.examples import Examples, absorb, join, no_examples, without
from iosr_fast.state.ids import class_id, example_number, uid_of
from iosr_fast.state.method_config import COMPENSATED_KEYS, MethodConfig
from iosr_fast.state.moments import Moments
from iosr_fast.state.segmented import SegmentedPlan, assemble, columns_of, score_plan, with_arrays
from iosr_fast.utils.text import abbreviate

# Runs of examples up to this many are copied into one: a bound on the work of a change, however large the cache.
SMALL = 1024


@dataclass(frozen=True)
class ClassInfo:
    """A class: `class_id` stays through renames, `examples` counts its support images."""

    class_id: str
    name: str
    examples: int


@dataclass(frozen=True, eq=False)
class State:
    """Classes, their support images, how they are scored, and the plan that does it.

    class_names, uids  of the C classes, in order; uids rise, and one that was given is never given again
    text               (C, D) float32, unit rows; tau the CLIP's logit scale
    segments           the support images, in runs; parts the cache terms of them, for an additive method
    plan               what scores a batch
    next_class, next_example  the numbers that the next ones get
    moments            what "gda" is made of; None until the first change
    deferred           whether `plan` is of an earlier state, because further changes follow at once (`deferring`)
    """

    version: int
    class_names: tuple[str, ...]
    uids: tuple[int, ...]
    text: np.ndarray
    tau: float
    segments: tuple[Examples, ...]
    config: MethodConfig
    parts: tuple[ScoringPlan, ...]
    plan: ScoringPlan | SegmentedPlan
    next_class: int
    next_example: int
    moments: Moments | None = None
    deferred: bool = False

    @classmethod
    def first(
        cls,
        class_names: Sequence[str],
        text: np.ndarray,
        tau: float,
        examples: Examples,
        config: MethodConfig,
        plan: ScoringPlan | None = None,
        uids: Sequence[int] | None = None,
        numbers: tuple[int, int] | None = None,
        version: int = 1,
    ) -> State:
        """The state of a fit, or with `plan`, `uids` and `numbers` of what was loaded: nothing is compiled then."""
        owned = tuple(range(len(class_names)) if uids is None else uids)
        next_class, next_example = numbers or (len(class_names), int(examples.ids.max(initial=-1)) + 1)
        segments = (examples,) if len(examples) else ()
        if plan is None:
            plan = config.compile(examples.as_support(owned, text, tau))
        parts: tuple[ScoringPlan, ...] = ()
        if config.additive and plan.keys is not None:
            counts = np.bincount(np.searchsorted(examples.classes, examples.class_ids))
            offsets = np.concatenate([[0], np.cumsum(counts)])
            parts = (with_arrays(plan, n_classes=len(counts), text=None, class_offsets=offsets),)
        return cls(
            version,
            tuple(class_names),
            owned,
            text,
            tau,
            segments,
            config,
            parts,
            plan,
            next_class,
            next_example,
        )

    @cached_property
    def support(self) -> SupportSet:
        """All active support images, sorted by class: made at first use and kept."""
        return self.examples.as_support(self.uids, self.text, self.tau)

    @cached_property
    def examples(self) -> Examples:
        """The active images as one run, in the order of `support`."""
        return join(self.segments) if self.segments else no_examples(self.text.shape[1])

    @cached_property
    def compared(self) -> tuple[np.ndarray, ...]:
        """Of each run, the rows (n, D) that the method compares with a query: they say what is near."""
        return tuple(self._rows(part) for part in self.segments)

    @cached_property
    def whole_plan(self) -> ScoringPlan:
        """One plan for all, its keys those of `support` in that order: what is saved and exported."""
        if isinstance(self.plan, ScoringPlan) and all(part.removed is None for part in self.segments):
            return self.plan
        return self.config.compile(self.support)

    def score(self, embeddings: Embeddings, impl: str = "auto") -> np.ndarray:
        """Logits (B, C) float32."""
        return score_plan(self.plan, embeddings, impl)

    @cached_property
    def counts(self) -> np.ndarray:
        """(C,) int64, the active support images of each class."""
        counts, uids = np.zeros(len(self.uids), np.int64), np.array(self.uids)
        for part in self.segments:
            class_ids, numbers = np.unique(part.class_ids[part.active], return_counts=True)
            counts[np.searchsorted(uids, class_ids)] += numbers
        return counts

    def classes(self, after: int = -1, limit: int | None = None) -> list[ClassInfo]:
        """Classes in their order: all, or at most `limit` of those whose uid is above `after`."""
        start = bisect_right(self.uids, after)
        chosen = slice(start, None if limit is None else start + limit)
        rows = zip(self.uids[chosen], self.class_names[chosen], self.counts[chosen].tolist(), strict=True)
        return [ClassInfo(class_id(uid), name, count) for uid, name, count in rows]

    def examples_of(self, uid: int) -> list[int]:
        """The numbers of a class's support images, rising."""
        found = [part.ids[(part.class_ids == uid) & part.active] for part in self.segments]
        return np.sort(np.concatenate(found)).tolist() if found else []

    def name_of(self, given: str) -> str | None:
        """The name of a class by its id; None where there is no such class."""
        uid = uid_of(given)
        if uid is None:
            return None
        at = bisect_left(self.uids, uid)
        return self.class_names[at] if self.uids[at : at + 1] == (uid,) else None

    def find_class(self, given: str) -> int:
        """The uid of a class by id ("~7") or name. Raises ValueError where there is none."""
        uid = uid_of(given)
        if uid is not None and self.name_of(given) is not None:
            return uid
        if given in self.class_names:
            return self.uids[self.class_names.index(given)]
        raise ValueError(f"no class {given!r}; there are {abbreviate(self.class_names)}")

    def find_examples(self, example_ids: Sequence[str]) -> list[int]:
        """Example numbers of ids ("e7"). Raises ValueError for one that is not there, or twice."""
        numbers = [-1 if (number := example_number(given)) is None else number for given in example_ids]
        here: set[int] = set()
        for part in self.segments:
            here.update(part.ids[np.isin(part.ids, numbers) & part.active].tolist())
        wrong = [given for given, number in zip(example_ids, numbers, strict=True) if number not in here]
        if wrong or not numbers or len(set(numbers)) < len(numbers):
            raise ValueError(
                f"expected ids of examples that are there, each once, got {abbreviate(wrong or example_ids)}"
            )
        return numbers

    # --- changes: each returns another state ---

    def adding(self, added: Examples) -> State:
        """With more support images, of classes that are there."""
        return self._changed(added, segments=(*self.segments, added), next_example=int(added.ids.max()) + 1)

    def adding_class(self, name: str, row: np.ndarray, added: Examples | None) -> State:
        """With a class more; `added`, its support images, are owned by self.next_class."""
        return self._changed(
            added,
            class_names=(*self.class_names, name),
            uids=(*self.uids, self.next_class),
            text=np.concatenate([self.text, row[None]]),
            segments=self.segments if added is None else (*self.segments, added),
            next_class=self.next_class + 1,
            next_example=self.next_example if added is None else int(added.ids.max()) + 1,
        )

    def removing(self, numbers: Iterable[int]) -> State:
        """Without some support images."""
        gone = np.array(sorted(numbers), np.int64)
        segments, taken = without(self.segments, lambda part: np.isin(part.ids, gone), SMALL)
        return self._changed(taken=taken, segments=segments)

    def removing_class(self, uid: int) -> State:
        """Without a class and its support images."""
        at = self.uids.index(uid)
        keep = np.arange(len(self.uids)) != at
        segments, taken = without(self.segments, lambda part: part.class_ids == uid, SMALL)
        return self._changed(
            taken=taken,
            class_names=tuple(name for i, name in enumerate(self.class_names) if i != at),
            uids=tuple(other for other in self.uids if other != uid),
            text=self.text[keep],
            segments=segments,
        )

    def renaming(self, uid: int, name: str, row: np.ndarray | None) -> State:
        """With another name, and another text embedding where one is given."""
        at = self.uids.index(uid)
        names = tuple(name if i == at else other for i, other in enumerate(self.class_names))
        if row is None:
            return replace(self, class_names=names, version=self.version + 1)
        text = self.text.copy()
        text[at] = row
        return self._changed(class_names=names, text=text)

    def with_config(self, config: MethodConfig) -> State:
        """The same classes and images under another method or other parameters; runs are joined into one."""
        numbers = (self.next_class, self.next_example)
        return State.first(
            self.class_names, self.text, self.tau, self.examples, config, None, self.uids, numbers, self.version + 1
        )

    def joined(self) -> State:
        """The same state in one run and one plan, as it is when it was saved and loaded, to the last bit."""
        numbers = (self.next_class, self.next_example)
        names, text, tau = self.class_names, self.text, self.tau
        return State.first(
            names, text, tau, self.examples, self.config, self.whole_plan, self.uids, numbers, self.version
        )

    def _changed(self, added: Examples | None = None, taken: Examples | None = None, **fields: object) -> State:
        """Another state with these fields, and a plan for it. `added` and `taken` are the images that it differs by."""
        made = replace(self, version=self.version + 1, **fields)  # type: ignore[arg-type]
        made = replace(made, segments=absorb(made.segments, SMALL))
        if not made.segments and METHODS[self.config.method].needs_support:
            raise ValueError(f"{self.config.method} needs support images: expected to keep at least one, got none left")
        if self.config.additive:
            return self._additive(made)
        if self.config.by_moments:
            made = replace(made, moments=self._moments_of(made, added, taken))
        elif not self.deferred and (reason := unavailable_reason(self.config.method, made.support)) is not None:
            raise ValueError(f"that change can't be made: {reason}")
        return made if self.deferred else made._compiled()

    def deferring(self) -> State:
        """The same state; changes of it make no plan where that costs more than the change. `settled` makes it."""
        return self if self.config.additive else replace(self, deferred=True)

    def settled(self) -> State:
        """With the plan that changes of a deferring state were not given: the one that each would have ended with."""
        return self._compiled() if self.deferred else self

    def _compiled(self) -> State:
        config = self.config
        if config.by_moments:
            moments = self.moments or self._all_moments()
            plan = moments.compile(self.text, self.tau, config.which, config.reducer, config.parameters["alpha"])
            plan = plan.scaled(config.factor)
        else:
            plan = config.compile(self.support)
        return replace(self, plan=plan, parts=(), deferred=False)

    def _additive(self, made: State) -> State:
        parts = self._parts_of(made.segments) if "alpha" in self.config.parameters else ()
        head = ScoringPlan(len(made.uids), text=made.text, tau=self.config.factor * self.tau)
        uids = np.array(made.uids)
        columns = [columns_of(segment.classes, uids) for segment in made.segments] if parts else []
        return replace(made, plan=assemble(head, parts, columns), parts=parts)

    def _moments_of(self, made: State, added: Examples | None, taken: Examples | None) -> Moments:
        moments = self.moments or self._all_moments()
        if taken is not None:
            moments = moments.add(self._rows(taken), np.searchsorted(self.uids, taken.class_ids), -1)
        if len(made.uids) < len(self.uids):
            moments = moments.select_classes(np.isin(self.uids, made.uids))
        elif len(made.uids) > len(self.uids):
            moments = moments.append_class()
        if added is not None:
            moments = moments.add(self._rows(added), np.searchsorted(made.uids, added.class_ids))
        empty = int((moments.counts == 0).sum())
        if empty:
            raise ValueError(
                f"that change can't be made: {self.config.method} needs an image of each class, {empty} have none"
            )
        return moments

    def _all_moments(self) -> Moments:
        none = Moments.none(len(self.uids), self.text.shape[1])
        return none.add(self._rows(self.examples), np.searchsorted(self.uids, self.examples.class_ids))

    def _rows(self, examples: Examples) -> np.ndarray:
        """The rows (n, D) that the method compares."""
        return image_rows(examples.embeddings, self.config.which, self.config.reducer)

    def _parts_of(self, segments: tuple[Examples, ...]) -> tuple[ScoringPlan, ...]:
        """A cache term for each run: the one that is there, or that one reweighted, or a new one."""
        known = {id(segment.ids): (segment, part) for segment, part in zip(self.segments, self.parts, strict=True)}
        made = []
        for segment in segments:
            old, part = known.get(id(segment.ids), (None, None))
            if part is None:
                made.append(self.config.cache_term(segment, compensate=len(segment) >= COMPENSATED_KEYS))
            elif old is not None and old.removed is segment.removed:
                made.append(part)
            else:
                made.append(with_arrays(part, weights=segment.active.astype(np.float32)))
        return tuple(made)
