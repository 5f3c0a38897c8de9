"""Scoring: our implementations, at each precision of the keys, against what PyTorch does without a kernel.

Each is checked against the float64 reference before it is timed, and refused if it is wrong.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.scoring import dispatch
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.precision import PRECISIONS
from iosr_fast.scoring.reference import score_reference
from iosr_fast.scoring.score import score_with_path
from iosr_fast.utils.machine import usable_threads
from tools.bench import harness
from tools.bench.score_rivals import PAPERS_LIMIT_BYTES, RIVALS, onehot_bytes, torch_rivals

DEFAULT_CASES = (
    "q1-k1600-d512-c100",
    "q64-k1600-d512-c100",
    "q256-k16000-d512-c1000",
    "q1-k1000000-d512-c1000",
)
# Of the largest logit. float32 is right to 1e-6 of it. Queries in half precision, as on a GPU, err by 1e-3 of a cosine.
TOLERANCES = {"cpu": 2e-5, "cuda": 2e-3}
VERIFIED = 16  # queries, and classes
CHUNK = 65536
KEY_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
OUT_OF_CACHE = 256e6  # bytes: above what the last caches of a few cores hold


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

    @property
    def product_flops(self) -> float:
        """The product of queries and keys alone."""
        return 2.0 * self.queries * self.width * self.keys

    def build(self) -> tuple[ScoringPlan, Embeddings]:
        """A Tip-Adapter++ plan over clustered embeddings, so that affinities spread over their range."""
        rng = np.random.default_rng(0)
        centres = rng.standard_normal((self.classes, self.width), dtype=np.float32)

        def near(labels: np.ndarray) -> np.ndarray:
            rows = np.empty((len(labels), self.width), np.float32)
            for first in range(0, len(labels), CHUNK):
                part = centres[labels[first : first + CHUNK]]
                part += rng.standard_normal(part.shape, dtype=np.float32)
                part /= np.linalg.norm(part, axis=1, keepdims=True)
                rows[first : first + CHUNK] = part
            rows.flags.writeable = False  # so that a plan takes them without a copy
            return rows

        labels = np.arange(self.keys) * self.classes // self.keys
        offsets = np.searchsorted(labels, np.arange(self.classes + 1))
        text = near(np.arange(self.classes))
        keys = near(labels)
        plan = ScoringPlan(self.classes, text, keys=keys, class_offsets=offsets, query="adapted", beta=5.5)
        asked = rng.integers(0, self.classes, self.queries)
        return plan, Embeddings(near(asked), near(asked))


@dataclass(frozen=True)
class Candidate:
    """What is timed. `plan` has the keys that it reads, `call` gives logits, or a rival's product alone."""

    call: Callable[[], Any]
    plan: ScoringPlan
    precision: str
    verified: bool = True


def ours(plan: ScoringPlan, embeddings: Embeddings, device: str) -> dict[str, Candidate]:
    """Every implementation that runs natively on `device`, at every precision that it takes apart from the others."""
    batch = embeddings
    if device == "cuda":
        import torch

        batch = Embeddings(*(torch.from_numpy(np.array(e)).cuda() for e in (embeddings.plain, embeddings.adapted)))
    found: dict[str, Candidate] = {}
    for precision in PRECISIONS:
        # Codes are as fast whatever they say, and compensation takes a minute for a million keys.
        narrow = plan if precision == "fp32" else plan.with_key_precision(precision, compensate=False)
        if precision == "int8":
            # Embeddings' codes come with a transform; these keys are too alike in all directions to get one.
            narrow = replace(narrow, query_transform=np.eye(plan.width))
        for entry in dispatch.REGISTRY:
            # NumPy and PyTorch widen narrow keys tile by tile on the CPU: nobody would ask for that to be fast.
            widened = device == "cpu" and entry.name != "cpp" and precision != "fp32"
            skipped = entry.name == "reference" or widened
            if skipped or device not in entry.native or entry.unavailable_reason() is not None:
                continue
            path = score_with_path(narrow, batch[:1], entry.name)[1] if device == "cpu" else entry.name
            name = path if precision == "fp32" else f"{path}:{precision}"
            found[name] = Candidate(_call(narrow, batch, entry.name), narrow, precision)
    return found


def _call(plan: ScoringPlan, batch: Embeddings, impl: str) -> Callable[[], Any]:
    return lambda: score_with_path(plan, batch, impl)[0]


def rivals(plan: ScoringPlan, embeddings: Embeddings, device: str) -> dict[str, Candidate]:
    precision = "fp32" if device == "cpu" else "fp16"
    return {
        name: Candidate(call, plan, "fp32" if name == "torch-fp32" else precision, verified=name != "torch-fp32")
        for name, call in torch_rivals(plan, embeddings, device).items()
    }


