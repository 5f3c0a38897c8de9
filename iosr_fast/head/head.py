"""A fitted classifier at one version. Immutable; changes return a new Head.

A request is answered by one Head, whatever changes meanwhile. For an additive method (Method.additive) the cost of a
change depends on what it adds, and on a weight for each image where classes differ in size: the other arrays are
shared, not copied. The plan of "gda" is computed from moments, whose size depends on the classes. Other methods are
compiled again from the embeddings; no image is encoded again.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from iosr_fast.encoders.encoder import Embeddings, as_numpy
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.evidence import Evidence
from iosr_fast.head.examples import Examples, absorb, join, no_examples, without
from iosr_fast.head.ids import class_id, example_number, uid_of
from iosr_fast.head.method_config import COMPENSATED_KEYS, MethodConfig
from iosr_fast.head.moments import Moments
from iosr_fast.head.multi_label import MultiLabels
from iosr_fast.head.segmented import SegmentedPlan, SegmentedScorer, assemble, columns_of, scorer_of, with_arrays
from iosr_fast.methods import METHODS, unavailable_reason
from iosr_fast.methods.conformal import LeftOutLabels
from iosr_fast.methods.stack import linear_discriminant
from iosr_fast.methods.support_set import SupportSet, class_weights, image_rows
from iosr_fast.methods.tuning.tuned import Tuned
from iosr_fast.methods.unknown import Unknown
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.scorer import Scorer
from iosr_fast.utils.text import abbreviate

# Segments of up to this many examples are joined: a bound on the work of a change, however large the cache is.
SMALL = 1024


@dataclass(frozen=True)
class ClassInfo:
    """A class: `class_id` stays through renames, `examples` counts its support images."""

    class_id: str
    name: str
    examples: int


@dataclass(frozen=True, eq=False)
class Head(Evidence):
    """Classes, their support images, how they are scored, and the plan that does it.

    class_names, uids  of the C classes, in order; uids rise and are never reused
    text               (C, D) float32, unit rows; tau is the CLIP's logit scale
    segments           the support images; `parts` are their cache terms, for an additive method
    plan               scores a batch
    next_class, next_example  the numbers of the next class and the next support image
    moments            for "gda"; None until the first change
    unknown_images     embeddings of pictures of none of the classes, by which these are recognised, or None
    multi_label        the labels and thresholds where pictures may have several labels each: `plan` then has logits of
                       each class by itself, nothing changes, and the class ids of segments say nothing. Otherwise None
    deferred           whether `plan` is that of an earlier head, because further changes follow (`deferring`)
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
    unknown_images: Embeddings | None = None
    multi_label: MultiLabels | None = None

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
        unknown_images: Embeddings | None = None,
        multi_label: MultiLabels | None = None,
    ) -> Head:
        """The head of a fit; with `plan`, `uids` and `numbers`, that of a bundle, for which nothing is compiled."""
        owned = tuple(range(len(class_names)) if uids is None else uids)
        next_class, next_example = numbers or (len(class_names), int(examples.ids.max(initial=-1)) + 1)
        segments = (examples,) if len(examples) else ()
        if plan is None:
            plan = config.compile(examples.as_support(owned, text, tau))
        parts: tuple[ScoringPlan, ...] = ()
        if config.additive and plan.keys is not None and plan.values is None:
            offsets = np.concatenate([[0], np.cumsum(examples.sizes)])
            parts = (with_arrays(plan, n_classes=len(examples.sizes), text=None, class_offsets=offsets),)
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
            unknown_images=unknown_images,
            multi_label=multi_label,
        )

    @property
    def tuned(self) -> Tuned | None:
        """The search that chose the config, `stale` if the head has changed since; None if there was none."""
        tuned = self.config.tuned
        return tuned if tuned is None or tuned.version == self.version else replace(tuned, stale=True)

    @property
    def left_out_accuracy(self) -> float:
        """The share of left-out support images that are right, as the fit reports it; where the parameters were given,
        or the head has changed since, with the present ones. NaN if none can be left out."""
        tuned = self.tuned
        if tuned is None or tuned.stale or tuned.interval is None:
            return self.left_out_labels.reliability.accuracy
        return tuned.accuracy

    def one_label(self, call: str, instead: str = "fit with one label for each picture") -> Head:
        """The head. Raises IosrFastError if pictures may have several labels each, for which `call` has no answer."""
        if self.multi_label is not None:
            raise IosrFastError(
                f"{call} is for one label a picture, and this classifier was fitted with several: {instead}"
            )
        return self

    @cached_property
    def support(self) -> SupportSet:  # type: ignore[override]  # a field of other fits
        """All active support images, sorted by class; computed at first use."""
        return self.examples.as_support(self.uids, self.text, self.tau)

    @cached_property
    def examples(self) -> Examples:
        """The active images as one segment, in the order of `support`."""
        return join(self.segments) if self.segments else no_examples(self.text.shape[1])

    @cached_property
    def compared(self) -> tuple[np.ndarray, ...]:
        """Of each segment, the rows (n, D) that the method compares with a query; neighbours are found by them."""
        return tuple(self._rows(segment) for segment in self.segments)

    @cached_property
    def adapted_bias(self) -> np.ndarray:
        """Of a plan whose linear term reads both embeddings (methods.stack), the bias (C,) of the adapted half."""
        assert isinstance(self.plan, ScoringPlan) and self.plan.linear is not None
        rows, parameters = image_rows(self.support.embeddings, "adapted", None), self.config.parameters
        _, bias = linear_discriminant(rows, self.support, parameters.get("text_images", 0.0))
        return self.config.factor * parameters["discriminant_adapted"] * bias

    @cached_property
    def whole_plan(self) -> ScoringPlan:
        """One plan with the keys of `support` in its order, to be saved and exported."""
        if isinstance(self.plan, ScoringPlan) and all(segment.removed is None for segment in self.segments):
            return self.plan
        return self.config.compile(self.support)

    def learnt(self, name: Literal["unknown", "left_out_labels"]) -> Any:
        """One of these two if it has been used; None if it would have to be fitted."""
        return vars(self).get(name)

    def knowing(self, unknown: Unknown | None, left_out_labels: LeftOutLabels | None) -> Head:
        """The same head with those of the two that are not None, as if they had been used."""
        head = replace(self)
        known = {"unknown": unknown, "left_out_labels": left_out_labels}
        vars(head).update({name: value for name, value in known.items() if value is not None})
        return head

    @cached_property
    def scorer(self) -> Scorer | SegmentedScorer:
        """The plan bound to the best implementation for its embeddings; computed at first use."""
        return scorer_of(self.plan)

    def score(self, embeddings: Embeddings, impl: str = "auto") -> np.ndarray:
        """Logits (B, C) float32; embeddings on a GPU are scored there."""
        scorer = self.scorer if impl == "auto" else scorer_of(self.plan, impl)
        return as_numpy(scorer(embeddings))

    @cached_property
    def counts(self) -> np.ndarray:
        """(C,) int64, the active support images of each class."""
        if self.multi_label is not None:
            return self.multi_label.labels.sum(0)
        counts, uids = np.zeros(len(self.uids), np.int64), np.array(self.uids)
        for segment in self.segments:
            columns = columns_of(segment.classes, uids)
            counts[columns[columns >= 0]] += segment.active_sizes[columns >= 0]
        return counts

    def classes(self, after: int = -1, limit: int | None = None) -> list[ClassInfo]:
        """Classes in their order: all, or at most `limit` of those whose uid is above `after`."""
        start = bisect_right(self.uids, after)
        chosen = slice(start, None if limit is None else start + limit)
        rows = zip(self.uids[chosen], self.class_names[chosen], self.counts[chosen].tolist(), strict=True)
        return [ClassInfo(class_id(uid), name, count) for uid, name, count in rows]

    def examples_of(self, uid: int) -> list[int]:
        """The numbers of a class's support images, rising."""
        if self.multi_label is not None:
            chosen = self.multi_label.labels[:, self.uids.index(uid)]
            return np.sort(self.examples.ids[chosen]).tolist()
        numbers = [segment.ids[(segment.class_ids == uid) & segment.active] for segment in self.segments]
        return np.sort(np.concatenate(numbers)).tolist() if numbers else []

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
        present: set[int] = set()
        for segment in self.segments:
            present.update(segment.ids[np.isin(segment.ids, numbers) & segment.active].tolist())
        wrong = [text for text, number in zip(example_ids, numbers, strict=True) if number not in present]
        if wrong or not numbers or len(set(numbers)) < len(numbers):
            raise IosrFastError(
                f"expected ids of examples that are there, each once, got {abbreviate(wrong or example_ids)}"
            )
        return numbers

    # --- changes: each returns another head ---

    def adding(self, added: Examples) -> Head:
        """The head with more support images of its classes."""
        return self._changed(added, segments=(*self.segments, added), next_example=int(added.ids.max()) + 1)

    def adding_class(self, name: str, row: np.ndarray, added: Examples | None) -> Head:
        """The head with one more class; `added`, its support images, have the class id self.next_class."""
        return self._changed(
            added,
            class_names=(*self.class_names, name),
            uids=(*self.uids, self.next_class),
            text=np.concatenate([self.text, row[None]]),
            segments=self.segments if added is None else (*self.segments, added),
            next_class=self.next_class + 1,
            next_example=self.next_example if added is None else int(added.ids.max()) + 1,
        )

    def removing(self, numbers: Iterable[int]) -> Head:
        """The head without some support images."""
        gone = np.array(sorted(numbers), np.int64)
        segments, taken = without(self.segments, lambda part: np.isin(part.ids, gone), SMALL)
        return self._changed(taken=taken, segments=segments)

    def removing_class(self, uid: int) -> Head:
        """The head without a class and its support images."""
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

    def renaming(self, uid: int, name: str, row: np.ndarray | None) -> Head:
        """The head with another name of a class, and another text embedding if `row` is given."""
        at = self.uids.index(uid)
        names = tuple(name if i == at else other for i, other in enumerate(self.class_names))
        if row is None:
            return replace(self, class_names=names, version=self.version + 1)
        text = self.text.copy()
        text[at] = row
        return self._changed(class_names=names, text=text)

    def with_config(self, config: MethodConfig) -> Head:
        """The same classes and images with another method or other parameters; segments are joined."""
        return self._first(config, None, self.version + 1)

    def joined(self) -> Head:
        """The same head with one segment and one plan, bit-equal to that head saved and loaded."""
        return self._first(self.config, self.whole_plan, self.version)

    def _first(self, config: MethodConfig, plan: ScoringPlan | None, version: int) -> Head:
        numbers = (self.next_class, self.next_example)
        names, text, tau = self.class_names, self.text, self.tau
        known = self.uids, numbers, version, self.unknown_images
        return Head.first(names, text, tau, self.examples, config, plan, *known)

    def _changed(self, added: Examples | None = None, taken: Examples | None = None, **fields: object) -> Head:
        """A head with these fields and its plan. `added` and `taken` are the images that it gains and loses."""
        after = replace(self, version=self.version + 1, **fields)  # type: ignore[arg-type]
        after = replace(after, segments=absorb(after.segments, SMALL))
        if not after.segments and METHODS[self.config.method].needs_support:
            raise IosrFastError(
                f"{self.config.method} needs support images: expected to keep at least one, got none left"
            )
        if self.config.additive:
            return self._additive(after)
        if self.config.by_moments:
            after = replace(after, moments=self._moments_of(after, added, taken))
        elif not self.deferred and (reason := unavailable_reason(self.config.method, after.support)) is not None:
            raise IosrFastError(f"that change can't be after: {reason}")
        return after if self.deferred else after._compiled()

    def deferring(self) -> Head:
        """The same head, whose changes compile no plan if that costs more than the change. `settled` compiles it."""
        return self if self.config.additive else replace(self, deferred=True)

    def settled(self) -> Head:
        """The head with the plan that its deferred changes have not compiled."""
        return self._compiled() if self.deferred else self

    def _compiled(self) -> Head:
        config = self.config
        if config.by_moments:
            moments = self.moments or self._all_moments()
            plan = moments.compile(self.text, self.tau, config.which, config.reducer, config.parameters["alpha"])
            plan = plan.scaled(config.factor)
        else:
            plan = config.compile(self.support)
        return replace(self, plan=plan, parts=(), deferred=False)

    def _additive(self, after: Head) -> Head:
        parts = self._parts_of(after) if "alpha" in self.config.parameters else ()
        head = ScoringPlan(len(after.uids), text=after.text, tau=self.config.factor * self.tau)
        uids = np.array(after.uids)
        columns = [columns_of(segment.classes, uids) for segment in after.segments] if parts else []
        return replace(after, plan=assemble(head, parts, columns), parts=parts)

    def _moments_of(self, after: Head, added: Examples | None, taken: Examples | None) -> Moments:
        moments = self.moments or self._all_moments()
        if taken is not None:
            moments = moments.add(self._rows(taken), np.searchsorted(self.uids, taken.class_ids), -1)
        if len(after.uids) < len(self.uids):
            moments = moments.select_classes(np.isin(self.uids, after.uids))
        elif len(after.uids) > len(self.uids):
            moments = moments.append_class()
        if added is not None:
            moments = moments.add(self._rows(added), np.searchsorted(after.uids, added.class_ids))
        empty = int((moments.counts == 0).sum())
        if empty:
            raise IosrFastError(
                f"that change can't be after: {self.config.method} needs an image of each class, {empty} have none"
            )
        return moments

    def _all_moments(self) -> Moments:
        none = Moments.none(len(self.uids), self.text.shape[1])
        return none.add(self._rows(self.examples), np.searchsorted(self.uids, self.examples.class_ids))

    def _rows(self, examples: Examples) -> np.ndarray:
        """The rows (n, D) that the method compares."""
        return image_rows(examples.embeddings, self.config.which, self.config.reducer)

    def _parts_of(self, after: Head) -> tuple[ScoringPlan, ...]:
        """A cache term for each segment, the existing one where its weights stay."""
        known = {id(segment.ids): part for segment, part in zip(self.segments, self.parts, strict=True)}
        of_class = class_weights(after.counts)
        parts = []
        for segment in after.segments:
            part = known.get(id(segment.ids))
            if part is None:
                part = self.config.cache_term(segment, compensate=len(segment) >= COMPENSATED_KEYS)
            weights = None
            if segment.removed is not None or (of_class != 1.0).any():
                columns = columns_of(segment.classes, np.array(after.uids))
                weights = np.repeat(of_class[columns].astype(np.float32), segment.sizes) * segment.active
            if part.weights is None or weights is None:
                same = part.weights is weights
            else:
                same = np.array_equal(part.weights, weights)
            parts.append(part if same else with_arrays(part, weights=weights))
        return tuple(parts)
