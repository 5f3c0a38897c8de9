"""How support images become logits: a method, its parameters and its fitted reducer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods import METHODS, compile_method, fit_method_reducer, unavailable_reason
from iosr_fast.methods.multi_label import multi_label_reason
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.methods.tune import AUTO, MAX_TUNE_SECONDS, calibrate, check_choice
from iosr_fast.methods.tune import tune as search
from iosr_fast.methods.tuned import Tuned
from iosr_fast.scoring.key_precision import Precision, check_precision
from iosr_fast.scoring.plan import ScoringPlan, Which
from iosr_fast.scoring.reducers import Reducer
from iosr_fast.scoring.validation import check_number


@dataclass(frozen=True, eq=False)
class MethodConfig:
    """A method with its parameters. `reducer` is fitted when they are chosen and stays until the next choice; `factor`
    multiplies the logits; `key_precision` is that of the cache keys; `tuned` is the search that chose the parameters,
    if there was one; `look_alikes` says whether images of a class that look alike are left out together
    (folds.make_folds)."""

    method: str
    parameters: dict[str, float]
    reducer_name: str = "none"
    reducer: Reducer | None = None
    factor: float = 1.0
    key_precision: Precision = "fp32"
    tuned: Tuned | None = None
    look_alikes: bool = True

    @classmethod
    def of(cls, tuned: Tuned, key_precision: Precision, look_alikes: bool) -> MethodConfig:
        """The choice of a search; its reducer is not fitted yet."""
        evidence = None if tuned.protocol == "none" else tuned
        chosen = tuned.method, dict(tuned.parameters), tuned.reducer, None, tuned.factor
        return cls(*chosen, key_precision, evidence, look_alikes)

    def fitted(self, support: SupportSet) -> MethodConfig:
        """With the reducer fitted on the support images."""
        return replace(self, reducer=fit_method_reducer(METHODS[self.method], self.reducer_name, support))

    @property
    def which(self) -> Which:
        """Which embeddings of support images and queries it compares."""
        return METHODS[self.method].which

    @property
    def text_weight(self) -> float:
        """What multiplies tau <plain, text> in the logits."""
        return self.factor * self.parameters.get("text", 1.0)

    def compile(self, support: SupportSet) -> ScoringPlan:
        """The whole plan of a support set."""
        plan = compile_method(self.method, support, reducer=self.reducer, **self.parameters).scaled(self.factor)
        return plan if plan.keys is None else plan.with_key_precision(self.key_precision)


@dataclass(frozen=True)
class MethodChoice:
    """The parameters of Classifier and FewShotHead that choose a method, checked; `seconds` is the budget of a
    search."""

    method: str
    reducer: str | None
    tune: str | None
    parameters: dict[str, float]
    key_precision: Precision
    seconds: float
    look_alikes: bool

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> MethodChoice:
        """From all parameters of an estimator. Raises IosrFastError for one that is unknown, out of range, given where
        it is to be chosen, or none of the method's (tune.check_choice)."""
        method, reducer, tune = (given[name] for name in ("method", "reducer", "tune"))
        values = {name: given[name] for name in ("alpha", "beta", "gamma", "ridge")}
        parameters = check_choice(method, reducer, tune, **values)
        seconds = check_number("tune_seconds", given["tune_seconds"], 0.0, MAX_TUNE_SECONDS)
        precision, look_alikes = check_precision(given["key_precision"]), given["look_alikes"]
        if not isinstance(look_alikes, bool):
            raise IosrFastError(f"expected look_alikes to be True or False, got {look_alikes!r}")
        return cls(method, reducer, tune, parameters, precision, seconds, look_alikes)

    @property
    def searched(self) -> bool:
        """Whether a fit chooses parameters on the support images."""
        return self.method == AUTO or self.tune == "loo" or (self.tune is None and not self.parameters)

    def check_several(self, unknown_images: Any) -> None:
        """Raise IosrFastError where the method, a reducer or unknown images don't go with several labels a picture."""
        if (reason := multi_label_reason(self.method, self.reducer)) is not None:
            raise IosrFastError(reason)
        if unknown_images is not None:
            raise IosrFastError("several labels a picture take no unknown_images: give them as pictures of no label")

    def config(self, support: SupportSet) -> MethodConfig:
        """The config of a fit, its reducer fitted on the support images, and `tuned` if parameters were searched.

        Parameters that are given keep the labels, and the factor is fitted (tune.calibrate); with tune="none"
        nothing is fitted.
        """
        method, there = self.method, bool(len(support.embeddings))
        if self.searched and there:
            tuned = search(method, support, reducer=self.reducer or "none", seconds=self.seconds)
            return MethodConfig.of(tuned, self.key_precision, self.look_alikes).fitted(support)
        values = {**METHODS[method].parameters, **self.parameters}
        config = MethodConfig(
            method, values, self.reducer or "none", key_precision=self.key_precision, look_alikes=self.look_alikes
        ).fitted(support)
        if self.tune == "none" or not (self.parameters and there) or unavailable_reason(method, support) is not None:
            return config
        return replace(config, factor=calibrate(METHODS[method], support, config.reducer, values))
