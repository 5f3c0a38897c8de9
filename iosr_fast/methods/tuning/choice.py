"""What a caller chooses of a method and what is searched for, checked before any work."""

from __future__ import annotations

from typing import Literal

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods import check_parameters
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.methods.tuning.auto import tune_auto
from iosr_fast.methods.tuning.tune import Tuned, tune
from iosr_fast.scoring.reducers import check_reducer


def check_choice(method: str, reducer: str | None, tuning: str | None, **parameters: float | None) -> dict[str, float]:
    """The parameters that are given. Raises ValueError where they, method, reducer and tuning don't go together."""
    if reducer is not None:
        check_reducer(reducer)
    if tuning not in (None, "loo", "loo-single", "none"):
        raise ValueError(f"expected tune to be 'loo', 'loo-single' or 'none', got {tuning!r}")
    if method != "auto":
        given = check_parameters(method, **parameters)
        if given and tuning in ("loo", "loo-single"):
            raise ValueError(f"expected parameters or tune={tuning!r}, got both; leave {', '.join(given)} out")
        return given
    named = [name for name, value in {**parameters, "reducer": reducer}.items() if value is not None]
    if named or tuning not in (None, "loo"):
        told = ", ".join(named) or f"tune={tuning!r}"
        raise ValueError(f"method 'auto' chooses by leave-one-out: leave {told} out, or name a method")
    return {}


def search(
    method: str,
    support: SupportSet,
    reducer: str | None,
    tuning: str | None,
    queries: Embeddings | None = None,
    ids: np.ndarray | None = None,
) -> Tuned:
    """The best setting by leave-one-out, or on validation queries with their class ids."""
    if method == "auto":
        return tune_auto(support, queries, ids)
    protocol: Literal["loo", "loo-single"] = "loo-single" if tuning == "loo-single" else "loo"
    return tune(method, support, queries, ids, protocol, reducer or "none")
