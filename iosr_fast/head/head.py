"""Head: a fitted classifier on embeddings at one version."""

from __future__ import annotations

import copy
import logging
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any, Self

import msgspec
import numpy as np

from iosr_fast.encoders.encoder import Embeddings, as_numpy
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.calibration import Calibration, calibration_of, check_calibration
from iosr_fast.head.examples import Examples
from iosr_fast.head.ids import class_id, example_number, uid_of
from iosr_fast.head.labels import class_ids, read_label_sets
from iosr_fast.methods.automation import least_odds
from iosr_fast.methods.checks import strange_odds
from iosr_fast.methods.config import Config, Evidence, wilson
from iosr_fast.methods.conformal import CALIBRATION, LEFT_OUT, Judged, of_answers, of_logits
from iosr_fast.methods.folds import Folds, NearSupport, make_folds, unit_weights
from iosr_fast.methods.links import Link, Platt, Sigmoid, Softmax
from iosr_fast.methods.log_loss import fit_temperature
from iosr_fast.methods.look_alikes import LookAlikes, find_look_alikes
from iosr_fast.methods.models.gaussian import CentredGaussianModel, GaussianModel
from iosr_fast.methods.out_of_fold import OutOfFold, out_of_fold
from iosr_fast.methods.support_set import SupportSet, image_rows
from iosr_fast.methods.tree import Path, Tree
from iosr_fast.methods.unknown import Unknown, fit_unknown
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reducers import Reducer
from iosr_fast.scoring.score import score
from iosr_fast.utils.numbers import is_tensor
from iosr_fast.utils.short_repr import short_repr
from iosr_fast.utils.text import abbreviate

log = logging.getLogger(__name__)
_ROUNDING = 1e-9  # of a share
OF_SUPPORT = ("support", "plan", "link", "platt", "look_alikes", "folds", "out_of_fold")  # cached properties
_FEW = 0.7  # of a class's images: where left-out ones are judged by less, the accuracy is said to be too low


@dataclass(frozen=True)
class ClassInfo:
    """A class: `class_id` stays through renames, `examples` counts its support images, and in a tree `path` has the
    names of the nodes above it, from the root down.

    >>> ClassInfo("~1", "siamese", 8, path=("animal", "cat")).path
    ('animal', 'cat')
    """

    class_id: str
    name: str
    examples: int
    path: Path = ()


