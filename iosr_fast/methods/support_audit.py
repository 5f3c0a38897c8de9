"""The audit of a support set: labels that are likely wrong, copies, classes that are confused, too few images."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from iosr_fast.methods.folds import class_distances, near_pairs
from iosr_fast.methods.label_noise import judge_labels
from iosr_fast.methods.links import Link, Sigmoid, Softmax
from iosr_fast.methods.out_of_fold import OutOfFold
from iosr_fast.methods.support_set import SupportSet, image_rows
from iosr_fast.scoring.plan import Which
from iosr_fast.utils.json_values import json_values
from iosr_fast.utils.result import Result

Label: TypeAlias = str | int | float  # as in classes_; images are named by ids of examples, or positions of rows
LIKELY = 0.5  # more likely wrong than right
_DOUBTFUL = 0.1  # listed
_CONFUSED = 0.1  # of the probability of both classes' images goes to the other class
_ALIKE = 0.4  # of the usual distance of two images of a class, on the average of a class
_ROUNDING = 1e-6  # cosines of equal rows differ from 1 by less
_NEIGHBOURS = 3


@dataclass(frozen=True)
class Suspect:
    """An image and a label that is doubtful: `suspicion` is the probability that it is wrong (label_noise).

    label        the label in doubt; None for one of several that is missing
    suggested    what the image should have in its place: the most probable other class when it is left out; where
                 images may have several labels the missing one, or None for a label that is wrong
    probability  by the classifier, of the suggested class; of `label` if there is none
    neighbours   the other support images of that class that are nearest to this one, nearest first
    path         of its file, where it is known
    """

    image: str | int
    label: Label | None
    suspicion: float
    suggested: Label | None
    probability: float
    neighbours: tuple[str | int, ...]
    path: str | None = None

    @property
    def finding(self) -> str:
        """What is likely, in words: "four is rather two", "four is wrong", "two is missing"."""
        if self.label is None:
            return f"{self.suggested} is missing"
        return f"{self.label} is wrong" if self.suggested is None else f"{self.label} is rather {self.suggested}"


@dataclass(frozen=True)
class Duplicate:
    """Two images as good as equal for the encoder; of two classes, one of the labels is wrong or both are meant. With
    the paths of their files, where these are known. Where images may have several labels, `label` is a tuple of them.
    """

    image: str | int
    label: Label | tuple[Label, ...]
    other: str | int
    other_label: Label | tuple[Label, ...]
    cosine: float
    path: str | None = None
    other_path: str | None = None


@dataclass(frozen=True)
class Confusion:
    """Two classes: of their `images`, left out, `mistaken` were taken for the other; `share` of the probability went
    there, the most of the `examples`, one of each. Where images may have several labels, of images with one of both
    labels: those that were given the other one alone, and the mean of (1 - p) (q - r), p and q the probabilities of the
    label and of the other one, r the mean q of images without the latter."""

    label: Label
    other: Label
    images: int
    mistaken: int
    share: float
    examples: tuple[Any, Any]


@dataclass(frozen=True)
class ClassReport:
    """A class: its `images`, how many of them are `distinct` (Folds.distinct), how many were left out (`scored`) and
    then `right` (given this label), how varied they are (1: as usual), and what to do in `advice`, or ""."""

    label: Label
    images: int
    distinct: int
    scored: int
    right: int
    variety: float
    advice: str


@dataclass(frozen=True, eq=False, repr=False)
class SupportAudit(Result):
    """The result of `audit_support` for N images of C classes; `to_frame` has the suspects.

    suspicion        from what names an image, its row or an example's id, to the probability that its label is wrong;
                     the most suspicious first, by the label's probability; NaN, last, for one that can't be left out.
                     With several labels an image, that any of them is wrong or missing
    suspects         labels that are doubtful (suspicion of at least 10%), the most suspicious first
    expected_wrong   how many labels are wrong, or missing, by estimate, listed or not
    duplicates       the nearest pair first
    confusions       the most confused classes first
    classes          all of them, in their order
    notes            what makes left-out images say too much of new ones, and what to do
    basis            what labels were compared with: "left-out images"; "class names", if nothing could be left out;
                     "nothing"
    label_sets       where images may have several labels those of each image in `suspects`; None otherwise
    """

    suspicion: Mapping[str | int, float]
    suspects: tuple[Suspect, ...]
    expected_wrong: float
    duplicates: tuple[Duplicate, ...]
    confusions: tuple[Confusion, ...]
    classes: tuple[ClassReport, ...]
    notes: tuple[str, ...]
    basis: str
    seconds: float = field(default=0.0, compare=False)
    label_sets: Mapping[str | int, tuple[Label, ...]] | None = None

    @property
    def likely_wrong(self) -> tuple[Suspect, ...]:
        """The suspects whose label is more likely wrong, or missing, than not."""
        return tuple(suspect for suspect in self.suspects if suspect.suspicion > LIKELY)

    @property
    def corrected(self) -> dict[str | int, tuple[Label, ...]]:
        """The labels that the images of `likely_wrong` should have."""
        return {image: self.labels_after(own) for image, own in grouped(self.likely_wrong).items()}

    def labels_after(self, suspects: Sequence[Suspect]) -> tuple[Label, ...]:
        """The labels of an image, as suspects of it suggest."""
        own = (suspects[0].label,) if self.label_sets is None else self.label_sets[suspects[0].image]
        wrong = [one.label for one in suspects]
        added = [one.suggested for one in suspects]
        return tuple(label for label in (*(one for one in own if one not in wrong), *added) if label is not None)

    def summary(self) -> str:
        """What was found, a line each."""
        lines = [f"{len(self.suspicion)} images of {len(self.classes)} classes, checked by {self.basis}"]
        if self.basis != "nothing":
            wrong = sum(one.label is not None for one in self.likely_wrong)
            listed, both = f"labels that are likely wrong: {wrong}", ""
            if self.label_sets is not None:
                listed, both = f"{listed}, likely missing: {len(self.likely_wrong) - wrong}", " or missing"
            lines.append(f"{listed}; by estimate {self.expected_wrong:.1f} labels are wrong{both}")
        across = sum(pair.label != pair.other_label for pair in self.duplicates)
        lines.append(f"near duplicates: {len(self.duplicates)} pairs, {across} under two labels")
        lines += self.notes
        lines.append(f"confused classes: {len(self.confusions)} pairs")
        lines.append(f"classes that need other or more images: {sum(bool(one.advice) for one in self.classes)}")
        return "\n".join(lines)

    def _columns(self) -> dict[str, list[Any]]:
        names = "image", "path", "label", "suspicion", "suggested", "probability"
        return {name: [getattr(one, name) for one in self.suspects] for name in names}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the number of images in place of `suspicion`; null for what can't be said."""
        facts = {name: value for name, value in vars(self).items() if name != "suspicion"}
        if self.label_sets is None:
            del facts["label_sets"]
        values: dict[str, Any] = json_values({"images": len(self.suspicion), **facts})
        return values


