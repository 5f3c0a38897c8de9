"""The evidence of a search in a manifest and in the audit log."""

from __future__ import annotations

import math
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods import METHODS
from iosr_fast.methods.tuning.tuned import Protocol, Tuned
from iosr_fast.scoring.reducers import NAME
from iosr_fast.utils.schema import Above0, Natural, Positive, Strict

_Share = Annotated[float, Meta(ge=0, le=1)]
_NonNegative = Annotated[float, Meta(ge=0)]
# What may be NaN in Tuned is null here.
_MAY_BE_NAN = ("accuracy", "search_accuracy")


class TunedFacts(Strict, frozen=True, kw_only=True):
    """A Tuned less `right`, `interval` and `stale`, which follow or are not kept."""

    method: str
    reducer: Annotated[str, Meta(pattern=rf"^({NAME})\Z")]
    parameters: dict[str, float]
    accuracy: _Share | None
    search_accuracy: _Share | None
    scored: Natural
    protocol: Protocol
    alpha_range: tuple[float, float] | None
    log_loss: _NonNegative | None
    factor: Above0
    settings: Natural
    seconds: _NonNegative
    note: Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f-\x9f]{0,2048}\Z")]
    shares: dict[str, _Share]
    version: Positive

    @classmethod
    def of(cls, tuned: Tuned) -> TunedFacts:
        """The facts of a search."""
        values: dict[str, Any] = {name: getattr(tuned, name) for name in cls.__struct_fields__}
        values |= {name: None if math.isnan(values[name]) else values[name] for name in _MAY_BE_NAN}
        return cls(**{**values, "parameters": dict(tuned.parameters), "shares": dict(tuned.shares)})

    def tuned(self) -> Tuned:
        """The inverse of `of`. Raises ValueError for a method or a number of images that no search gives."""
        if self.method not in METHODS:
            raise IosrFastError(f"expected tuned.method of {', '.join(METHODS)}, got {self.method!r}")
        if (self.accuracy is None) != (self.scored == 0):
            raise IosrFastError(f"expected tuned.accuracy if images were scored, got {self.accuracy} of {self.scored}")
        values = msgspec.structs.asdict(self)
        return Tuned(**{**values, **{name: math.nan for name in _MAY_BE_NAN if values[name] is None}})


def tuned_to_json(tuned: Tuned) -> dict[str, Any]:
    """JSON-ready facts."""
    facts: dict[str, Any] = msgspec.to_builtins(TunedFacts.of(tuned))
    return facts


def tuned_from_json(facts: Any) -> Tuned:
    """The inverse of `tuned_to_json`. Raises ValueError for facts that are not such."""
    return msgspec.convert(facts, TunedFacts).tuned()
