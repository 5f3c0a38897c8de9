"""The cost of a change of a running classifier as its cache grows: one example more, against fitting all of it again.

The new image is encoded outside the timed part. Verified first: logits after the change are those of a new plan.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from iosr_fast.benchmarks import harness
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods import METHODS
from iosr_fast.scoring.score import score
from iosr_fast.state.examples import Examples, join
from iosr_fast.state.method_config import MethodConfig
from iosr_fast.state.state import State
from iosr_fast.utils.machine import usable_threads

DEFAULT_CASES = (
    *(f"tip-adapter++-k{keys}" for keys in (1_000, 10_000, 100_000)),
    *("gda++-k1000", "gda++-k10000", "proker++-k1000", "proker++-k4000"),
)
RIVAL = "fit-again"
TAU = 100.0
# Of the largest logit.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """A method, k keys of c classes, d channels."""

    method: str
    keys: int
    classes: int = 100
    width: int = 512

    @classmethod
    def parse(cls, text: str) -> Case:
        """`tip-adapter++-k100000`, or with sizes, `gda-k10000-c1000-d512`."""
        match = re.fullmatch(rf"({'|'.join(map(re.escape, METHODS))})-k(\d+)(?:-c(\d+)-d(\d+))?", text)
        if match is None or not METHODS[match[1]].needs_support:
            raise IosrFastError(f"expected a case like tip-adapter++-k100000-c100-d512, got {text!r}")
        case = cls(match[1], *(int(size) for size in match.groups()[1:] if size is not None))
        if case.classes < 2 or case.keys < case.classes or case.width < 1:
            raise IosrFastError(f"expected at least two classes, a key of each and a channel, got {text!r}")
        return case

    def __str__(self) -> str:
        return f"{self.method}-k{self.keys}-c{self.classes}-d{self.width}"


def run(cases: Sequence[str] = DEFAULT_CASES, threads: int | None = None, repeats: int = 7) -> list[dict[str, Any]]:
    """Rows of every case: `add` and `remove` one example, `add-class` of one, and `fit-again` with one more."""
    rows = []
    for case in [Case.parse(text) for text in cases]:
        rows += _run_case(case, threads or usable_threads(), repeats)
    return rows


def _run_case(case: Case, threads: int, repeats: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    class_ids = np.sort(rng.integers(0, case.classes, case.keys - case.classes))
    class_ids = np.sort(np.concatenate([np.arange(case.classes), class_ids]))
    text = _unit(rng, case.classes, case.width)
    examples = _examples(rng, class_ids, 0, case.width)
    support = examples.as_support(range(case.classes), text, TAU)
    config = MethodConfig(case.method, dict(METHODS[case.method].parameters)).fitted(support)
    state = State.first([str(i) for i in range(case.classes)], text, TAU, examples, config)
    state = state.adding(_examples(rng, np.array([0]), state.next_example, case.width))  # moments are made once
    more = _examples(rng, np.array([1]), state.next_example, case.width)
    new = _examples(rng, np.array([state.next_class]), state.next_example, case.width)
    row = _unit(rng, 1, case.width)[0]

    def fit_again() -> Any:
        return config.compile(join([*state.segments, more]).as_support(range(case.classes), text, TAU))

    queries = Embeddings(_unit(rng, 8, case.width), _unit(rng, 8, case.width))
    got, expected = state.adding(more).score(queries), score(fit_again(), queries)
    error = float(np.abs(got - expected).max() / np.abs(expected).max())
    if not error <= TOLERANCE:
        raise ArithmeticError(f"{case}: expected logits within {TOLERANCE} of a new plan's, got {error:.2g}")
    candidates = {
        "add": lambda: state.adding(more),
        "add-class": lambda: state.adding_class("new", row, new),
        "remove": lambda: state.removing([case.keys // 2]),
        RIVAL: fit_again,
    }
    runtimes_ms = harness.measure(candidates, repeats)
    return harness.rows("updates", str(case), runtimes_ms, rivals=[RIVAL], threads=threads)


def _examples(rng: np.random.Generator, class_ids: np.ndarray, first: int, width: int) -> Examples:
    n = len(class_ids)
    embeddings = Embeddings(_unit(rng, n, width), _unit(rng, n, width))
    return Examples(embeddings, class_ids.astype(np.int64), np.arange(first, first + n), (None,) * n)


def _unit(rng: np.random.Generator, n: int, width: int) -> np.ndarray:
    rows = rng.standard_normal((n, width), dtype=np.float32)
    unit: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit
