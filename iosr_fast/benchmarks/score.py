"""Scoring: our implementations, at each precision of the keys, against what PyTorch does without a kernel.

Each is checked against the float64 reference before it is timed, and refused if it is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from iosr_fast.benchmarks import harness
from iosr_fast.benchmarks.ceilings import Ceilings
from iosr_fast.benchmarks.devices import Device
from iosr_fast.benchmarks.score_rivals import LAUNCH, PRODUCTS, RIVALS, torch_rivals
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.scoring import dispatch
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.precision import PRECISIONS, Precision
from iosr_fast.scoring.reference import score_reference
from iosr_fast.scoring.score import score
from iosr_fast.scoring.scorer import Scorer
from iosr_fast.utils.machine import usable_threads

DEFAULT_CASES = (
    "q1-k1600-d512-c100",
    "q64-k1600-d512-c100",
    "q256-k16000-d512-c1000",
    "q1-k1000000-d512-c1000",
)
GPU_CASES = (
    "q256-k16000-d512-c1000",
    "q4096-k160000-d768-c10000",
    "q1-k1000000-d512-c1000",
    "q1-k1600-d512-c100",
    "q1024-k50000-d512-c999",  # classes of 50 or 51 keys
)
SMALL_CASES = ("q5-k123-d72-c7", "q33-k160-d64-c10")  # for compute-sanitizer, which takes a hundred times as long
# Of the largest logit. float32 is right to 1e-6 of it. On a GPU queries take the half type of the keys, which costs up
# to 4e-4 (fp16) and 2e-3 (bf16); without one of 16 keys of each class logits are off by 4e-2.
TOLERANCE, GPU_RIVAL_TOLERANCE = 2e-5, 1e-2
GPU_TOLERANCES = {"fp32": 1e-4, "fp16": 1e-3, "bf16": 4e-3, "int8": 1e-3}
VERIFIED = 16  # queries, and classes
PUBLIC = "score()"
CHUNK = 65536
KEY_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
OUT_OF_CACHE = 256e6  # bytes: more than the last-level caches of a few cores


@dataclass(frozen=True)
class Case:
    """q queries against k keys of c classes, in d channels."""

    queries: int
    keys: int
    width: int
    classes: int

    @classmethod
    def parse(cls, text: str) -> Case:
        return cls(*harness.parse_case(text, "qkdc", "q256-k16000-d512-c1000"))

    def __str__(self) -> str:
        return f"q{self.queries}-k{self.keys}-d{self.width}-c{self.classes}"

    @property
    def flops(self) -> float:
        """The two products that any implementation must do, without exponentials and sums."""
        return 2.0 * self.queries * self.width * (self.keys + self.classes)

    @property
    def product_flops(self) -> float:
        """The product of queries and keys alone."""
        return 2.0 * self.queries * self.width * self.keys

    @property
    def balance(self) -> float:
        """An alpha by which the cache term of a query's own class is as large as its text term."""
        return 1000.0 * self.classes / self.keys

    def build(self, alpha: float = 1.0) -> tuple[ScoringPlan, Embeddings]:
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
        plan = ScoringPlan(self.classes, text, keys=keys, class_offsets=offsets, query="adapted", alpha=alpha, beta=5.5)
        query_labels = rng.integers(0, self.classes, self.queries)
        return plan, Embeddings(near(query_labels), near(query_labels))


@dataclass(frozen=True)
class Candidate:
    """`call` returns logits of `plan`, whose keys are in `precision`; the product alone where it is not `verified`."""

    call: Callable[[], Any]
    plan: ScoringPlan
    precision: str
    verified: bool = True