def grouped(suspects: Sequence[Suspect]) -> dict[str | int, list[Suspect]]:
    """The suspects of each image, in their order."""
    images: dict[str | int, list[Suspect]] = {}
    for one in suspects:
        images.setdefault(one.image, []).append(one)
    return images


def audit_support(
    support: SupportSet,
    left_out: OutOfFold,
    *,
    which: Which = "plain",
    link: Link | None = None,
    images: np.ndarray | None = None,
    classes: np.ndarray | None = None,
    paths: Sequence[str | None] = (),
    notes: tuple[str, ...] = (),
) -> SupportAudit:
    """What is wrong with N labelled images of C classes.

    `left_out` are the out-of-fold logits of a method, `which` are the embeddings that it compares, and `link` says what
    it answers (None: that of these logits). `images` (N,) and `classes` (C,) name images and classes in the result;
    None: by position. `paths` (N, or none) are those of the images' files; the result has the `notes`, too.

    Labels are judged by the logits of left-out images: the suspicion of label_noise is high if a label is less probable
    than a random error would make it, given how often the classifier is mistaken. If every class has one image, the
    class names judge, where there are texts. Where images may have several labels, each label is judged by itself, and
    each that an image lacks, too; none of a class of which nothing can be left out.

    Near duplicates are images whose distance 1 - cosine is at most a tenth of the usual one of two images of a class,
    the median over classes of the median of their pairs. Confusions leave likely wrong labels out, but where images may
    have several labels none: of two classes that are taken for one another many labels look wrong.

    Time: N^2 D operations for the pairs, in blocks.

    Sources: the mixture of label_noise is a noise model with one rate, as in confident learning (Northcutt et al., JAIR
    2021), fitted by likelihood; with several labels it has two (Mnih & Hinton, ICML 2012).
    """
    started = time.perf_counter()
    several, truth = support.owners is not None, support.indicator
    names = list(range(len(truth))) if images is None else images.tolist()
    files = paths or (None,) * len(truth)
    class_names = list(range(support.n_classes)) if classes is None else classes.tolist()
    link = link or (Sigmoid.of(left_out.logits) if several else Softmax())
    found = judge_labels(support, left_out)
    rows = image_rows(support.embeddings, which, None)
    shares = link.probabilities(found.logits.astype(np.float64))
    of_labels, offsets = support.of_labels(np.arange(len(truth))), support.class_offsets

    def labels_of(i: int) -> Any:
        own = tuple(class_names[c] for c in np.flatnonzero(truth[i]).tolist())
        return own if several else own[0]

    def suspect(i: int, doubted: int) -> Suspect:
        better = doubted if several else int(np.where(truth[i], -1.0, shares[i]).argmax())
        label = class_names[doubted] if truth[i, doubted] else None
        suggested = None if truth[i, better] else class_names[better]
        others = of_labels[offsets[better] : offsets[better + 1]]
        others = others[others != i]
        nearest = others[np.argsort(-(rows[others] @ rows[i]), kind="stable")[:_NEIGHBOURS]]
        neighbours, share = tuple(names[j] for j in nearest.tolist()), float(shares[i, better])
        return Suspect(names[i], label, float(found.wrong[i, doubted]), suggested, share, neighbours, files[i])

    def duplicate(i: int, j: int, cosine: float) -> Duplicate:
        return Duplicate(names[i], labels_of(i), names[j], labels_of(j), cosine, files[i], files[j])

    doubtful = np.argwhere(found.wrong >= _DOUBTFUL)
    doubtful = doubtful[np.argsort(-found.surprise[tuple(doubtful.T)], kind="stable")]
    chosen = found.scored if several else found.scored & ~(found.suspicion > LIKELY)
    return SupportAudit(
        suspicion={names[i]: float(found.suspicion[i]) for i in found.most_suspicious},
        suspects=tuple(suspect(*pair) for pair in doubtful.tolist()),
        expected_wrong=found.expected,
        duplicates=tuple(duplicate(*pair) for pair in near_pairs(rows, support)),
        confusions=tuple(_confusions(names, class_names, truth, shares, link.decide(found.logits), chosen)),
        classes=tuple(_class_reports(support, class_names, left_out, link, rows)),
        notes=notes,
        basis=found.basis,
        seconds=time.perf_counter() - started,
        label_sets={names[i]: labels_of(i) for i in np.unique(doubtful[:, 0]).tolist()} if several else None,
    )


