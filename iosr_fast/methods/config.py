"""What a fit is asked for and what it chose (Config), and how it is known that this is good (Evidence).

Both are typed once, for estimators, heads, the manifests of bundles, logs of changes and fingerprints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self

import msgspec
import numpy as np
from msgspec import Meta

from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.papers import MAX_KEYS, METHODS, Method
from iosr_fast.methods.support_set import SupportSet, image_rows
from iosr_fast.scoring.key_precision import KeyPrecision
from iosr_fast.scoring.plan import ScoringPlan, Which
from iosr_fast.scoring.reducers import NAME, Reducer, fit_reducer
from iosr_fast.sealed.schema import Above0, Natural, Positive, Share, Strict, text_of
from iosr_fast.utils.text import abbreviate, did_you_mean

AUTO = "auto"
Protocol = Literal["loo", "validation", "one-shot", "cross-validation", "none"]
ReducerName = Annotated[str, Meta(pattern=rf"^({NAME})\Z")]
NonNegative = Annotated[float, Meta(ge=0)]
_QUANTILE = 1.959964  # of the standard normal distribution: 95% lie within


class Evidence(Strict, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """How right a chosen config is on held-out images. Fields that only earlier versions wrote are ignored.

    accuracy        the share of `scored` held-out images that are right if one half of them is judged with what the
                    other half chooses, parameters or weights, both ways: not the best of many tries. Images are left
                    out one by one, so look-alikes of one stay in: Head.summary has the accuracy of pictures of other
                    sessions. None where nothing was scored
    average_precision  of several labels a picture, the mean over the classes that have two images, of left-out images
    log_loss        of the held-out images at the config, in nats; None if it was not computed
    protocol        "validation", "loo" (one image of each class left out at a time, near duplicates together),
                    "one-shot" (nothing can be left out: tune.one_shot_parameters), "cross-validation" (scikit-learn's),
                    "none"
    settings        combinations of the parameters but alpha that were tried, with every alpha for each
    note            what a user has to know of the choice: texts or images that have no effect; or ""
    shares          of a stack: what texts, pictures and the adapter contribute to the logits; the sum is 1
    version, stale  the version of the classifier that was tuned, and whether the classifier has changed since

    >>> Evidence(accuracy=0.9, scored=40, protocol="loo").summary()
    'chosen by 40 left-out images'
    """

    accuracy: Share | None = None
    scored: Natural = 0
    protocol: Protocol = "none"
    average_precision: Share | None = None
    log_loss: NonNegative | None = None
    settings: Natural = 0
    seconds: NonNegative = 0.0
    note: Annotated[str, text_of(2048)] = ""
    shares: dict[str, Share] = msgspec.field(default_factory=dict)
    version: Positive = 1
    stale: bool = False

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the accuracy lies with 95% confidence (`wilson`); None if no image was scored."""
        return None if self.accuracy is None else wilson(self.accuracy, self.scored)

    def summary(self) -> str:
        """The evidence in one line. Of left-out images the accuracy is that of Head.summary, which leaves look-alikes
        out together."""
        if self.average_precision is not None:
            text = f"mean average precision {self.average_precision:.1%} of left-out images"
        elif self.accuracy is None:
            text = "a rule of thumb: nothing could be left out to judge it"
        elif self.protocol == "loo":
            text = f"chosen by {self.scored} left-out images"
        else:
            low, high = wilson(self.accuracy, self.scored)
            text = f"{self.accuracy:.1%} of {self.scored} validation images right (95%: {low:.0%} to {high:.0%})"
        stale = f"as of version {self.version}; the classifier has changed since" if self.stale else ""
        return "; ".join(filter(None, (text, self.note, stale)))


class Config(Strict, frozen=True, kw_only=True):
    """A method and how it is set: before a fit as it is asked for, then as it was chosen.

    method         a name of METHODS, or, asked for, "auto": the stack
    parameters     all of the method's, alpha included; asked for, those that are given, or none if they are searched
    reducer        the name of the one that is fitted on the support images (scoring.reducers.fit_reducer)
    factor         multiplies the logits, which calibrates probabilities and changes no label
    key_precision  of the cache keys; None is fp32, and half precision on a GPU (scoring.half_plan)
    look_alikes    whether images of a class that look alike are left out together (folds.make_folds)
    evidence       of the search that chose parameters; None if there was none. "tuned" in files

    >>> Config(method="gda", parameters={"alpha": 0.5}).which
    'plain'
    """

    method: str
    parameters: dict[str, float] = msgspec.field(default_factory=dict)
    reducer: ReducerName = "none"
    factor: Above0 = 1.0
    key_precision: KeyPrecision | None = None
    look_alikes: bool = True
    evidence: Evidence | None = msgspec.field(default=None, name="tuned")

    @property
    def entry(self) -> Method:
        """The method of this name. Raises IosrFastError for an unknown one."""
        entry = METHODS.get(self.method)
        if entry is None:
            names = [AUTO, *METHODS]
            mistyped = did_you_mean(str(self.method), names)
            raise IosrFastError(f"{mistyped}expected a method of {', '.join(names)}, got {self.method!r}")
        return entry

    @property
    def which(self) -> Which:
        """Which embeddings of support images and queries it compares."""
        return self.entry.which

    @property
    def text_weight(self) -> float:
        """What multiplies tau <plain, text> in the logits."""
        return self.factor * self.parameters.get("text", 1.0)

    @property
    def complete(self) -> Self:
        """With all parameters of the method; one that is missing takes its default. Raises IosrFastError for an unknown
        method, a parameter that it does not have, a value out of range, and a reducer of a stack."""
        entry = self.entry
        parameters = {**entry.parameters, **entry.check(self.parameters)}
        if entry.is_stack and self.reducer != "none":
            raise IosrFastError(f"{self.method} takes no reducer, got {self.reducer!r}")
        return msgspec.structs.replace(self, parameters=parameters)

    def fit_reducer(self, support: SupportSet) -> Reducer | None:
        """The reducer, fitted on the embeddings that the method compares; None if it compares no images."""
        if not self.entry.takes_reducer:
            return None
        return fit_reducer(self.reducer, image_rows(support.embeddings, self.which, None))

    def compile(self, support: SupportSet, reducer: Reducer | None = None) -> ScoringPlan:
        """The plan of a support set, with a fitted reducer; None fits it.

        Raises IosrFastError as `complete`, and if the support set lacks what the method needs (`unavailable_reason`).

        >>> from iosr_fast import Embeddings, score
        >>> from iosr_fast.methods.support_set import make_support_set
        >>> images = Embeddings(np.eye(4, dtype=np.float32)[:3])
        >>> support = make_support_set(images, labels=np.array([0, 0, 1]), text=np.eye(2, 4), tau=10.0)
        >>> plan = Config(method="tip-adapter", parameters={"beta": 3.0}, reducer="centre").compile(support)
        >>> plan.alpha, plan.beta, plan.keys.shape
        (1.0, 3.0, (3, 4))
        >>> score(plan, images).argmax(1)
        array([0, 1, 1])
        """
        config = self.complete
        if (reason := config.unavailable_reason(support)) is not None:
            raise IosrFastError(reason)
        fitted = self.fit_reducer(support) if reducer is None else reducer
        return self.with_keys(self.entry.compile(support, fitted, config.parameters).scaled(self.factor))

    def with_keys(self, plan: ScoringPlan) -> ScoringPlan:
        """The plan with its keys in `key_precision`."""
        narrow = self.key_precision
        return plan if plan.keys is None or narrow is None else plan.with_key_precision(narrow)

    def unavailable_reason(self, support: SupportSet) -> str | None:
        """Why the method can't serve a support set with its parameters; None if it can."""
        if support.owners is not None and (reason := self._against_label_sets(support)) is not None:
            return reason
        return self.reason_against(support.counts, support.text is not None, support.embeddings.adapted is not None)

    @property
    def multi_label_reason(self) -> str | None:
        """Why it can't learn from images with several labels; None if it can.

        >>> Config(method="gda++").multi_label_reason
        "gda++ can't learn from several labels an image: its formula has one label an image; use 'auto'"
        """
        if self.method in METHODS and not self.entry.takes_label_sets:
            return (
                f"{self.method} can't learn from several labels an image: its formula has one label an image; use "
                "'auto'"
            )
        if self.reducer != "none":
            return f"several labels an image take no reducer, got {self.reducer!r}: leave it out"
        return None

    def _against_label_sets(self, support: SupportSet) -> str | None:
        """What images with any number of labels lack for it."""
        if (reason := self.multi_label_reason) is not None:
            return reason
        n_images = len(support.embeddings)
        if not support.n_classes:
            return "several labels an image: expected labels of at least one class, got empty sets alone"
        if not 2 <= n_images <= MAX_KEYS:
            return f"several labels an image: expected 2 to {MAX_KEYS} support images, got {n_images}"
        if self.entry.needs_support and len(empty := np.flatnonzero(support.counts == 0)):
            columns = abbreviate([str(column) for column in empty])
            return f"{self.method} needs at least one image of each class, got none of the classes at {columns}"
        return None

    def reason_against(
        self, counts: np.ndarray, has_text: bool = True, has_adapted: bool = True, names: Sequence[str] = ()
    ) -> str | None:
        """As unavailable_reason, of classes with `counts` (C,) images, with texts and adapted embeddings or without. A
        fit gives the `names` (C,) of its classes and needs an image of each; changes may leave a class without."""
        entry = METHODS["stack"] if self.method == AUTO else self.entry
        n_images = int(counts.sum())
        n_empty = int((counts == 0).sum())
        if entry.needs_text and not has_text:
            return (
                f"{self.method} compares images with texts, and there are no text embeddings: take a CLIP, or in "
                "FewShotHead give text=, an array (C, D)"
            )
        if entry.needs_support and names and n_empty:
            listed = abbreviate([name for name, count in zip(names, counts, strict=True) if not count])
            return f"{self.method} needs at least one image of each class, got none of {listed}"
        if entry.needs_support and n_images == 0:
            return f"{self.method} needs support images, got none; give a few a class, or use method='zero-shot'"
        if entry.needs_adapter and not has_adapted:
            return (
                f"{self.method} compares adapted embeddings, and there are none: use "
                f"{self.method.removesuffix('++')!r}, an encoder with an adapter, or in FewShotHead adapted=True and X "
                "of (n, 2 D)"
            )
        if entry.needs_every_class and n_empty:
            return f"{self.method} needs at least one image of each class, got none of {n_empty} classes"
        if entry.max_support is None or n_images <= entry.max_support:
            return None
        if not entry.is_stack:
            return f"{self.method}: expected at most {entry.max_support} support images, got {n_images}"
        if self.parameters.get("regression") or self.parameters.get("text_regression"):
            return (
                f"the stack's regression: expected at most {entry.max_support} support images, got {n_images}; tune "
                "the classifier again, which leaves the regression out, or choose another method"
            )
        return None

    def check(self, version: int) -> None:
        """Raise IosrFastError for a method, parameters and evidence that no fit and no change up to this version
        gives."""
        parameters = self.entry.check(self.parameters)
        if missing := sorted(set(self.entry.parameters) - set(parameters)):
            raise IosrFastError(f"expected the parameters {', '.join(missing)} of {self.method}, got none of that name")
        if (evidence := self.evidence) is None:
            return
        if evidence.version > version:
            raise IosrFastError(f"expected tuned.version up to version, {version}, got {evidence.version}")
        if (evidence.accuracy is None) != (evidence.scored == 0):
            raise IosrFastError(
                f"expected tuned.accuracy if images were scored, got {evidence.accuracy} of {evidence.scored}"
            )


def wilson(share: float, count: float) -> tuple[float, float]:
    """The 95% interval of a share of `count` independent trials.

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), z = 1.96 (Wilson, 1927): sound for small
    counts and for shares of 0 and 1.

    >>> [round(end, 3) for end in wilson(1.0, 10)]
    [0.722, 1.0]
    """
    z2 = _QUANTILE**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    half = (share * (1 - share) * z2 + z2 * z2 / 4) ** 0.5 / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def describe_shares(shares: Mapping[str, float]) -> str:
    """Evidence.shares in words, without a part that a classifier does not have.

    >>> describe_shares({"text": 0.25, "pictures": 0.75, "adapter": 0.0})
    'texts 25%, pictures 75%'
    """
    words = {"text": "texts", "pictures": "pictures", "adapter": "adapter"}
    return ", ".join(f"{words[name]} {share:.0%}" for name, share in shares.items() if share > 0)