def ours(
    plan: ScoringPlan, embeddings: Embeddings, device: Device, precisions: Iterable[Precision] = PRECISIONS
) -> dict[str, Candidate]:
    """Every implementation that runs natively on `device`, at every one of `precisions` with code of its own.

    Each is timed as a Classifier holds it, bound by Scorer; PUBLIC is the function, which chooses at every call.
    On a GPU, keys of half precision and int8 meet float32 queries and (":q16") float16 ones, checks are off.
    """
    batches = {"": embeddings}
    if device.is_gpu:
        import torch

        arrays = (embeddings.plain, embeddings.adapted)
        rows = [torch.from_numpy(np.array(array)).to(device.torch) for array in arrays]
        batches = {"": Embeddings(*rows), ":q16": Embeddings(*(row.half() for row in rows))}
    candidates: dict[str, Candidate] = {}
    for precision in precisions:
        # Codes are as fast whatever their values, and compensation takes a minute for a million keys.
        narrow = plan if precision == "fp32" else plan.with_key_precision(precision, compensate=False)
        if precision == "int8":
            # Codes of embeddings come with a transform; these keys are too alike in all directions to get one.
            narrow = replace(narrow, query_transform=np.eye(plan.width))
        for entry in dispatch.REGISTRY:
            if entry.name == "reference" or device.torch not in entry.native or entry.unavailable_reason() is not None:
                continue
            # NumPy and PyTorch widen narrow keys tile by tile on the CPU, which is not meant to be fast.
            if not device.is_gpu and entry.name != "cpp" and precision != "fp32":
                continue
            if device.is_gpu and entry.kind != "tensors":
                continue
            for suffix, batch in batches.items():
                if suffix and precision == "fp32":
                    continue
                scorer = Scorer(narrow, entry.name)
                path = entry.name if device.is_gpu else scorer.with_path(batch[:1])[1]
                name = path + ("" if precision == "fp32" else f":{precision}") + suffix
                candidates[name] = Candidate(partial(scorer, batch, check=not device.is_gpu), narrow, precision)
    if not device.is_gpu:
        candidates[PUBLIC] = Candidate(partial(score, plan, embeddings), plan, "fp32")
    return candidates


def rivals(plan: ScoringPlan, embeddings: Embeddings, device: Device) -> dict[str, Candidate]:
    precision = "fp16" if device.is_gpu else "fp32"
    return {
        name: Candidate(call, plan, "fp32" if name == "torch-fp32" else precision, verified=name not in PRODUCTS)
        for name, call in torch_rivals(plan, embeddings, device).items()
    }


def error_of(candidate: Candidate, embeddings: Embeddings) -> float:
    """Largest difference from the float64 reference over the largest logit; infinite for a wrong shape or no numbers.

    A logit depends on the keys of its class alone, so the reference scores a few queries against a few classes, those
    of the queries' nearest texts among them, which have the largest cache terms.
    """
    logits = candidate.call()
    logits = logits if isinstance(logits, np.ndarray) else logits.float().cpu().numpy()
    plan = candidate.plan
    if logits.shape != (len(embeddings), plan.n_classes) or not np.isfinite(logits).all():
        return float("inf")
    queries = np.unique(np.linspace(0, len(embeddings) - 1, VERIFIED).astype(int))
    assert plan.text is not None
    nearest = (embeddings[queries].plain @ plan.text.T).argmax(axis=1)
    classes = np.unique([*np.linspace(0, plan.n_classes - 1, VERIFIED).astype(int), *nearest])
    truth = score_reference(only_classes(plan, classes), embeddings[queries])
    return float(np.abs(logits[np.ix_(queries, classes)] - truth).max() / np.abs(truth).max())


def verify(name: str, candidate: Candidate, embeddings: Embeddings, tolerance: float = TOLERANCE) -> None:
    """Raise ArithmeticError unless logits agree with the float64 reference."""
    if candidate.verified and not (error := error_of(candidate, embeddings)) <= tolerance:
        raise ArithmeticError(f"{name} is wrong by {error:.2g} of the largest logit (allowed: {tolerance}); not timed")


def describe(name: str, error: Exception) -> str:
    """A line on what went wrong with a candidate."""
    if isinstance(error, ArithmeticError):
        return str(error)
    return f"{name}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def only_classes(plan: ScoringPlan, classes: np.ndarray) -> ScoringPlan:
    """The plan of some classes and their keys."""
    assert plan.text is not None and plan.keys is not None and plan.class_offsets is not None
    ranges = [np.arange(*plan.class_offsets[c : c + 2]) for c in classes]
    rows = np.concatenate(ranges)
    few: dict[str, Any] = dict.fromkeys(("keys", "class_offsets", "key_scales", "query_transform"))
    if len(rows):
        few = {"keys": plan.keys[rows], "class_offsets": np.cumsum([0, *map(len, ranges)])}
        few["key_scales"] = None if plan.key_scales is None else plan.key_scales[rows]
    return replace(plan, n_classes=len(classes), text=plan.text[classes], **few)