def _confusions(
    names: Sequence[Any],
    classes: Sequence[Any],
    truth: np.ndarray,
    shares: np.ndarray,
    decided: np.ndarray,
    chosen: np.ndarray,
) -> Iterator[Confusion]:
    """Pairs of classes, by the labels (N, C) bool, probabilities (N, C) and answers of the left-out images `chosen`
    (N,) bool, among all images `names` (N)."""
    several = decided.ndim == 2
    answers = decided if several else decided[:, None] == np.arange(len(classes))
    others = ~truth & chosen[:, None]
    lost, more = np.ones(shares.shape), shares
    if several:
        lost, more = 1.0 - shares, shares - np.where(others, shares, 0.0).sum(0) / np.maximum(others.sum(0), 1)
    lost, gained = np.where(truth & chosen[:, None], lost, 0.0), np.where(others, more, 0.0)

    def count(of_first: np.ndarray, of_second: np.ndarray) -> np.ndarray:
        """(C, C), in how many images either class of a pair is in one mask and the other one in the other."""
        found = of_first[chosen].astype(np.float32).T @ of_second[chosen].astype(np.float32)
        return found + found.T

    either, mistaken = count(truth, ~truth), count(truth & ~answers, ~truth & answers)
    towards = lost[chosen].T @ gained[chosen]
    share = np.triu((towards + towards.T) / np.maximum(either, 1), 1)
    for a, b in sorted(np.argwhere(share >= _CONFUSED).tolist(), key=lambda pair: -share[tuple(pair)]):
        rows = [np.where(truth[:, c], lost[:, c] * gained[:, d], -1).argmax() for c, d in ((a, b), (b, a))]
        examples = names[int(rows[0])], names[int(rows[1])]
        yield Confusion(classes[a], classes[b], int(either[a, b]), int(mistaken[a, b]), float(share[a, b]), examples)


def _class_reports(
    support: SupportSet, classes: Sequence[Any], left_out: OutOfFold, link: Link, rows: np.ndarray
) -> Iterator[ClassReport]:
    counts = support.counts
    distinct = left_out.folds.distinct
    variety = class_distances(rows, support, np.mean)
    if np.isfinite(variety).any():
        variety /= max(np.nanmedian(variety), _ROUNDING)
    usual = float(np.median(distinct[counts > 0])) if counts.any() else 0.0
    labels, answers = left_out.labels, link.decide(left_out.logits)
    if support.owners is None:
        right, scored = (np.bincount(some, minlength=len(counts)) for some in (labels[answers == labels], labels))
    else:
        right, scored = ((some & (distinct > 1)).sum(0) for some in (labels & answers, labels))
    for c, name in enumerate(classes):
        advice = []
        if counts[c] == 0:
            advice.append("no image")
        elif distinct[c] == 1:
            one = "one image" if counts[c] == 1 else "images that look alike" if support.groups is None else "one group"
            advice.append(f"{one}: nothing can be left out")
        elif distinct[c] < usual / 2:
            advice.append(f"few images: {distinct[c]} where {usual:g} are usual")
        if support.groups is None and 1 < distinct[c] <= counts[c] / 2:
            advice.append(
                f"look-alikes: {counts[c]} images are {distinct[c]} groups; new ones may be right less often: add "
                "images of other places and times"
            )
        if variety[c] < _ALIKE and distinct[c] > 1:
            advice.append("images are too alike: add others of other places, angles and lights")
        images, single, scores, hits = (int(count[c]) for count in (counts, distinct, scored, right))
        yield ClassReport(name, images, single, scores, hits, float(variety[c]), "; ".join(advice))