@dataclass(frozen=True, eq=False)
class Head:
    """A fitted classifier on embeddings at one version: data that never changes, and what is computed from it once.

    class_names, uids  of the C classes, in order; uids rise and are never reused
    text               (C, D) float32, unit rows; None where the model reads no texts
    tau                the CLIP's logit scale
    examples           the support images (N), sorted by class where each has one
    config             the method and its parameters
    reducer            fitted when they were chosen; it stays until the next choice
    version            rises by one with every change
    next_class, next_example  the numbers of the next class and the next support image
    unknown_images     embeddings of pictures of none of the classes, by which these are recognised, or None
    calibration_images  labelled images, no support images, on which promises rest instead of left-out ones, or None
    paths              of each class the names of the nodes above it in a tree (tree.Tree); None without a tree
    """

    class_names: tuple[str, ...]
    uids: tuple[int, ...]
    text: np.ndarray | None
    tau: float
    examples: Examples
    config: Config
    reducer: Reducer | None
    version: int
    next_class: int
    next_example: int
    unknown_images: Embeddings | None = None
    calibration_images: Examples | None = None
    paths: tuple[Path, ...] | None = None
    __repr__ = short_repr

    @classmethod
    def first(
        cls,
        class_names: Sequence[str],
        text: np.ndarray | None,
        tau: float,
        examples: Examples,
        config: Config,
        reducer: Reducer | None = None,
        uids: Sequence[int] | None = None,
        **fields: Any,
    ) -> Self:
        """The head of a fit: version 1. `uids` None numbers the classes from 0; `fields` are those of the class."""
        uids = tuple(range(len(class_names)) if uids is None else uids)
        following = uids[-1] + 1, int(examples.ids.max(initial=-1)) + 1
        return cls(tuple(class_names), uids, text, tau, examples, config, reducer, 1, *following, **fields)

    @property
    def is_multi_label(self) -> bool:
        """Whether pictures may have several labels, or none."""
        return self.examples.owners is not None

    @cached_property
    def link(self) -> Link:
        """How logits become answers; given where it was stored (`with_computed`)."""
        return Sigmoid.of(self.out_of_fold.logits) if self.is_multi_label else Softmax()

    @property
    def thresholds(self) -> np.ndarray | None:
        """Where pictures may have several labels, of each class the probability from which a picture has it, (C,)."""
        return self.link.thresholds if isinstance(self.link, Sigmoid) else None

    @cached_property
    def plan(self) -> ScoringPlan:
        """The method, compiled for the support images; given where it was stored (`with_computed`). Where pictures may
        have several labels it has the scale and the biases of left-out images."""
        plan = self.config.compile(self.support, self.reducer)
        if not self.is_multi_label:
            return plan
        return self.platt.applied_to(plan)

    @cached_property
    def support(self) -> SupportSet:
        """The support images as methods take them."""
        return self.examples.as_support(self.uids, self.text, self.tau)

    @cached_property
    def tree(self) -> Tree:
        """The nodes that a promise may answer with; without a tree the classes alone."""
        return Tree(self.paths or ((),) * len(self.uids))

    @cached_property
    def node_names(self) -> tuple[str, ...]:
        """The names of the tree's nodes, those of the classes first."""
        return self.class_names + tuple(node[-1] for node in self.tree.inner)

    def require_single_label(self, call: str, instead: str = "fit with one label for each picture") -> Self:
        """The head itself. Raises IosrFastError where pictures may have several labels: `call` has no answer yet."""
        if self.is_multi_label:
            raise IosrFastError(
                f"{call} is for one label a picture, and this classifier was fitted with several: {instead}"
            )
        return self

    @cached_property
    def counts(self) -> np.ndarray:
        """(C,) int64, the support images of each class."""
        return self.support.counts

    def examples_of(self, uid: int) -> list[int]:
        """The numbers of a class's support images, rising."""
        return np.sort(self.examples.ids[self.examples.rows_of(uid)]).tolist()

    @cached_property
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
        """Logits (B, C) float32. `check` is that of scoring.score.

        Embeddings on a GPU are scored there. An encoder has just normalised them, so only NaN could be wrong, which is
        seen in the logits, without a second wait for the GPU."""
        on_gpu = is_tensor(embeddings.plain) and embeddings.plain.is_cuda
        logits = as_numpy(score(self.plan, embeddings, check=check and not on_gpu))
        if on_gpu and np.isnan(logits).any():
            raise IosrFastError("expected finite embeddings, got NaN from the encoder on the GPU; restart the process")
        return logits

    def classes(self, after: int = -1, limit: int | None = None) -> list[ClassInfo]:
        """Classes in their order: all, or at most `limit` of those whose uid is above `after`."""
        start = bisect_right(self.uids, after)
        chosen = slice(start, None if limit is None else start + limit)
        columns = self.uids[chosen], self.class_names[chosen], self.counts[chosen].tolist(), self.tree.paths[chosen]
        return [ClassInfo(class_id(uid), *row) for uid, *row in zip(*columns, strict=True)]

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

    @property
    def evidence(self) -> Evidence | None:
        """That of the search that chose the config, `stale` if the head has changed since; None if there was none."""
        evidence = self.config.evidence
        if evidence is None or evidence.version == self.version:
            return evidence
        return msgspec.structs.replace(evidence, stale=True)

    # What left-out support images answer, each at its first use, and of heads that serve before it

    def with_promises(self, before: Head | None = None) -> Self:
        """The same head, after computing its plan and all that `max_error` rests on; what `keep` rests on, which takes
        ten times as long, if the version `before` has it, as somebody asks for it."""
        self.doubts  # noqa: B018  # by the left-out labels
        self.strange_odds  # noqa: B018
        if (before or self).computed("unknown") is not None:
            self.with_unknown()
        return self.compiled()

    def with_unknown(self) -> Self:
        """The same head, after computing all that `keep` rests on."""
        self.unknown.score(self.examples.embeddings[:1])  # fits the models of its scores
        return self

    @cached_property
    def look_alikes(self) -> LookAlikes | None:
        """Which support images look alike; None where they count as drawn independently. Images that may have several
        labels are compared within each of their classes, and grouped as they are left out."""
        if not self.config.look_alikes:
            return None
        if self.is_multi_label:
            return replace(find_look_alikes(self.support.pairs()[0]), groups=self.folds.units)
        return find_look_alikes(self.support)

    @property
    def look_alike_warning(self) -> tuple[str, ...]:
        """What is wrong where the images on which promises rest are too much like the support's, and what to do; none
        where they are not. Left-out images are so in bursts; of images of calibrate_on that are so, both is said."""
        siblings = () if self.calibration is None else self.calibration.beside.warning
        alike = self.look_alikes if siblings or self.calibration is None else None
        return siblings if alike is None else siblings + alike.warning

    @cached_property
    def folds(self) -> Folds:
        """Which support images are left out together in all that is promised and reported."""
        alike = None if self.is_multi_label else self.look_alikes  # of label sets make_folds finds them
        return make_folds(self.support, None if alike is None else alike.groups)

    @cached_property
    def near_support(self) -> NearSupport:
        """Finds near duplicates of the support images."""
        return NearSupport(self.support)

    @cached_property
    def out_of_fold(self) -> OutOfFold:
        """The logits of support images that are left out, from which the rest follows."""
        found = self._before_platt
        if not self.is_multi_label:
            return found
        return replace(found, logits=self.platt.logits(found.logits).astype(np.float32))

    @cached_property
    def _before_platt(self) -> OutOfFold:
        config = self.config
        chosen = self.reducer, config.parameters, config.factor
        return out_of_fold(config.entry, self.support, self.folds, *chosen)

    @cached_property
    def platt(self) -> Platt:
        """Where pictures may have several labels, what makes probabilities of the logits: fitted to left-out images
        anew with every change, as a temperature is, while the weights of the config stay."""
        return Platt.fit(self._before_platt.logits, self._before_platt.labels, self.folds.distinct > 1)

    @cached_property
    def judged(self) -> Judged:
        """What the method says of support images that are left out, or of the calibration images."""
        logits, labels, units, basis = self._judging
        if isinstance(self.link, Sigmoid):
            return of_answers(logits, labels, self.link.decide(logits), units, basis)
        return of_logits(logits, labels, basis, units, self.tree)

    @property
    def _judging(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
        """The images on which promises rest: their calibrated logits (V, C), labels and units (V,), and what they
        are."""
        if (new := self.calibration) is None:
            found = self.calibrated_out_of_fold
            return found.logits, found.labels, found.units, LEFT_OUT
        return self.calibrated(self.score(new.embeddings)), new.labels, new.units, CALIBRATION

    @cached_property
    def strange_odds(self) -> float:
        """checks.strange_odds: the odds of its label at which a picture is strange; where pictures may have several, of
        the most likely of them, or of none the most likely class, as Prediction.probability is."""
        if not self.is_multi_label:
            return strange_odds(self.judged)
        logits, labels, units, basis = self._judging
        decided = self.link.decide(logits)
        shown = np.where(decided | ~decided.any(1, keepdims=True), logits, -np.inf)
        first = shown.argmax(1)[:, None] == np.arange(len(self.uids))
        surest = of_answers(logits, labels, first, units, basis)
        return strange_odds(replace(surest, weights=unit_weights(units), units=None))

    @cached_property
    def temperature(self) -> float:
        """What divides the logits in probabilities, softmax(logits / temperature), and so in all that is promised:
        that of log_loss.fit_temperature for the images on which promises rest, look-alikes left out together. The
        search of weights leaves them in, finds a fit of bursts right everywhere, and would be far too sure. It changes
        no label.
        """
        if self.is_multi_label:
            return 1.0  # its fit calibrates
        new = self.calibration
        if new is None:
            found = self.out_of_fold
            return fit_temperature(found.logits, found.labels, unit_weights(found.units))
        return fit_temperature(self.score(new.embeddings), new.labels, unit_weights(new.units))

    def calibrated(self, logits: np.ndarray) -> np.ndarray:
        """Logits (B, C) over the temperature, of their dtype: their softmax has the probabilities."""
        return logits / logits.dtype.type(self.temperature)

    @property
    def calibrated_out_of_fold(self) -> OutOfFold:
        """`out_of_fold`, its logits over the temperature."""
        return replace(self.out_of_fold, logits=self.calibrated(self.out_of_fold.logits))

    @cached_property
    def calibration(self) -> Calibration | None:
        """The images of calibrate_on on which promises rest, if there are any."""
        given = self.calibration_images
        return None if given is None else calibration_of(self.support, self.uids, given, self.config.look_alikes)

    def calibrated_on(self, images: Embeddings, labels: np.ndarray, groups: np.ndarray | None = None) -> Head:
        """The next version, whose promises rest on these images; `labels` are as `read_labels` has them, `groups` (L,)
        as of SupportSet. No logit and no label changes. Raises IosrFastError where too few of them are new
        (Calibration).
        """
        if self.is_multi_label:
            given = Examples.numbered(images, np.zeros(len(images), np.int64), groups).labelled(labels, self.uids)
        else:
            given = Examples.numbered(images, np.array(self.uids)[labels], groups)
        config, version = self.config, self.version + 1
        if (evidence := self.evidence) is not None and not evidence.stale:  # it stays evidence of this fit
            config = msgspec.structs.replace(config, evidence=msgspec.structs.replace(evidence, version=version))
        made = replace(self, config=config, version=version, calibration_images=given)
        kept = {name: self.computed(name) for name in OF_SUPPORT}
        made = made.with_computed(**kept)
        new = made.calibration
        assert new is not None
        check_calibration(len(new.labels), made.judged.count, new.left_out)
        return made

    @cached_property
    def least_odds(self) -> Callable[[float], float]:
        """automation.least_odds by `max_error`, of the latest promises: every batch of queries asks."""
        return lru_cache(16)(partial(least_odds, self.judged))

    @cached_property
    def unknown(self) -> Unknown:
        """How pictures of no class are recognised, by the embeddings that queries have."""
        self.require_single_label("unknown", "a picture of none of the classes gets no label")
        unknown = fit_unknown(self.support, self.folds, self.needs_adapted, self.unknown_images)
        new = self.calibration
        return unknown if new is None else unknown.calibrated_on(new.embeddings, new.units)

    @cached_property
    def doubts(self) -> tuple[str, ...]:
        """What speaks against promises, and what to do, a sentence each."""
        known, new = self.judged, self.calibration
        if not len(self.examples):
            return ()
        if not known.count:
            return ("probabilities at one picture a class are not measured, and nothing is promised from them",)
        sentences = [*self.look_alike_warning]
        if self.look_alikes is not None and self.examples.groups is None:
            sentences += self.look_alikes.doubt
        if new is not None and new.left_out:
            sentences.append(f"{new.left_out} are left out of calibrate_on")
        unjudged = self._judged_labels == 0
        single = unjudged & (self.counts == 1) & (new is None)
        if names := [self.class_names[i] for i in np.flatnonzero(single)]:
            has, it = ("has", "it") if len(names) == 1 else ("have", "them")
            sentences.append(
                f"{abbreviate(names)} {has} one picture: add a second; until then nothing is promised of {it}"
            )
        if names := [self.class_names[i] for i in np.flatnonzero(unjudged & ~single)]:
            nothing = f"nothing is promised of {abbreviate(names)}"
            sentences.append(f"{len(names):,} of {len(self.uids):,} classes have none of the {known.basis}: {nothing}")
        return tuple(sentences)

    def summary(self) -> str:
        """What is known of the accuracy, a line each: the accuracy; what speaks against it and what to do; what the
        search of parameters noted; the size of the tree."""
        known, evidence = self.judged, self.evidence
        if known.count and self.is_multi_label:
            (low, high), found = self.accuracy_range, int(known.right.sum()) / max(int(self._judged_labels.sum()), 1)
            right = f"{known.reliability.accuracy:.1%} of {len(known.labels):,} {known.basis} right"
            text = f"several labels a picture: {right} (95%: {low:.0%} to {high:.0%}), {found:.1%} of all labels found"
        elif known.count:
            accuracy, (low, high), one = known.reliability.accuracy, self.accuracy_range, self._one_by_one
            images, interval = f"{len(known.labels):,} {known.basis}", f"(95%: {low:.0%} to {high:.0%})"
            text = f"{accuracy:.1%} of {images} right {interval}"
            if one > wilson(accuracy, known.count)[1] + _ROUNDING:
                text = (
                    f"{accuracy:.0%} to {one:.0%} of {images} right {interval}: {accuracy:.1%} if new pictures are of "
                    f"other sessions (look-alikes left out together), {one:.1%} if they are of these"
                )
            if self._kept_share < _FEW:
                text += f"; each was judged by {self._kept_share:.0%} of its class, so more may be right"
        else:
            why = "one picture of each class leaves none" if len(self.examples) else "there are no support images"
            text = f"accuracy not measured: {why} to judge by"
        note = "" if evidence is None else evidence.note
        tree = "" if self.paths is None else str(self.tree)
        return "\n".join(filter(None, [text, *self.doubts, note, tree]))

    @property
    def _judged_labels(self) -> np.ndarray:
        """(C,) int64, the images of each class on which promises rest."""
        if not self.is_multi_label:
            return np.bincount(self.judged.labels, minlength=len(self.uids))
        labels = self._judging[1]
        judged = np.ones(len(self.uids), bool) if self.calibration is not None else self.folds.distinct > 1
        counts: np.ndarray = labels.sum(0) * judged
        return counts

    @property
    def accuracy_range(self) -> tuple[float, float]:
        """Where the accuracy on new pictures lies, (low, high): from the lower end of the 95% interval (config.wilson)
        of left-out images, look-alikes left out together, as of pictures of other sessions, to the upper end of that of
        images left out one by one, as of pictures of these. The latter are judged by a fit with a share s of the images
        of their class, which makes more errors; as errors fall no faster than in proportion to the number of images,
        of all of them at most 1 - s (1 - accuracy) are right. (0, 1) where nothing is left out."""
        known = self.judged
        if not known.count:
            return 0.0, 1.0
        accuracy = known.reliability.accuracy
        best = 1.0 - self._kept_share * (1.0 - float(np.fmax(accuracy, self._one_by_one)))
        return wilson(accuracy, known.count)[0], wilson(best, known.count)[1]

    @property
    def _one_by_one(self) -> float:
        """The share that is right of support images left out one by one, near duplicates together; NaN where that is
        not known of this version, or promises rest on other images."""
        evidence = self.evidence if self.calibration is None else None
        if evidence is None or evidence.accuracy is None or evidence.protocol != "loo" or evidence.stale:
            return math.nan
        return evidence.accuracy

    @property
    def _kept_share(self) -> float:
        """The mean over images that are judged of the share of their class's images by which they are; 1 for images of
        calibrate_on."""
        if self.calibration is not None:
            return 1.0
        units = np.minimum(self.folds.distinct, self.folds.number)[self.judged.labels]
        return float(np.mean(1.0 - 1.0 / units))

    @cached_property
    def compared(self) -> np.ndarray:
        """The rows (N, D) that the method compares with a query; neighbours are found by them."""
        return image_rows(self.examples.embeddings, self.config.which, self.reducer)

    @cached_property
    def adapted_bias(self) -> np.ndarray:
        """Of a plan whose linear term reads both embeddings (methods.papers), the bias (C,) of the adapted half."""
        given, factor = self.config.parameters, self.config.factor
        if self.is_multi_label:
            factor, fitted = self.platt.scale, CentredGaussianModel(self.support, "adapted").fields()["bias"]
        else:
            fitted = GaussianModel(self.support, "adapted", copies=given.get("text_images", 0.0)).fitted.bias
        bias: np.ndarray = factor * given["discriminant_adapted"] * fitted
        return bias

    @property
    def text_weight(self) -> float:
        """The weight of text cosines in a logit: tau times that of the config, as it is in the plan."""
        if not self.is_multi_label:
            return self.config.text_weight * self.tau
        return self.plan.tau if self.plan.text is not None else 0.0

    def read_labels(self, images: Sequence[Any], labels: Any, integers: bool) -> np.ndarray:
        """Each image's class by its position, (N,) int64 (labels.class_ids), where integer labels are uids if
        `integers`; where pictures may have several, an indicator (N, C) bool (labels.read_label_sets)."""
        if self.is_multi_label:
            return read_label_sets(labels, len(images), self.class_names)[1]
        return class_ids(images, labels, self.class_names, self.uids if integers else None)

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Those of the link (B, C), of calibrated logits."""
        return self.link.probabilities(self.calibrated(logits))
