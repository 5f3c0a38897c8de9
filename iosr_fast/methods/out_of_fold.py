"""The out-of-fold logits of a classifier, from which all it says of itself follows; and the factor of its logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from iosr_fast.methods.folds import Folds, make_folds
from iosr_fast.methods.held_out import HeldOut, spread_of_others
from iosr_fast.methods.log_loss import fit_factor, spread
from iosr_fast.methods.papers import Method
from iosr_fast.methods.stack_weights import one_shot_weights
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.scoring.reducers import Reducer

# Images that are left out: one number is fitted.
_ENOUGH = 1000
# Beyond these numbers of support images leaving some out takes more than seconds.
_MOST = 100_000
_MOST_SOLVED = 3000


@dataclass(frozen=True, eq=False)
class OutOfFold:
    """The logits (V, C) float32 of the support images `folds.rows`, whose labels (V,) they have not seen: each by the
    classifier fitted without the images of its fold, at the spread of the classifier in use."""

    folds: Folds
    labels: np.ndarray
    logits: np.ndarray

    @classmethod
    def of(cls, held_out: HeldOut, logits: np.ndarray) -> OutOfFold | None:
        """Of a search; None where a validation set judged it."""
        if held_out.folds is None:
            return None
        # A copy of the folds, without the support sets that a search has kept with them.
        return cls(replace(held_out.folds), held_out.labels, logits.astype(np.float32))

    def by_image(self) -> np.ndarray:
        """(N, C): the logits of every support image; NaN for one that is never left out."""
        logits = np.full((len(self.folds.fold), self.logits.shape[1]), np.nan, np.float32)
        logits[self.folds.rows] = self.logits
        return logits


def out_of_fold(
    method: Method,
    support: SupportSet,
    reducer: Reducer | None,
    parameters: Mapping[str, float],
    factor: float = 1.0,
) -> OutOfFold:
    """The out-of-fold logits of a method with these parameters and a factor of its logits."""
    folds = make_folds(support)
    held_out = HeldOut.of_support(support, folds)
    logits = factor * held_out.logits(method.terms(support, reducer, parameters))
    return OutOfFold(replace(folds), held_out.labels, logits.astype(np.float32))


def calibrate(method: Method, support: SupportSet, reducer: Reducer | None, parameters: Mapping[str, float]) -> float:
    """The factor of the logits at all parameters. It minimises the log-loss of left-out support images
    (log_loss.fit_factor), of about 1,000 at most. If none can be left out, or if that takes more than seconds, it is
    `usual_factor`.
    """
    if len(support.embeddings) <= (_MOST_SOLVED if method.family in ("values", "stack") else _MOST):
        held_out = HeldOut.of_support(support, make_folds(support).first(_ENOUGH))
        if len(held_out.labels):
            logits = held_out.logits(method.terms(support, reducer, parameters))
            return fit_factor(logits, held_out.labels)[0]
    return usual_factor(method, support, reducer, parameters)


def usual_factor(
    method: Method, support: SupportSet, reducer: Reducer | None, parameters: Mapping[str, float]
) -> float:
    """The factor that gives the logits of the support images the spread that a stack's have at one image a class:
    t + g, with its weights t of the texts and g of the images (stack_weights.one_shot_weights), over the
    classes that are not an image's own. 1 if the logits are constant over classes.
    """
    rows = np.zeros(len(support.embeddings), bool)
    rows[support.class_offsets[:-1][support.counts > 0]] = True
    terms = method.terms(support, reducer, parameters)
    logits = np.sum([weight * model.scores(support.as_queries[rows]) for weight, model in terms], axis=0)
    if not spread(logits):
        return 1.0
    weights = one_shot_weights(support.only(rows), ["plain"])
    images = weights["regression" if support.text is None else "discriminant"]
    return (weights.get("text", 0.0) + images) / spread_of_others(logits, support.labels[rows])


def note_of_folds(held_out: HeldOut) -> str:
    """A note on what leaving out does not judge, or judges together; "" if there is nothing."""
    if (folds := held_out.folds) is None:
        return ""
    single = int((folds.distinct == 1).sum())
    count = int(held_out.support.counts.sum() - folds.distinct.sum())
    notes = []
    if len(held_out.labels) and single:
        classes = f"{single} of {held_out.support.n_classes} classes {'has' if single == 1 else 'have'}"
        notes.append(f"{classes} a single image, which can't be left out: no image of theirs is judged")
    if count:
        images = "1 image is a near duplicate" if count == 1 else f"{count} images are near duplicates"
        notes.append(f"{images} of others of the same class and left out together with them")
    return "; ".join(notes)
