"""Embeddings to logits: our backends at each precision of the keys, against what PyTorch does without a kernel. A case
with "-values" has keys with dense values, as "auto" compiles to, with "-linear" its linear term, too; others have a
class for each key.

Each is checked against the float64 reference before it is timed. rate is of the products' FLOP and its ceiling that of
a matrix product; or, of one query against more keys than the caches hold, of the bytes that are read, and its ceiling
that of reading memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from benchmarks import ceilings
from benchmarks.devices import Call, Device
from benchmarks.harness import Candidate, Run, no_check, ready
from benchmarks.score_rivals import PRODUCTS, torch_rivals
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.scoring import dispatch
from iosr_fast.scoring.key_precision import PRECISIONS
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reference import score_reference
from iosr_fast.scoring.score import score_with_path

DEFAULT = "default"
SMALL, BATCH, MANY_KEYS = "q1-k1600-d512-c100-values", "q256-k8192-d512-c1000-values", "q1-k1000000-d512-c1000"
BY_CLASS = "q256-k16000-d512-c1000"
DEFAULT_CASES = {
    "cpu": (
        *(SMALL, "q64-k1600-d512-c100-values", "q32-k6400-d768-c400-values", "q1-k8192-d512-c1000-values", BATCH),
        *("q1-k1600-d512-c100", BY_CLASS, MANY_KEYS),
    ),
    # The classes of the last one have 50 or 51 keys.
    "cuda": (
        SMALL,
        BATCH,
        f"{BATCH}-linear",
        BY_CLASS,
        "q4096-k160000-d768-c10000",
        MANY_KEYS,
        "q1024-k50000-d512-c999",
    ),
}
# Of the largest logit. float32 is right to 1e-6 of it. On a GPU queries take the half type of the keys, which costs up
# to 4e-4 (fp16) and 2e-3 (bf16); without one of 16 keys of each class logits are off by 4e-2, without 8 of
# 8,192 keys with values by 2e-2.
TOLERANCE, GPU_RIVAL_TOLERANCE = 2e-5, 1e-2
GPU_TOLERANCES = {"fp32": 1e-4, "fp16": 1e-3, "bf16": 4e-3, "int8": 1e-3}
VERIFIED = 16  # queries, and classes
CHUNK = 65536
KEY_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
OUT_OF_CACHE = 256e6  # bytes: more than the last-level caches of a few cores


@dataclass(frozen=True)
class Case:
    """q queries against k keys of c classes, in d channels; with `values`, each key has one for each class, and with
    `linear` there is a linear term of both embeddings, as in the default's plan."""

    queries: int
    keys: int
    width: int
    classes: int
    values: bool = False
    linear: bool = False

    @classmethod
    def parse(cls, text: str) -> Case:
        found = re.fullmatch("q{0}-k{0}-d{0}-c{0}(-values)?(-linear)?".format("([1-9][0-9]*)"), text)
        if found is None:
            raise IosrFastError(
                "expected a case like q256-k16000-d512-c1000 or q1-k64-d8-c4-values-linear, sizes of at least 1, got "
                f"{text!r}"
            )
        return cls(*map(int, found.groups()[:4]), values=found[5] is not None, linear=found[6] is not None)

    @property
    def gflop(self) -> float:
        """The products that any implementation must do: with texts, of linear terms, with keys, with values. Without
        exponentials and sums."""
        of_values = self.keys * self.classes if self.values else 0
        rows = self.keys + self.classes * (3 if self.linear else 1)
        return 2e-9 * self.queries * (self.width * rows + of_values)

    def gigabytes(self, precision: str) -> float:
        """Of the keys and values that are read."""
        value_bytes = self.classes * (2 if precision in ("fp16", "int8") else 4) if self.values else 0
        return self.keys * (KEY_BYTES[precision] * self.width + value_bytes) / 1e9

    def build(self) -> tuple[ScoringPlan, Embeddings]:
        """A plan over clustered embeddings, so that affinities spread over their range; an alpha by which the cache
        term is as large as that of texts, or a few missing keys would change no logit by more than rounding does."""
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
        cache: dict[str, Any] = {"class_offsets": offsets}
        alpha = 1000.0 * self.classes / self.keys
        if self.values:  # of the size that kernel ridge regression gives
            cache = {"values": rng.standard_normal((self.keys, self.classes), dtype=np.float32) / np.sqrt(self.keys)}
            alpha *= np.sqrt(self.keys)
        if self.linear:
            weights = 10.0 * rng.standard_normal((self.classes, 2 * self.width), dtype=np.float32)
            cache |= {"linear": weights, "feature": "both"}
        plan = ScoringPlan(self.classes, text, keys=keys, query="adapted", alpha=alpha, beta=5.5, **cache)
        query_labels = rng.integers(0, self.classes, self.queries)
        return plan, Embeddings(near(query_labels), near(query_labels))


