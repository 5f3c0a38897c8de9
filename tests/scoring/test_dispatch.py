"""The choice of an implementation, forcing one, and the messages if it can't run."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from iosr_fast import _C, FewShotHead, __version__, info
from iosr_fast.exceptions import UnavailableError
from iosr_fast.scoring import dispatch
from iosr_fast.scoring.score import score_with_path
from tests.conftest import random_embeddings, random_plan
from tests.interpreter import printed

CPP = f"cpp/{next(name for name, supported in _C.simd_paths() if supported)}"
NAMES = ["cpp", "cuda", "triton", "torch", "reference"]
CUDA_MODULE = "iosr_fast._C_cuda"


FOUND_ONCE: tuple[Any, ...] = (
    dispatch._build_unavailable_reason,
    dispatch._package_unavailable_reason,
    dispatch._best,
)


def forget() -> None:
    for found in FOUND_ONCE:
        found.cache_clear()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    forget()
    yield
    forget()


def path_taken(rng: np.random.Generator, impl: str = "auto") -> str:
    return score_with_path(random_plan(rng, [2, 1], 8), random_embeddings(rng, 3, 8), impl)[1]


def refuse(monkeypatch: pytest.MonkeyPatch, *names: str, reason: str | None = "no compiler") -> None:
    """Make `names` unavailable for `reason`, or available if that is None."""
    backends = [
        replace(backend, unavailable_reason=lambda: reason) if backend.name in names else backend
        for backend in dispatch.BACKENDS
    ]
    monkeypatch.setattr(dispatch, "BACKENDS", tuple(backends))
    forget()


def test_each_name_takes_its_path(rng: np.random.Generator) -> None:
    assert all(backend.unavailable_reason() is None for backend in dispatch.BACKENDS if "cpu" in backend.devices)
    names = ("auto", "cpp", "torch", "reference")
    assert [path_taken(rng, name) for name in names] == [CPP, CPP, "torch/cpu", "reference"]


@pytest.mark.parametrize(
    ("device", "batch", "n_keys", "order"),
    [
        ("cpu", 1, 1600, ["cpp", "torch", "reference"]),
        ("cuda", 4, 1_000_000, ["cuda", "triton", "torch"]),  # a few queries wait for memory
        ("cuda", 5, 1_000_000, ["triton", "torch"]),
        ("cuda", 16, 1600, ["cuda", "triton", "torch"]),  # a launch takes longer than so few products
        ("cuda", 17, 1600, ["triton", "torch"]),
    ],
)
def test_the_order_of_preference(
    device: str, batch: int, n_keys: int, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, *NAMES, reason=None)
    for name in order:
        assert dispatch.choose("auto", device, batch, n_keys).name == name
        refuse(monkeypatch, name)
    with pytest.raises(UnavailableError, match=f"can run on {device} here: {order[0]}: no compiler"):
        dispatch.choose("auto", device, batch, n_keys)


def test_the_environment_takes_the_place_of_auto_only(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, path in (("torch", "torch/cpu"), ("reference", "reference"), ("auto", CPP)):
        monkeypatch.setenv("IOSR_FAST_IMPL", name)
        assert path_taken(rng) == path
        assert path_taken(rng, "cpp") == CPP


def test_an_unknown_name_is_refused(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "scoring backend of auto, cpp, cuda, triton, torch, reference, got "
    with pytest.raises(ValueError, match=f"{message}impl='fortran'"):
        path_taken(rng, "fortran")
    monkeypatch.setenv("IOSR_FAST_IMPL", "fortran")
    with pytest.raises(ValueError, match=f"{message}IOSR_FAST_IMPL=fortran"):
        path_taken(rng)


def test_a_fallback_is_logged_once_with_the_reason(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse(monkeypatch, "cpp", "cuda", "triton")
    with caplog.at_level(logging.INFO, logger="iosr_fast"):
        assert [dispatch.choose("auto", "cuda", 64).name for _ in range(2)] == ["torch", "torch"]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message == "scoring on cuda with torch (unavailable: triton: no compiler)"
    with pytest.raises(RuntimeError, match="impl='cpp' can't run here: no compiler"):
        path_taken(rng, "cpp")
    monkeypatch.setenv("IOSR_FAST_IMPL", "cpp")
    with pytest.raises(RuntimeError, match="IOSR_FAST_IMPL=cpp can't run here: no compiler"):
        path_taken(rng)


def test_a_name_that_cannot_take_the_device_is_refused(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cpp", "reference"):
        message = f"impl='{name}' can't run here: {name} executes on cpu, and the embeddings are on cuda; move them"
        with pytest.raises(RuntimeError, match=message):
            dispatch.choose(name, "cuda")
    monkeypatch.setenv("IOSR_FAST_IMPL", "cpp")
    with pytest.raises(RuntimeError, match="IOSR_FAST_IMPL=cpp can't run here: cpp executes on cpu"):
        dispatch.choose("auto", "cuda")
    monkeypatch.delenv("IOSR_FAST_IMPL")
    refuse(monkeypatch, "cuda", "triton", reason=None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "triton"):
        with pytest.raises(
            RuntimeError, match=f"impl='{name}' can't run here: {name} needs a CUDA device, and PyTorch"
        ):
            path_taken(rng, name)
    # Where there is a GPU, arrays may be named to go there.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert dispatch.choose("cuda", "cpu").name == "cuda"


def test_triton_takes_the_cpu_under_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_package_unavailable_reason", lambda package, extra, oldest=None: None)
    (triton,) = (backend for backend in dispatch.BACKENDS if backend.name == "triton")
    for value, devices in (("0", ("cuda",)), ("1", ("cpu", "cuda"))):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert dispatch.devices_of(triton) == devices
    assert triton.unavailable_reason() is None and dispatch.choose("triton", "cpu") is triton
    # Never by itself: it is for tests.
    assert dispatch.choose("auto", "cpu").name == "cpp"


def test_scoring_arrays_on_auto_never_loads_torch() -> None:
    code = (
        "import json, sys, numpy as np; from iosr_fast import Embeddings, ScoringPlan; "
        "from iosr_fast.scoring import dispatch; from iosr_fast.scoring.score import score_with_path; "
        "rows = np.eye(4); "
        "plan = ScoringPlan(2, text=rows[:2], keys=rows[:3], class_offsets=[0, 2, 3]); "
        "paths = [score_with_path(plan.with_key_precision(p), Embeddings(rows))[1] for p in ('fp32', 'bf16', 'int8')]; "
        "[dispatch._torch_unavailable_reason(), dispatch._driver_unavailable_reason()]; "
        "print(json.dumps([paths, sorted({'torch', 'triton'} & set(sys.modules))]))"
    )
    assert json.loads(printed(code)) == [[CPP] * 3, []]


def test_an_extension_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "version", "0.0.1")
    assert "was built for version 0.0.1" in (dispatch.cpp_unavailable_reason() or "")
    monkeypatch.undo()
    forget()
    monkeypatch.delattr(_C, "affinity_sums")
    assert "was built from older sources" in (dispatch.cpp_unavailable_reason() or "")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, r"triton is not installed; pip install 'iosr_fast\[gpu\]' brings it"),
        ("3.3.1", r"expected triton 3.4 or newer, got 3.3.1; pip install 'iosr_fast\[gpu\]'"),
    ],
)
def test_a_missing_or_old_package_is_answered_with_what_brings_it(
    found: str | None, message: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(package: str) -> str:
        if found is None:
            raise PackageNotFoundError
        return found

    monkeypatch.setattr(dispatch, "version", version)
    with pytest.raises(UnavailableError, match=f"impl='triton' can't run here: {message}"):
        path_taken(rng, "triton")


@pytest.mark.parametrize("installed", ["torch", "reference"])
def test_without_the_extension_labels_are_the_same_with_one_warning(
    installed: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = random_embeddings(rng, 200, 8).plain
    head = FewShotHead("tip-adapter").fit(pictures[:40], np.arange(40) % 4)
    labels = head.predict(pictures)
    monkeypatch.setitem(sys.modules, "iosr_fast._C", None)
    monkeypatch.delattr("iosr_fast._C")
    refuse(monkeypatch, *{"torch", "reference"} - {installed}, reason="not installed")
    assert [list(head.predict(pictures[:batch])) for batch in (1, 200)] == [list(labels[:1]), list(labels)]
    assert path_taken(rng).startswith(installed)
    (record,) = caplog.records
    assert f"scoring on cpu with {installed}" in record.message and "apt-get install build-essential" in record.message


def test_a_backend_for_few_queries_refuses_many(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "cuda", reason=None)
    with pytest.raises(UnavailableError, match="at most 16 embeddings at once, got 17; leave the choice open"):
        dispatch.choose("cuda", "cuda", 17)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with NVIDIA's driver and every package."""
    monkeypatch.setattr(dispatch, "_driver_unavailable_reason", lambda: None)
    monkeypatch.setattr(dispatch, "_package_unavailable_reason", lambda package, extra, oldest=None: None)
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.fixture
def cuda_build(driver: None, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """And with a CUDA extension, whose calls succeed."""
    build = SimpleNamespace(version=__version__, BoundPlan=None, tile_keys=lambda device, n_keys: 1)
    monkeypatch.setitem(sys.modules, CUDA_MODULE, build)
    return build


def test_the_gpu_decides_for_triton_and_cuda(cuda_build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = (dispatch._triton_unavailable_reason, dispatch._cuda_unavailable_reason)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert all("sees no CUDA device" in str(reason()) for reason in reasons)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert all("8.0 or newer is needed, got Old GPU (7.5)" in str(reason()) for reason in reasons)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert [reason() for reason in reasons] == [None, None]


def test_a_driver_older_than_the_extension_leaves_scoring_to_triton(
    cuda_build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def tile_keys(device: int, n_keys: int) -> int:
        raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")

    monkeypatch.setattr(dispatch, "_gpu_unavailable_reason", lambda: None)
    assert dispatch.choose("auto", "cuda", 1).name == "cuda"
    cuda_build.tile_keys = tile_keys
    forget()
    with caplog.at_level(logging.INFO, logger="iosr_fast"):
        assert dispatch.choose("auto", "cuda", 1).name == "triton"
    assert "(unavailable: cuda: iosr_fast._C_cuda can't call CUDA (CUDA driver version is" in caplog.text


def test_a_missing_or_stale_cuda_build_is_answered_with_how_to_build(
    driver: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for build, message in ((None, ""), (SimpleNamespace(version="0.0.0"), "built for version 0.0.0")):
        monkeypatch.setitem(sys.modules, CUDA_MODULE, build)
        forget()
        reason = str(dispatch._cuda_unavailable_reason())
        assert message in reason and "IOSR_FAST_CUDA=1 pip install ." in reason


def test_info_answers_without_importing_what_it_lists() -> None:
    code = (
        "import sys; from iosr_fast.info import format_info; print(format_info()); "
        "print(sorted({'torch', 'onnxruntime', 'onnx', 'tensorrt_rtx', 'triton', 'PIL'} & set(sys.modules)))"
    )
    out = printed(code)
    # Beside NVIDIA's driver PyTorch is asked what the GPU can do.
    assert set(json.loads(out.splitlines()[-1].replace("'", '"'))) <= (
        set() if dispatch._driver_unavailable_reason() else {"torch"}
    )
    for word in (f"numpy              {np.__version__}", "cpp          cpu        yes", "scalar", "cpu: "):
        assert word in out
    assert "torch        cpu, cuda  yes" in out and "triton       cuda       " in out


def test_info_shows_a_refusal_and_what_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "cpp")
    monkeypatch.setenv("IOSR_FAST_IMPL", "torch")
    text = info.format_info()
    assert "cpp          cpu        no: no compiler" in text and "SIMD paths of cpp: none" in text
    assert "IOSR_FAST_IMPL=torch" in text
    assert info.package_version("no-such-package-anywhere") is None