def run(
    cases: Sequence[str] | None = None,
    threads: int | None = None,
    repeats: int = 7,
    device: str = "cpu",
    wanted: Callable[[str], bool] = lambda name: True,
) -> list[dict[str, Any]]:
    """Verify and time each case; one row a case and implementation that is `wanted`.

    rate is of the products' FLOP and its ceiling that of a GEMM; or, of one query against more keys than the caches
    hold, of the bytes that are read, and its ceiling that of reading or copying memory. extra_memory_mb is what a call
    takes beside its inputs and its (B, C) logits; None where it isn't measured.
    """
    threads = threads or usable_threads()
    target = Device(device)
    ceilings = Ceilings(target, threads)
    rows: list[dict[str, Any]] = []
    with harness.torch_threads(threads):
        for text in cases or (GPU_CASES if target.is_gpu else DEFAULT_CASES):
            rows += _run_case(Case.parse(text), ceilings, repeats, wanted)
    return rows


def _run_case(case: Case, ceilings: Ceilings, repeats: int, wanted: Callable[[str], bool]) -> list[dict[str, Any]]:
    device = ceilings.device
    plan, embeddings = case.build(case.balance if device.is_gpu else 1.0)
    candidates = {**ours(plan, embeddings, device), **rivals(plan, embeddings, device)}
    for entry in dispatch.REGISTRY if device.name == "cuda" else ():
        if "cuda" in entry.native and (reason := entry.unavailable_reason()) is not None:
            print(f"left out: {case}: {entry.name}: {reason}")
    if "papers-formula" not in candidates:
        print(f"left out: {case}: papers-formula, its one-hot matrix and affinity would take too much memory")
    candidates, launches = _verified(case, {n: c for n, c in candidates.items() if wanted(n)}, embeddings, device)
    runtimes_ms = device.measure({name: candidate.call for name, candidate in candidates.items()}, repeats)
    working = {name: candidate for name, candidate in candidates.items() if name != LAUNCH}
    by_bytes = case.queries == 1 and (device.is_gpu or 4 * case.keys * case.width > OUT_OF_CACHE)
    if by_bytes:
        work = {name: KEY_BYTES[c.precision] * case.keys * case.width / 1e9 for name, c in working.items()}
        ceiling = dict.fromkeys(candidates, ceilings.bytes_per_s / 1e9)
    else:
        work = {name: (case.flops if c.verified else case.product_flops) / 1e9 for name, c in working.items()}
        ceiling = {name: ceilings.gemm_flops(c.precision) / 1e9 for name, c in candidates.items()}
    rows = harness.rows(
        "score",
        str(case),
        runtimes_ms,
        rivals=[name for name in RIVALS if name in candidates],
        threads=ceilings.threads,
        precision={name: candidate.precision for name, candidate in candidates.items()},
        work=work,
        rate_unit="GB/s" if by_bytes else "GFLOP/s",
        ceiling=ceiling,
        packages=("numpy", "torch", *(["triton"] if device.is_gpu else [])),
        device=device.description,
        extra={name: {"launch": launch} for name, launch in launches.items()} if device.is_gpu else None,
    )
    logits_mb = 4 * case.queries * case.classes / 1e6
    for row in rows:
        extra = None if device.is_gpu else harness.extra_memory_mb(candidates[row["impl"]].call)
        row["extra_memory_mb"] = None if extra is None else round(max(0.0, extra - logits_mb), 1)
    return rows


def _verified(
    case: Case, candidates: dict[str, Candidate], embeddings: Embeddings, device: Device
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """The candidates as they are timed, without wrong ones, and how each is launched. On a CPU a wrong one is an error;
    on a GPU one of ours is reported, and a rival left out, as PyTorch's segment sums lose digits in float16 there."""
    right: dict[str, Candidate] = {}
    launches: dict[str, str] = {}
    for name, candidate in candidates.items():
        try:
            call, launches[name] = device.record(candidate.call)
            recorded = replace(candidate, call=call)
            of_a_gpu = GPU_RIVAL_TOLERANCE if name in RIVALS else GPU_TOLERANCES[candidate.precision]
            verify(name, recorded, embeddings, of_a_gpu if device.is_gpu else TOLERANCE)
            right[name] = recorded
        except Exception as error:  # also of compilers, which raise what they like
            if not device.is_gpu:
                raise
            print(f"{'left out' if name in RIVALS else 'WRONG'}: {case}: {describe(name, error)}")
    return right, launches
