"""Which scoring implementations exist here, why one is refused, and which one runs.

IOSR_FAST_IMPL=NAME forces one wherever the caller leaves the choice open; it fails loudly where it can't be met.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from iosr_fast.encoder import Embeddings
    from iosr_fast.scoring import ScoringPlan

    ScoreFunction = Callable[[ScoringPlan, Embeddings], tuple[np.ndarray, str]]

ENVIRONMENT = "IOSR_FAST_IMPL"
_log = logging.getLogger("iosr_fast")


@dataclass(frozen=True)
class Implementation:
    """One way to execute a ScoringPlan.

    `target` is "module:function", imported when chosen. `refusal` answers why it can't run here, or None where it can.
    `automatic` says whether "auto" may take it; the registry's order is the order of preference.
    """

    name: str
    target: str
    refusal: Callable[[], str | None]
    automatic: bool = True

    def load(self) -> ScoreFunction:
        module, function = self.target.split(":")
        loaded: ScoreFunction = getattr(importlib.import_module(module), function)
        return loaded


@dataclass(frozen=True)
class Availability:
    """A row of the table that `iosr-fast info` prints; `refusal` is None where the implementation can run."""

    name: str
    refusal: str | None


@functools.cache
def _cpp_refusal() -> str | None:
    try:
        from iosr_fast import _C
    except ImportError as error:
        return f"the extension iosr_fast._C can't be imported ({error}); `pip install .` builds it"
    from iosr_fast import __version__

    if _C.version != __version__:
        return f"iosr_fast._C was built for version {_C.version}, this is {__version__}; `pip install .` rebuilds it"
    return None


def _never() -> None:
    return None


# NumPy first: its BLAS outruns the scalar C++ kernel, which is the portable one (tools/benchmark.py score).
REGISTRY: tuple[Implementation, ...] = (
    Implementation("numpy", "iosr_fast.scoring:score_numpy", _never),
    Implementation("cpp", "iosr_fast.scoring:score_cpp", _cpp_refusal),
    Implementation("reference", "iosr_fast.scoring:score_reference", _never, automatic=False),
)


def available() -> list[Availability]:
    """Every implementation, in order of preference, with why it is refused here."""
    return [Availability(entry.name, entry.refusal()) for entry in REGISTRY]


def choose(impl: str = "auto") -> ScoreFunction:
    """The function that executes plans: the named implementation, or the best that can run here for "auto".

    IOSR_FAST_IMPL takes the place of "auto", never of a name that the caller gave. Raises ValueError for an unknown
    name and RuntimeError for a known one that can't run here.
    """
    forced = os.environ.get(ENVIRONMENT, "")
    asked_by = f"impl={impl!r}"
    if impl == "auto" and forced:
        impl, asked_by = forced, f"{ENVIRONMENT}={forced}"
    if impl == "auto":
        return _best()
    for entry in REGISTRY:
        if entry.name == impl:
            refusal = entry.refusal()
            if refusal is not None:
                raise RuntimeError(f"{asked_by} can't run here: {refusal}")
            return entry.load()
    names = ", ".join(["auto", *(entry.name for entry in REGISTRY)])
    raise ValueError(f"expected an implementation out of {names}, got {asked_by}")


@functools.cache
def _best() -> ScoreFunction:
    refused: list[str] = []
    for entry in REGISTRY:
        refusal = entry.refusal() if entry.automatic else "only on request"
        if refusal is None:
            _log.info("scoring with %s%s", entry.name, f" (refused: {'; '.join(refused)})" if refused else "")
            return entry.load()
        refused.append(f"{entry.name}: {refusal}")
    raise RuntimeError(f"no scoring implementation can run here: {'; '.join(refused)}")
