"""Which methods a source is evaluated with, and what their parameters are chosen on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from iosr_fast.evaluation.rivals import DEFAULT_RIVALS, RIVALS, rival_unavailable_reason
from iosr_fast.evaluation.tasks import Source, Task
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods import METHODS, unavailable_reason
from iosr_fast.methods.tuning.tune import AUTO
from iosr_fast.scoring.isoclip import check_projections
from iosr_fast.scoring.reducers import check_reducer

TuneOn = Literal["validation", "loo"]
# Words of --methods that stand for several.
GROUPS = {"all": (*METHODS, AUTO, *DEFAULT_RIVALS), "scikit-learn": tuple(RIVALS)}


@dataclass(frozen=True)
class Options:
    """Of `iosr-fast evaluate`; None for the default.

    `report` is called with a line as soon as there is one to tell.
    """

    methods: Sequence[str] | None = None
    reducers: Sequence[str] | None = None
    tune: TuneOn | None = None
    report: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class Selection:
    """(method, reducer) of each row, the reason of each method left out, and what parameters are chosen on."""

    rows: tuple[tuple[str, str], ...]
    left_out: Mapping[str, str]
    tune_on: TuneOn


def select(source: Source, options: Options, methods: Sequence[str], reducers: Sequence[str]) -> Selection:
    """The rows that `source` allows; `methods` and `reducers` are the defaults.

    Raises IosrFastError for unknown names, a reducer that needs what the source lacks, if the source allows no method,
    or for --tune validation without a validation set.
    """
    reducers = options.reducers or reducers
    for reducer in reducers:
        check_reducer(reducer)
    names = method_names(options.methods or methods, GROUPS)
    sample = source.draw(max(source.shots), source.seeds[0])
    for reducer in reducers:
        check_projections(reducer, sample.support.projections)
    left_out = unavailable_methods(names, sample)
    rows = table_rows([name for name in names if name not in left_out], reducers)
    if not rows:
        reasons = "; ".join(left_out.values())
        raise IosrFastError(f"{source.name}: expected a method that the data allows, got none: {reasons}")
    if options.tune == "validation" and sample.validation is None:
        raise IosrFastError(
            f"{source.name}: expected data with a validation set for --tune validation, got none; use --tune loo"
        )
    return Selection(tuple(rows), left_out, options.tune or ("loo" if sample.validation is None else "validation"))


def method_names(words: Sequence[str], groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The methods of --methods, each once; a word may be a group of them. Raises IosrFastError for an unknown name."""
    names = list(dict.fromkeys(name for word in words for name in groups.get(word, (word,))))
    known = [*groups, AUTO, *METHODS]
    if unknown := [name for name in names if name not in known and not any(name in group for group in groups.values())]:
        raise IosrFastError(f"expected --methods of {', '.join(known)}; got {', '.join(unknown)}")
    return names


def table_rows(names: Sequence[str], reducers: Sequence[str]) -> list[tuple[str, str]]:
    """(method, reducer) of every row: auto chooses its reducer, a method without support images has none."""
    rows = [
        (name, reducer)
        for name in names
        for reducer in (
            [AUTO] if name == AUTO else reducers if name in METHODS and METHODS[name].reducible else ["none"]
        )
    ]
    return list(dict.fromkeys(rows))


def unavailable_methods(names: Sequence[str], task: Task) -> dict[str, str]:
    """Why the task allows no plan, for each method that it does not allow."""
    reasons = {name: why_unavailable(name, task) for name in names}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def why_unavailable(name: str, task: Task) -> str | None:
    if name in RIVALS:
        return rival_unavailable_reason(name, task.support)
    return None if name == AUTO else unavailable_reason(name, task.support)
