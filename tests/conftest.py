"""Shared by the tests: plans and embeddings to score, and a clean choice of backend for each test."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import iosr_fast
from iosr_fast.backbones.demo import pictures
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.scoring import dispatch
from iosr_fast.scoring.key_precision import KeyPrecision
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reducers import Reducer
from tests import ROOT
from tests import demo_cache as shared

# An installed package contains kernels/; a source tree has it beside iosr_fast/.
iosr_fast.__path__.append(str(ROOT))
# Decoding the demo's sheets takes a second, and every fifth file asks for them.
pictures.load_pictures = functools.cache(pictures.load_pictures)

TERMS = ("text", "cache", "linear")
REDUCERS = ("centre", "projection", "diagonal")
# What random_plan is told of plans with more than their terms; a method names what is like the plans that it compiles.
EXTENDED: dict[str, dict[str, Any]] = {
    **{name: {"reducer": name} for name in REDUCERS},
    "values": {"dense": True},
    "values alone": {"dense": True, "terms": ("cache",), "query": "plain"},
    "values unweighted": {"dense": True, "weighted": False, "terms": ("text", "cache")},
    "distribution": {"feature": "text-distribution", "terms": ("text", "linear")},
    "both": {"feature": "both", "terms": ("linear",)},
    "both and values": {"feature": "both", "dense": True, "query": "plain", "weighted": False, "beta": 1.0},
    "both reduced": {"feature": "both", "reducer": "centre"},
    "gda": {"reducer": "centre", "feature": "adapted", "terms": ("text", "linear")},
    "tip-x": {"reducer": "centre", "feature": "text-distribution", "weighted": False},
    "ape": {"reducer": "diagonal", "query": "plain", "terms": ("text", "cache")},
    "proker": {"reducer": "projection", "dense": True, "weighted": False, "terms": ("text", "cache"), "beta": 1.0},
    "multi-label": {"dense": True, "weighted": False, "terms": ("text", "cache", "bias"), "query": "plain"},
    "all": {"reducer": "projection", "dense": True, "feature": "text-distribution"},
}


def unit_rows(rng: np.random.Generator, n: int, width: int) -> np.ndarray:
    """n random unit rows, float32."""
    rows = rng.standard_normal((n, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def random_reducer(rng: np.random.Generator, kind: str, width: int) -> Reducer:
    """centre: a shift; projection: a shift and a (D, D) matrix; diagonal: channels scaled, each fourth left out."""
    shift = 0.3 * unit_rows(rng, 1, width)[0]
    if kind == "centre":
        return Reducer(shift)
    if kind == "projection":
        return Reducer(shift, np.eye(width) + rng.standard_normal((width, width)) / width)
    return Reducer(projection=rng.uniform(0.5, 2.0, width) * (np.arange(width) % 4 != 3))


def random_plan(
    rng: np.random.Generator,
    counts: list[int],
    width: int,
    terms: tuple[str, ...] = TERMS,
    *,
    weighted: bool = True,
    query: str = "adapted",
    feature: str = "plain",
    alpha: float = 1.7,
    beta: float = 5.5,
    precision: KeyPrecision = "fp32",
    reducer: str | None = None,
    dense: bool = False,
) -> ScoringPlan:
    """A plan with counts[c] keys in class c, stored in `precision`, and the given terms.

    `reducer` is one of REDUCERS; `dense` keys have values of either sign in place of classes.
    """
    n_classes, n_keys = len(counts), sum(counts)
    parts: dict[str, Any] = {}
    if "text" in terms:
        parts["text"] = unit_rows(rng, n_classes, width)
    if "cache" in terms:
        parts["keys"] = unit_rows(rng, n_keys, width)
        if dense:
            parts["values"] = rng.standard_normal((n_keys, n_classes))
        else:
            parts["class_offsets"] = np.concatenate([[0], np.cumsum(counts)])
        if weighted:
            parts["weights"] = rng.uniform(0.1, 3.0, n_keys)
    if "linear" in terms:
        channels = {"both": 2 * width, "text-distribution": n_classes + 1}.get(feature, width)
        parts["linear"] = rng.standard_normal((n_classes, channels))
    if "linear" in terms or "bias" in terms:
        parts["bias"] = rng.standard_normal(n_classes)
    if reducer is not None:
        parts["reducer"] = random_reducer(rng, reducer, width)
    plan = ScoringPlan(n_classes, query=query, feature=feature, alpha=alpha, beta=beta, **parts)  # type: ignore[arg-type]
    return plan.with_key_precision(precision) if "cache" in terms else plan


def random_embeddings(rng: np.random.Generator, n: int, width: int) -> Embeddings:
    return Embeddings(unit_rows(rng, n, width), unit_rows(rng, n, width))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(2409_11338)


@pytest.fixture(scope="session")
def demo_cache() -> Path:
    """For IOSR_FAST_CACHE: what is built of the demo's CLIP is built once for all tests that take it."""
    return shared.demo_cache()


@pytest.fixture
def exports_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of the same dual encoder share one export, in all tests that take this."""
    monkeypatch.setattr("iosr_fast.export.source.export_onnx", shared.export_once)


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """Thousands of tiny products: PyTorch's threads would spend their time on waiting for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _free_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No backend is forced from outside, and none is remembered from another test."""
    monkeypatch.delenv("IOSR_FAST_IMPL", raising=False)
    monkeypatch.delenv("IOSR_FAST_SIMD", raising=False)
    dispatch._best.cache_clear()
    yield
    dispatch._best.cache_clear()


_LIBC = ctypes.CDLL(None) if sys.platform.startswith("linux") else None  # once: a test may replace ctypes.CDLL


class _SignalStack(ctypes.Structure):
    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def signal_stack() -> tuple[int, int, int]:
    """(address, flags, bytes) of the calling thread's signal stack. Linux only."""
    stack = _SignalStack()
    _LIBC.sigaltstack(None, ctypes.byref(stack))
    return stack.sp or 0, stack.flags, stack.size


@pytest.fixture(autouse=True)
def _signal_stack_is_kept(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that leaves another signal stack is named here, and not by a crash in one of the tests behind it.

    Triton's compiler leaves one, which stays valid, in tests on a GPU."""
    if not sys.platform.startswith("linux") or request.node.get_closest_marker("gpu") is not None:
        yield
        return
    before = signal_stack()
    yield
    assert signal_stack() == before, "the thread's signal stack was replaced (see iosr_fast.encoders.runtimes.openvino)"
