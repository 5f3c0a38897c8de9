"""Which implementation runs, how one is forced, and what is said where that can't be met."""

from __future__ import annotations

import logging
import subprocess
import sys

import numpy as np
import pytest

from iosr_fast import _C, dispatch, info
from iosr_fast.scoring import score_with_path
from tests.conftest import random_embeddings, random_plan

CPP = f"cpp/{_C.simd_paths()[0][0]}"


def path_taken(rng: np.random.Generator, impl: str = "auto") -> str:
    return score_with_path(random_plan(rng, [2, 1], 8), random_embeddings(rng, 3, 8), impl)[1]


def refuse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        dispatch.Implementation(entry.name, entry.target, lambda: "no compiler") if entry.name == name else entry
        for entry in dispatch.REGISTRY
    ]
    monkeypatch.setattr(dispatch, "REGISTRY", tuple(entries))


def test_the_table_lists_every_implementation() -> None:
    assert [row.name for row in dispatch.available()] == ["numpy", "cpp", "reference"]
    assert all(row.refusal is None for row in dispatch.available())


def test_each_name_takes_its_path(rng: np.random.Generator) -> None:
    assert path_taken(rng) == "numpy"
    assert [path_taken(rng, name) for name in ("cpp", "numpy", "reference")] == [CPP, "numpy", "reference"]


def test_the_environment_takes_the_place_of_auto_only(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOSR_FAST_IMPL", "cpp")
    assert path_taken(rng) == CPP
    assert path_taken(rng, "reference") == "reference"
    monkeypatch.setenv("IOSR_FAST_IMPL", "auto")
    assert path_taken(rng) == "numpy"


def test_an_unknown_name_is_refused(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="out of auto, numpy, cpp, reference, got impl='fortran'"):
        path_taken(rng, "fortran")
    monkeypatch.setenv("IOSR_FAST_IMPL", "fortran")
    with pytest.raises(ValueError, match="got IOSR_FAST_IMPL=fortran"):
        path_taken(rng)


def test_auto_falls_back_and_says_why_once(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse("numpy", monkeypatch)
    with caplog.at_level(logging.INFO, logger="iosr_fast"):
        assert [path_taken(rng), path_taken(rng)] == [CPP, CPP]
    assert [record.message for record in caplog.records] == ["scoring with cpp (refused: numpy: no compiler)"]
    refuse("cpp", monkeypatch)
    with pytest.raises(RuntimeError, match="impl='cpp' can't run here: no compiler"):
        path_taken(rng, "cpp")
    monkeypatch.setenv("IOSR_FAST_IMPL", "cpp")
    with pytest.raises(RuntimeError, match="IOSR_FAST_IMPL=cpp can't run here: no compiler"):
        path_taken(rng)


def test_an_extension_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "version", "0.0.1")
    dispatch._cpp_refusal.cache_clear()
    try:
        assert "was built for version 0.0.1" in (dispatch._cpp_refusal() or "")
    finally:
        dispatch._cpp_refusal.cache_clear()


def test_an_instruction_set_is_forced_or_refused_loudly(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOSR_FAST_SIMD", "scalar")
    assert path_taken(rng, "cpp") == "cpp/scalar"
    monkeypatch.setenv("IOSR_FAST_SIMD", "altivec")
    with pytest.raises(RuntimeError, match=r"compiled path \(.*scalar.*\), got 'altivec'"):
        path_taken(rng, "cpp")


def test_info_answers_without_importing_what_it_lists() -> None:
    code = (
        "import sys; from iosr_fast.info import format_info; print(format_info()); "
        "print(sorted({'torch', 'onnxruntime', 'onnx', 'tensorrt_rtx', 'triton', 'PIL'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
    for word in (f"numpy              {np.__version__}", "cpp          yes", "scalar", "cpu: "):
        assert word in out


def test_info_shows_a_refusal_and_what_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse("cpp", monkeypatch)
    monkeypatch.setenv("IOSR_FAST_IMPL", "numpy")
    text = info.format_info()
    assert "cpp          no: no compiler" in text and "SIMD paths of cpp: none" in text
    assert "IOSR_FAST_IMPL=numpy" in text
    assert info.package_version("no-such-package-anywhere") is None