def run(run: Run, case: Sequence[str] | None = None) -> None:
    """Verify and time each case."""
    for text in case or DEFAULT_CASES[run.device.name]:
        one = Case.parse(text)
        by_bytes = one.queries == 1 and (run.device.is_gpu or 1e9 * one.gigabytes("fp32") > OUT_OF_CACHE)
        packages = ("numpy", "torch", *(["triton"] if run.device.is_gpu else []))
        run.case(text, dict(_candidates(one, run, by_bytes)), "GB/s" if by_bytes else "GFLOP/s", packages)


def _candidates(case: Case, run: Run, by_bytes: bool) -> Iterator[tuple[str, Candidate]]:
    device = run.device
    plan, embeddings = case.build()
    plan_in = cache(lambda kind: plan if kind == DEFAULT else plan.with_key_precision(kind))
    if by_bytes:
        yield ceilings.MEMORY, ceilings.memory(device)
    else:
        for precision in ceilings.DTYPES if device.is_gpu else ("fp32",):
            suffix = f"-{precision}" if device.is_gpu else ""
            yield ceilings.GEMM + suffix, ceilings.gemm(device, run.threads, precision)
    if device.is_gpu:
        yield ceilings.LAUNCH, ceilings.launch(device)

    def candidate(precision: str, prepare: Callable[[], Call], check: Callable[[Any], Any], **facts: Any) -> Candidate:
        top = ceilings.MEMORY if by_bytes else ceilings.GEMM
        if device.is_gpu and not by_bytes:
            top += f"-{'fp16' if precision == 'int8' else precision}"
        work = case.gigabytes(precision) if by_bytes else case.gflop
        return Candidate(prepare, check, **{"work": work, "precision": precision, "ceiling": top} | facts)

    def check(kind: str, tolerance: float, result: tuple[Any, str]) -> dict[str, Any]:
        verify(result[0], plan_in(kind), embeddings, tolerance)
        return {"impl": named(result[1], kind)}

    for backend, kind, prepare in ours(plan_in, embeddings, device, run.say):
        precision = "fp16" if kind == DEFAULT else kind
        tolerance = GPU_TOLERANCES[precision] if device.is_gpu else TOLERANCE
        yield named(backend, kind), candidate(precision, prepare, partial(check, kind, tolerance))
    rivals = torch_rivals(plan, embeddings, device)
    if plan.values is None and "papers-formula" not in rivals:
        run.say("left out: papers-formula: its one-hot matrix and affinity would take too much memory")
    for name, call in rivals.items():
        precision = "fp16" if device.is_gpu and name != "torch-fp32" else "fp32"
        tolerance = GPU_RIVAL_TOLERANCE if device.is_gpu else TOLERANCE
        if name in PRODUCTS:  # no logits
            product = case.gigabytes(precision) if by_bytes else 2e-9 * case.queries * case.width * case.keys
            yield name, candidate(precision, ready(call), no_check, work=product, rival=True)
        else:

            def right(logits: Any, tolerance: float = tolerance) -> dict[str, Any]:
                verify(logits, plan, embeddings, tolerance)
                return {}

            yield name, candidate(precision, ready(call), right, rival=True)


