"""How support images become logits: a method, its parameters and its fitted reducer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from iosr_fast.methods import METHODS, compile_method, fit_method_reducer, unavailable_reason
from iosr_fast.methods.out_of_fold import calibrate
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.methods.tune import AUTO
from iosr_fast.methods.tune import tune as search
from iosr_fast.methods.tuned import Tuned
from iosr_fast.scoring.plan import ScoringPlan, Which
from iosr_fast.scoring.precision import Precision
from iosr_fast.scoring.reducers import Reducer


@dataclass(frozen=True, eq=False)
class MethodConfig:
    """A method with its parameters. `reducer` is fitted when they are chosen and stays until the next choice; `factor`
    multiplies the logits; `key_precision` is that of the cache keys; `tuned` is the search that chose the parameters,
    if there was one."""

    method: str
    parameters: dict[str, float]
    reducer_name: str = "none"
    reducer: Reducer | None = None
    factor: float = 1.0
    key_precision: Precision = "fp32"
    tuned: Tuned | None = None

    @classmethod
    def of(cls, tuned: Tuned, key_precision: Precision) -> MethodConfig:
        """The choice of a search; its reducer is not fitted yet."""
        evidence = None if tuned.protocol == "none" else tuned
        return cls(tuned.method, dict(tuned.parameters), tuned.reducer, None, tuned.factor, key_precision, evidence)

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


def is_searched(method: str, tune: str | None, parameters: Mapping[str, float]) -> bool:
    """Whether a fit chooses its parameters on the support images; the arguments are those of `check_choice`."""
    return method == AUTO or tune == "loo" or (tune is None and not parameters)


def choose_config(
    method: str,
    support: SupportSet,
    *,
    reducer: str | None,
    tune: str | None,
    parameters: Mapping[str, float],
    key_precision: Precision,
    seconds: float,
) -> MethodConfig:
    """The config of a fit, its reducer fitted on the support images, and `tuned` if parameters were searched.

    `method`, `reducer`, `tune` and `parameters` are those that `check_choice` has checked; `seconds` is the budget of
    the search (tune.tune). Parameters that are given keep the labels, and the factor is fitted (out_of_fold.calibrate);
    with tune="none" nothing is fitted.
    """
    if is_searched(method, tune, parameters) and len(support.embeddings):
        tuned = search(method, support, reducer=reducer or "none", seconds=seconds)
        return MethodConfig.of(tuned, key_precision).fitted(support)
    given, parameters = bool(parameters), {**METHODS[method].parameters, **parameters}
    config = MethodConfig(method, parameters, reducer or "none", key_precision=key_precision).fitted(support)
    if tune == "none" or not given or not len(support.embeddings) or unavailable_reason(method, support) is not None:
        return config
    factor = calibrate(METHODS[method], support, config.reducer, parameters)
    return replace(config, factor=factor)
