"""What a fit chose (Config), and how it is known that this is good (Evidence).

Both are typed once, for heads, the manifests of bundles, logs of changes and fingerprints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods import METHODS, Method, check_parameters, compile_method, fit_method_reducer
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.scoring.key_precision import Precision
from iosr_fast.scoring.plan import ScoringPlan, Which
from iosr_fast.scoring.reducers import NAME, Reducer
from iosr_fast.sealed.schema import Above0, Natural, Positive, Share, Strict, text_of

Protocol = Literal["loo", "validation", "one-shot", "cross-validation", "none"]
ReducerName = Annotated[str, Meta(pattern=rf"^({NAME})\Z")]
NonNegative = Annotated[float, Meta(ge=0)]
_QUANTILE = 1.959964  # of the standard normal distribution: 95% lie within


class Evidence(Strict, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """How right a chosen config is on held-out images. Fields that only earlier versions wrote are ignored.

    accuracy         the share of `scored` held-out images that are right if one half of them is judged with what the
                     other half chooses, parameters or weights, both ways: not the best of many tries. Images are left
                     out one by one, so look-alikes of one stay in: Head.summary has the accuracy of pictures of other
                     sessions. None where nothing was scored
    search_accuracy  the share that the parameters get right which all of these images chose: optimistic
    alpha_range      the widest plateau of best alphas for these other parameters; by leave-one-out alpha may lie beside
                     it
    log_loss         of the held-out images at the config, in nats; None if it was not computed
    protocol         "validation", "loo" (one image of each class left out at a time, near duplicates together),
                     "one-shot" (nothing can be left out: one_shot_parameters), "cross-validation" (scikit-learn's),
                     "none"
    settings         combinations of the parameters but alpha that were tried, with every alpha for each
    note             what a user has to know of the choice: texts or images that have no effect; or ""
    shares           of a stack: what texts, pictures and the adapter contribute to the logits; the sum is 1
    version, stale   the version of the classifier that was tuned, and whether the classifier has changed since

    >>> Evidence(accuracy=0.9, scored=40, protocol="loo").summary()
    'chosen by 40 left-out images'
    """

    accuracy: Share | None = None
    scored: Natural = 0
    protocol: Protocol = "none"
    search_accuracy: Share | None = None
    alpha_range: tuple[float, float] | None = None
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
        if self.accuracy is None:
            text = "a rule of thumb: nothing could be left out to judge it"
        elif self.protocol == "loo":
            text = f"chosen by {self.scored} left-out images"
        else:
            low, high = wilson(self.accuracy, self.scored)
            text = f"{self.accuracy:.1%} of {self.scored} validation images right (95%: {low:.0%} to {high:.0%})"
        stale = f"as of version {self.version}; the classifier has changed since" if self.stale else ""
        return "; ".join(filter(None, (text, self.note, stale)))


class Config(Strict, frozen=True, kw_only=True):
    """A method and how it is set.

    parameters     all of the method's, alpha included
    reducer        the name of the one that is fitted on the support images (scoring.reducers.fit_reducer)
    factor         multiplies the logits, which calibrates probabilities and changes no label
    key_precision  of the cache keys
    look_alikes    whether images of a class that look alike are left out together (folds.make_folds)
    evidence       of the search that chose parameters; None if there was none. "tuned" in files

    >>> Config(method="gda", parameters={"alpha": 0.5}).which
    'plain'
    """

    method: str
    parameters: dict[str, float] = msgspec.field(default_factory=dict)
    reducer: ReducerName = "none"
    factor: Above0 = 1.0
    key_precision: Precision = "fp32"
    look_alikes: bool = True
    evidence: Evidence | None = msgspec.field(default=None, name="tuned")

    @property
    def entry(self) -> Method:
        """The method of this name."""
        return METHODS[self.method]

    @property
    def which(self) -> Which:
        """Which embeddings of support images and queries it compares."""
        return self.entry.which

    @property
    def text_weight(self) -> float:
        """What multiplies tau <plain, text> in the logits."""
        return self.factor * self.parameters.get("text", 1.0)

    def fit_reducer(self, support: SupportSet) -> Reducer | None:
        """The reducer, fitted on the support images."""
        return fit_method_reducer(self.entry, self.reducer, support)

    def compile(self, support: SupportSet, reducer: Reducer | str | None = None) -> ScoringPlan:
        """The plan of a support set, with a fitted reducer; None fits it."""
        fitted = self.reducer if reducer is None else reducer
        plan = compile_method(self.method, support, reducer=fitted, **self.parameters).scaled(self.factor)
        return self.with_keys(plan)

    def with_keys(self, plan: ScoringPlan) -> ScoringPlan:
        """The plan with its keys in `key_precision`."""
        return plan if plan.keys is None else plan.with_key_precision(self.key_precision)

    def check(self, version: int) -> None:
        """Raise IosrFastError for a method, parameters and evidence that no fit and no change up to this version
        gives."""
        parameters = check_parameters(self.method, **self.parameters)
        if missing := sorted(set(METHODS[self.method].parameters) - set(parameters)):
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
