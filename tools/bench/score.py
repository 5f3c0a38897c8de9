"""Scoring: our implementations against the papers' formula and against the best that PyTorch does without a kernel.

Each is checked against the float64 reference before it is timed, and refused if it is wrong.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from iosr_fast import dispatch
from iosr_fast.encoder import Embeddings
from iosr_fast.info import usable_threads
from iosr_fast.reference import score_reference
from iosr_fast.scoring import ScoringPlan, score, score_with_path
from tools.bench import harness

DEFAULT_CASES = ("q1-k1600-d512-c100", "q64-k1600-d512-c100", "q256-k16000-d512-c1000")
RIVALS = ("papers-formula", "eager-best")
# Of the largest logit. float32 is right to 1e-6 of it; anything wrong, or rounded to half precision, is far above.
TOLERANCE = 2e-5
VERIFIED_QUERIES = 16


@dataclass(frozen=True)
class Case:
    """q queries against k keys of c classes, in d channels."""

    queries: int
    keys: int
    width: int
    classes: int

    @classmethod
    def parse(cls, text: str) -> Case:
        match = re.fullmatch(r"q(\d+)-k(\d+)-d(\d+)-c(\d+)", text)
        if match is None:
            raise ValueError(f"expected a case like q256-k16000-d512-c1000, got {text!r}")
        case = cls(*map(int, match.groups()))
        if min(case.queries, case.keys, case.width, case.classes) < 1:
            raise ValueError(f"expected every size of a case to be at least 1, got {text!r}")
        return case

    @property
    def flops(self) -> float:
        """The two products that any implementation must do; exponentials and sums are not counted."""
        return 2.0 * self.queries * self.width * (self.keys + self.classes)

    def build(self) -> tuple[ScoringPlan, Embeddings]:
        """A Tip-Adapter++ plan over clustered embeddings, so that affinities spread over their range."""
        rng = np.random.default_rng(0)
        centres = rng.standard_normal((self.classes, self.width), dtype=np.float32)

        def near(labels: np.ndarray) -> np.ndarray:
            rows = centres[labels] + rng.standard_normal((len(labels), self.width), dtype=np.float32)
            return rows / np.linalg.norm(rows, axis=1, keepdims=True)

        labels = np.arange(self.keys) * self.classes // self.keys
        offsets = np.searchsorted(labels, np.arange(self.classes + 1))
        text = near(np.arange(self.classes))
        keys = near(labels)
        plan = ScoringPlan(self.classes, text, keys=keys, class_offsets=offsets, query="adapted", beta=5.5)
        asked = rng.integers(0, self.classes, self.queries)
        return plan, Embeddings(near(asked), near(asked))


def torch_rivals(plan: ScoringPlan, embeddings: Embeddings) -> dict[str, Callable[[], np.ndarray]]:
    """What PyTorch does without a kernel; whatever depends on the plan alone is made outside the timed part.

    papers-formula: a cosine GEMM, exp, and a GEMM with the one-hot matrix, as in the public code.
    eager-best: one GEMM, exp in place and a segment sum, every buffer kept between calls.
    """
    import torch

    assert plan.text is not None and plan.keys is not None and plan.class_offsets is not None
    assert embeddings.adapted is not None
    tensor = torch.from_numpy
    text, keys = tensor(plan.text.copy()).T, tensor(plan.keys.copy()).T
    lengths = tensor(np.diff(plan.class_offsets))
    labels = torch.repeat_interleave(torch.arange(plan.n_classes), lengths)
    onehot = torch.nn.functional.one_hot(labels, plan.n_classes).float()
    plain, query = tensor(embeddings.plain), tensor(embeddings.adapted)
    affinity = torch.empty(len(keys.T), len(query))
    logits = torch.empty(len(query), plan.n_classes)

    @torch.inference_mode()
    def papers_formula() -> np.ndarray:
        cosine = query @ keys
        cache_logits = ((-1) * (plan.beta - plan.beta * cosine)).exp() @ onehot
        return (plan.tau * plain @ text + cache_logits * plan.alpha).numpy()

    @torch.inference_mode()
    def eager_best() -> np.ndarray:
        torch.mm(keys.T, query.T, out=affinity)
        affinity.sub_(1.0).mul_(plan.beta).exp_()
        sums = torch.segment_reduce(affinity, "sum", lengths=lengths, axis=0, unsafe=True)
        torch.mm(plain, text, out=logits)
        return logits.mul_(plan.tau).add_(sums.T, alpha=plan.alpha).numpy()

    return {"papers-formula": papers_formula, "eager-best": eager_best}


def candidates(plan: ScoringPlan, embeddings: Embeddings) -> dict[str, Callable[[], np.ndarray]]:
    """Every implementation that can run here, under the path it took, and the rivals."""
    found: dict[str, Callable[[], np.ndarray]] = {}
    for row in dispatch.available():
        if row.refusal is None and row.name != "reference":
            path = score_with_path(plan, embeddings[:1], row.name)[1]
            found[path] = functools.partial(score, plan, embeddings, row.name)
    return {**found, **torch_rivals(plan, embeddings)}


def verify(name: str, logits: np.ndarray, plan: ScoringPlan, embeddings: Embeddings) -> None:
    """Raise ArithmeticError unless logits agree with the float64 reference, which scores a few queries of the batch."""
    chosen = np.unique(np.linspace(0, len(embeddings) - 1, VERIFIED_QUERIES).astype(int))
    truth = score_reference(plan, embeddings[chosen])
    error = np.abs(logits[chosen] - truth).max() / np.abs(truth).max()
    if logits.shape != (len(embeddings), plan.n_classes) or not error <= TOLERANCE:
        raise ArithmeticError(f"{name} is wrong by {error:.2g} of the largest logit (allowed: {TOLERANCE}); not timed")


def run(cases: Sequence[str] = DEFAULT_CASES, threads: int | None = None, repeats: int = 7) -> list[dict[str, Any]]:
    """Verify and time each case; one row a case and implementation."""
    threads = threads or usable_threads()
    made: list[dict[str, Any]] = []
    with harness.torch_threads(threads):
        ceiling = harness.gemm_ceiling_flops(threads)
        for text in cases:
            case = Case.parse(text)
            plan, embeddings = case.build()
            runs = candidates(plan, embeddings)
            for name, candidate in runs.items():
                verify(name, candidate(), plan, embeddings)
            made += harness.rows(
                "score",
                text,
                harness.measure(runs, repeats),
                rivals=RIVALS,
                threads={name: 1 if name.startswith("cpp/") else threads for name in runs},  # the kernel has no threads
                flops=case.flops,
                ceiling_flops=ceiling,
                packages=("numpy", "torch"),
            )
    return made
