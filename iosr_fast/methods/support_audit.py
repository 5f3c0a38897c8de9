"""The audit of a support set: labels that are likely wrong, copies, classes that are confused, too few images."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from iosr_fast.methods.folds import class_distances, near_pairs
from iosr_fast.methods.label_noise import fit_label_noise
from iosr_fast.methods.models.model import TextModel
from iosr_fast.methods.out_of_fold import OutOfFold
from iosr_fast.methods.support_set import SupportSet, image_rows
from iosr_fast.scoring.plan import Which
from iosr_fast.scoring.reference import softmax
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
    """An image whose label is doubtful: `suspicion` is the probability that `label` is wrong (label_noise).

    suggested    the most probable other class when the image is left out, with its `probability` by the classifier
    neighbours   the support images of that class that are nearest to this one, nearest first
    path         of its file, where it is known
    """

    image: str | int
    label: Label
    suspicion: float
    suggested: Label
    probability: float
    neighbours: tuple[str | int, ...]
    path: str | None = None


@dataclass(frozen=True)
class Duplicate:
    """Two images as good as equal for the encoder; of two classes, one of the labels is wrong or both are meant. With
    the paths of their files, where these are known."""

    image: str | int
    label: Label
    other: str | int
    other_label: Label
    cosine: float
    path: str | None = None
    other_path: str | None = None


@dataclass(frozen=True)
class Confusion:
    """Two classes: of their `images`, left out, `mistaken` were taken for the other; `share` of the probability went
    there, the most of the `examples`, one of each."""

    label: Label
    other: Label
    images: int
    mistaken: int
    share: float
    examples: tuple[Any, Any]


@dataclass(frozen=True)
class ClassReport:
    """A class: its `images`, how many of them are `distinct` (Folds.distinct), how many were left out (`scored`) and
    then `right`, how varied they are (1: as usual), and what to do in `advice`, or ""."""

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
                     the most suspicious first, by the label's probability; NaN, last, for one that can't be left out
    suspects         labels that are doubtful (suspicion of at least 10%), the most suspicious first
    expected_wrong   how many labels are wrong by estimate, listed or not
    duplicates       the nearest pair first
    confusions       the most confused classes first
    classes          all of them, in their order
    notes            what makes left-out images say too much of new ones, and what to do
    basis            what labels were compared with: "left-out images"; "class names", if nothing could be left out;
                     "nothing"
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

    @property
    def likely_wrong(self) -> tuple[Suspect, ...]:
        """The suspects whose label is more likely wrong than right."""
        return tuple(suspect for suspect in self.suspects if suspect.suspicion > LIKELY)

    def summary(self) -> str:
        """What was found, a line each."""
        lines = [f"{len(self.suspicion)} images of {len(self.classes)} classes, checked by {self.basis}"]
        if self.basis != "nothing":
            listed = f"labels that are likely wrong: {len(self.likely_wrong)}"
            lines.append(f"{listed}; by estimate {self.expected_wrong:.1f} labels are wrong")
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
        values: dict[str, Any] = json_values({"images": len(self.suspicion), **facts})
        return values


def audit_support(
    support: SupportSet,
    left_out: OutOfFold,
    *,
    which: Which = "plain",
    images: np.ndarray | None = None,
    classes: np.ndarray | None = None,
    paths: Sequence[str | None] = (),
    notes: tuple[str, ...] = (),
) -> SupportAudit:
    """What is wrong with N labelled images of C classes.

    `left_out` are the out-of-fold logits of a method, and `which` are the embeddings that it compares. `images` (N,)
    and `classes` (C,) name images and classes in the result; None: by position. `paths` (N, or none) are those of the
    images' files; the result has the `notes`, too.

    Labels are judged by the logits of left-out images: the suspicion of label_noise is high
    if a label is less probable than a random error would make it, given how often the classifier is mistaken. If every
    class has one image, the class names judge, where there are texts. Near duplicates are images whose distance
    1 - cosine is at most a tenth of the usual one of two images of a class, the median over classes of the median of
    their pairs. Confusions leave likely wrong labels out.

    Time: N^2 D operations for the pairs, in blocks.

    Sources: the mixture of label_noise is a noise model with one rate, as in confident learning (Northcutt et al., JAIR
    2021), fitted by likelihood.
    """
    started = time.perf_counter()
    labels = support.labels
    names = list(range(len(labels))) if images is None else images.tolist()
    files = paths or (None,) * len(labels)
    class_names = list(range(support.n_classes)) if classes is None else classes.tolist()
    logits = left_out.by_image()
    basis = "left-out images"
    judged = scored = np.isfinite(logits[:, 0])
    if not scored.any():
        judged = np.full(len(scored), support.text is not None)
        basis = "nothing"
        if support.text is not None and len(scored):
            basis = "class names"
            logits = TextModel(support).scores(support.as_queries)
    noise = fit_label_noise(logits[judged], labels[judged])
    suspicion, surprise = np.full((2, len(scored)), np.nan)
    suspicion[judged] = noise.wrong
    surprise[judged] = noise.surprise
    rows = image_rows(support.embeddings, which, None)
    shares = softmax(logits.astype(np.float64))
    most_suspicious = np.argsort(-surprise, kind="stable").tolist()  # NaN last

    def suspect(i: int) -> Suspect:
        c = int(np.where(np.arange(support.n_classes) == labels[i], -1.0, shares[i]).argmax())
        first, last = support.class_offsets[c : c + 2]
        nearest = first + np.argsort(-(rows[first:last] @ rows[i]), kind="stable")[:_NEIGHBOURS]
        neighbours = tuple(names[j] for j in nearest.tolist())
        label = class_names[labels[i]]
        return Suspect(names[i], label, float(suspicion[i]), class_names[c], float(shares[i, c]), neighbours, files[i])

    def duplicate(i: int, j: int, cosine: float) -> Duplicate:
        label, other_label = class_names[labels[i]], class_names[labels[j]]
        return Duplicate(names[i], label, names[j], other_label, cosine, files[i], files[j])

    return SupportAudit(
        suspicion={names[i]: float(suspicion[i]) for i in most_suspicious},
        suspects=tuple(suspect(i) for i in most_suspicious if suspicion[i] >= _DOUBTFUL),
        expected_wrong=float(noise.wrong.sum()),
        duplicates=tuple(duplicate(*pair) for pair in near_pairs(rows, support)),
        confusions=tuple(_confusions(support, names, class_names, shares, scored & ~(suspicion > LIKELY))),
        classes=tuple(_class_reports(support, class_names, left_out, rows)),
        notes=notes,
        basis=basis,
        seconds=time.perf_counter() - started,
    )


def _confusions(
    support: SupportSet, names: Sequence[Any], classes: Sequence[Any], shares: np.ndarray, chosen: np.ndarray
) -> Iterator[Confusion]:
    """Pairs of classes, by the probabilities (N, C) of the left-out images `chosen` (N,) bool; `names` (N)."""
    towards_others = np.where(chosen[:, None], shares, 0.0)
    labels = support.labels[chosen]
    n_classes = support.n_classes
    shares = shares[chosen]
    counts = np.bincount(labels, minlength=n_classes)
    taken = np.bincount(labels * n_classes + shares.argmax(1), minlength=n_classes**2).reshape(n_classes, n_classes)
    both = counts[:, None] + counts
    towards = np.eye(n_classes)[labels].T @ shares
    share = np.triu((towards + towards.T) / np.maximum(both, 1), 1)
    for a, b in sorted(np.argwhere(share >= _CONFUSED).tolist(), key=lambda pair: -share[tuple(pair)]):
        mistaken = int(taken[a, b] + taken[b, a])
        rows = [np.where(support.labels == c, towards_others[:, d], -1).argmax() for c, d in ((a, b), (b, a))]
        examples = names[int(rows[0])], names[int(rows[1])]
        yield Confusion(classes[a], classes[b], int(both[a, b]), mistaken, float(share[a, b]), examples)


def _class_reports(
    support: SupportSet, classes: Sequence[Any], left_out: OutOfFold, rows: np.ndarray
) -> Iterator[ClassReport]:
    counts = support.counts
    distinct = left_out.folds.distinct
    variety = class_distances(rows, support, np.mean)
    if np.isfinite(variety).any():
        variety /= max(np.nanmedian(variety), _ROUNDING)
    usual = float(np.median(distinct[counts > 0])) if counts.any() else 0.0
    labels = left_out.labels
    right = np.bincount(labels[left_out.logits.argmax(1) == labels], minlength=len(counts))
    scored = np.bincount(labels, minlength=len(counts))
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