def named(path: str, kind: str) -> str:
    """A row's `impl`: "cpp/avx512:int8"."""
    return path if kind == "fp32" else f"{path}:{kind}"


def ours(
    plan_in: Callable[[str], ScoringPlan], embeddings: Embeddings, device: Device, say: Callable[[str], None]
) -> Iterator[tuple[str, str, Callable[[], Call]]]:
    """Every backend that runs natively on `device`, at every precision of the keys, or on the CPU at those that it has
    code for: its name, the precision, and what prepares a call, which returns logits and path. DEFAULT is the plan that
    names no precision, on a GPU."""
    batch = embeddings
    if device.is_gpu:
        arrays = (embeddings.plain, embeddings.adapted)
        batch = Embeddings(*(torch.from_numpy(np.array(array)).to(device.name) for array in arrays))

    def prepare(backend: str, kind: str) -> Call:
        return partial(score_with_path, plan_in(kind), batch, backend, check=not device.is_gpu)

    for backend in dispatch.BACKENDS:
        takes = device.name in backend.devices and backend.takes(len(batch)) and (backend.tensors or not device.is_gpu)
        if backend.name == "reference" or not takes:
            continue
        if (reason := backend.unavailable_reason()) is not None:
            say(f"left out: {backend.name}: {reason}")
            continue
        # PyTorch widens narrow keys tile by tile on the CPU, which is not meant to be fast.
        for kind in (DEFAULT, *PRECISIONS) if device.is_gpu else PRECISIONS[: 1 if backend.tensors else None]:
            yield backend.name, kind, partial(prepare, backend.name, kind)


def verify(logits: Any, plan: ScoringPlan, embeddings: Embeddings, tolerance: float = TOLERANCE) -> None:
    """Raise ArithmeticError unless the largest difference from the float64 reference is within `tolerance` of the
    largest logit.

    A logit depends on the keys of its class alone, so the reference scores a few queries against a few classes, those
    of the queries' nearest texts among them, which have the largest cache terms.
    """
    logits = logits if isinstance(logits, np.ndarray) else logits.float().cpu().numpy()
    if logits.shape != (len(embeddings), plan.n_classes) or not np.isfinite(logits).all():
        raise ArithmeticError(f"expected finite logits {(len(embeddings), plan.n_classes)}, got {logits.shape}")
    queries = np.unique(np.linspace(0, len(embeddings) - 1, VERIFIED).astype(int))
    assert plan.text is not None
    nearest = (embeddings[queries].plain @ plan.text.T).argmax(axis=1)
    classes = np.unique([*np.linspace(0, plan.n_classes - 1, VERIFIED).astype(int), *nearest])
    truth = score_reference(only_classes(plan, classes), embeddings[queries])
    error = float(np.abs(logits[np.ix_(queries, classes)] - truth).max() / np.abs(truth).max())
    if not error <= tolerance:
        raise ArithmeticError(f"wrong by {error:.2g} of the largest logit (allowed: {tolerance})")


def only_classes(plan: ScoringPlan, classes: np.ndarray) -> ScoringPlan:
    """The plan of some classes, in ascending order, and their keys, or values."""
    assert plan.text is not None and plan.keys is not None
    linear = None if plan.linear is None else plan.linear[classes]
    few = partial(replace, plan, n_classes=len(classes), text=plan.text[classes], linear=linear)
    if plan.values is not None:
        return few(values=plan.values[:, classes])
    assert plan.class_offsets is not None
    counts = np.diff(plan.class_offsets)
    rows = np.flatnonzero(np.isin(np.repeat(np.arange(plan.n_classes), counts), classes))
    scales = None if plan.key_scales is None else plan.key_scales[rows]
    return few(keys=plan.keys[rows], key_scales=scales, class_offsets=np.cumsum([0, *counts[classes]]))