def verify(name: str, candidate: Candidate, embeddings: Embeddings, device: str = "cpu") -> None:
    """Raise ArithmeticError unless logits agree with the float64 reference.

    A logit depends on the keys of its own class alone, so the reference scores a few queries against a few classes.
    """
    logits = candidate.call()
    logits = logits if isinstance(logits, np.ndarray) else logits.float().cpu().numpy()
    plan = candidate.plan
    queries = np.unique(np.linspace(0, len(embeddings) - 1, VERIFIED).astype(int))
    classes = np.unique(np.linspace(0, plan.n_classes - 1, VERIFIED).astype(int))
    truth = score_reference(only_classes(plan, classes), embeddings[queries])
    if logits.shape != (len(embeddings), plan.n_classes):
        raise ArithmeticError(f"{name} gave logits of shape {logits.shape}; not timed")
    error = np.abs(logits[np.ix_(queries, classes)] - truth).max() / np.abs(truth).max()
    if not (error <= TOLERANCES[device] and np.isfinite(logits).all()):
        raise ArithmeticError(
            f"{name} is wrong by {error:.2g} of the largest logit (allowed: {TOLERANCES[device]}); not timed"
        )


def only_classes(plan: ScoringPlan, classes: np.ndarray) -> ScoringPlan:
    """The plan of some classes and their keys."""
    assert plan.text is not None and plan.keys is not None and plan.class_offsets is not None
    ranges = [np.arange(*plan.class_offsets[c : c + 2]) for c in classes]
    rows = np.concatenate(ranges)
    text = plan.text[classes]
    if len(rows) == 0:
        return replace(
            plan,
            n_classes=len(classes),
            text=text,
            keys=None,
            class_offsets=None,
            key_scales=None,
            query_transform=None,
        )
    return replace(
        plan,
        n_classes=len(classes),
        text=text,
        keys=plan.keys[rows],
        class_offsets=np.cumsum([0, *map(len, ranges)]),
        key_scales=None if plan.key_scales is None else plan.key_scales[rows],
    )


def run(
    cases: Sequence[str] = DEFAULT_CASES,
    threads: int | None = None,
    repeats: int = 7,
    device: str = "cpu",
    bench: str = "score",
    wanted: Callable[[str], bool] = lambda name: True,
) -> list[dict[str, Any]]:
    """Verify and time each case; one row a case and implementation that is `wanted`.

    rate is of the products' FLOP and its ceiling that of a GEMM; or, of one query on a CPU against more keys than its
    caches hold, of the bytes that are read, and its ceiling that of a plain sum over as much memory.
    extra_memory_mb is what a call takes beside its inputs and its (B, C) logits; None where it isn't measured.
    """
    threads = threads or usable_threads()
    made: list[dict[str, Any]] = []
    with harness.torch_threads(threads):
        ceiling = harness.gemm_ceiling_flops(threads) if device == "cpu" else None
        bandwidth: float | None = None
        for text in cases:
            case = Case.parse(text)
            plan, embeddings = case.build()
            runs = {**ours(plan, embeddings, device), **rivals(plan, embeddings, device)}
            if "papers-formula" not in runs:
                size = onehot_bytes(plan, case.queries) / 1e9
                print(
                    f"{text}: papers-formula is left out, its one-hot matrix and affinity would take {size:.1f} GB "
                    f"(limit: {PAPERS_LIMIT_BYTES / 1e9:.0f})"
                )
            runs = {name: candidate for name, candidate in runs.items() if wanted(name)}
            for name, candidate in list(runs.items()):
                try:
                    if candidate.verified:
                        verify(name, candidate, embeddings, device)
                except ArithmeticError as error:
                    # PyTorch's segment sums on a GPU lose digits in fp16. On a CPU nothing excuses a wrong rival.
                    if device == "cpu" or name not in RIVALS:
                        raise
                    print(f"{text}: {error}")
                    del runs[name]
            runtimes_ms = harness.measure(
                {name: _timed(candidate, device) for name, candidate in runs.items()}, repeats
            )
            work: dict[str, Any] = {
                "flops": {name: case.flops if c.verified else case.product_flops for name, c in runs.items()},
                "ceiling_flops": ceiling,
            }
            if device == "cpu" and case.queries == 1 and 4 * case.keys * case.width > OUT_OF_CACHE:
                bandwidth = bandwidth or harness.memory_bandwidth(threads)
                seconds = {name: statistics.median(times) / 1e3 for name, times in runtimes_ms.items()}
                read = {name: KEY_BYTES[c.precision] * case.keys * case.width for name, c in runs.items()}
                rates = {name: read[name] / seconds[name] / 1e9 for name in runs}
                work = {"rates": rates, "rate_unit": "GB/s", "ceiling": bandwidth / 1e9}
            rows = harness.rows(
                bench,
                text,
                runtimes_ms,
                rivals=[name for name in RIVALS if name in runs],
                threads=threads,
                precision={name: candidate.precision for name, candidate in runs.items()},
                **work,
                packages=("numpy", "torch") if device == "cpu" else ("torch", "triton"),
                device=None if device == "cpu" else _gpu_name(),
            )
            logits_mb = 4 * case.queries * case.classes / 1e6
            for row in rows:
                extra = harness.extra_memory_mb(runs[row["impl"]].call) if device == "cpu" else None
                row["extra_memory_mb"] = None if extra is None else round(max(0.0, extra - logits_mb), 1)
            made += rows
    return made


def _timed(candidate: Candidate, device: str) -> Callable[[], Any]:
    if device == "cpu":
        return candidate.call
    import torch

    def synchronised() -> None:
        candidate.call()
        torch.cuda.synchronize()

    return synchronised


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()
