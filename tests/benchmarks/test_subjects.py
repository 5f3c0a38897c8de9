"""Each subject runs tiny on the CPU: its implementations are there, verified, and nothing wrong is timed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from benchmarks import ceilings, encoder, harness, one_file, photographs, pipeline, score, waits
from benchmarks.devices import Device
from benchmarks.harness import Run
from benchmarks.score_rivals import torch_rivals
from iosr_fast import _C
from iosr_fast.backbones.demo.pictures import load_pictures
from iosr_fast.cli.command import ListCommand, command_app
from iosr_fast.scoring.half_plan import half_plan
from iosr_fast.scoring.key_precision import PRECISIONS
from iosr_fast.scoring.reference import score_reference
from iosr_fast.scoring.score import score_with_path
from tests import ROOT, demo_cache
from tests.backbones.small_clip import small_clip
from tools.benchmark import main

pytestmark = pytest.mark.slow

RUNTIMES = ["onnxruntime", *(["openvino"] if find_spec("openvino") else [])]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "PAUSE_S", 0)
    monkeypatch.setattr(harness, "BURST_S", 0)
    monkeypatch.setattr(ceilings, "MEMORY_BYTES", 1e6)
    monkeypatch.setattr(ceilings, "SIZE", 64)


def by_name(run: Run) -> dict[str, dict[str, Any]]:
    assert run.failed == []
    return {row["impl"]: row for row in run.rows}


def test_encoder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A tiny CLIP on real pictures, and torch.compile without its compiler, which takes seconds."""
    pictures = np.ascontiguousarray(load_pictures("generic").images[:60, ::2, ::2])
    monkeypatch.setattr(encoder, "pictures_of", lambda clip: (pictures[:40], pictures[40:]))
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    monkeypatch.setattr(encoder, "load_clip", lambda *_: small_clip(layers=2))
    monkeypatch.setattr(encoder, "export_onnx", demo_cache.export_once)
    run = Run("encoder", threads=1, repeats=1)
    encoder.run(run, "Small", batch=(3,), first_adapted_block=1)
    rows = by_name(run)
    rivals = {
        "eager-two-pass",
        "torch-compile-two-pass",
        *(f"{name}-{k}-pass" for name in RUNTIMES for k in ("one", "two")),
    }
    ours = {"torch", "torch-engine", "torch-compile", *RUNTIMES, *(f"{name}-int8" for name in RUNTIMES)}
    assert set(rows) - {"openvino-bf16"} == {ceilings.GEMM} | rivals | ours
    for name in ours:
        assert set(rows[name]["ratios"]) == rivals and rows[name]["share_of_ceiling"] > 0
        assert rows[name]["case"] == "small-b3-s1" and rows[name]["precision"] == ("int8" if "int8" in name else "fp32")
        assert rows[name]["min_cosine"] >= 0.99 and rows[name]["pictures"] == 3
    assert rows["torch-engine"]["build_seconds"] > 0
    if not torch.cuda.is_available():
        assert "left out: tensorrt-engine: tensorrt" in capsys.readouterr().err


def test_an_embedding_that_is_off_is_refused() -> None:
    exact = np.eye(2, dtype=np.float32)[:1]
    turned = np.array([[np.cos(0.14), np.sin(0.14)]], np.float32)
    facts = encoder.compare("int8", (exact, turned), (exact, exact))
    assert facts["min_cosine"] == facts["min_cosine_adapted"] == pytest.approx(np.cos(0.14), abs=1e-6)
    for precision, wrong in (("fp32", turned), ("bf16", turned), ("int8", turned * np.nan)):
        with pytest.raises(ArithmeticError, match=f"adapted embeddings in {precision} are wrong"):
            encoder.compare(precision, (exact, wrong), (exact, exact))


# With more classes than keys some are empty.
@pytest.mark.parametrize(
    "case", ["q5-k40-d32-c60", "q1-k64-d16-c4", "q5-k40-d32-c6-values", "q5-k40-d32-c6-values-linear"]
)
def test_score(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "OUT_OF_CACHE", 4000)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    run = Run("score", threads=1, repeats=1)
    score.run(run, [case])
    simd = next(name for name, supported in _C.simd_paths() if supported)
    narrow = {f"cpp/{simd}:{kind}" for kind in ("fp16", "bf16", "int8")}
    ceiling = ceilings.MEMORY if case.startswith("q1-") else ceilings.GEMM
    rows = by_name(run)
    rivals = {"eager-best", "torch-fp32", "compiled-best" if "values" in case else "papers-formula"}
    assert set(rows) == {f"cpp/{simd}", "torch/cpu", ceiling} | narrow | rivals
    for row in run.rows:
        assert row["precision"] == row["impl"].partition(":")[2] or row["precision"] == "fp32"
        assert row["share_of_ceiling"] > 0 and row["rate_unit"] == ("GB/s" if case.startswith("q1-") else "GFLOP/s")


def test_wrong_logits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, embeddings = score.Case(3, 40, 32, 4).build()
    right = torch_rivals(plan, embeddings, Device())["papers-formula"]()
    score.verify(right, plan, embeddings)
    for wrong, message in ((right.half(), "wrong by"), (right[:2], "expected finite logits"), (right / 0, "finite")):
        with pytest.raises(ArithmeticError, match=message):
            score.verify(wrong, plan, embeddings)
    monkeypatch.setattr("benchmarks.score_rivals.PAPERS_LIMIT_BYTES", 4 * 40 * (4 + 3) - 1)
    assert set(torch_rivals(plan, embeddings, Device())) == {"eager-best", "torch-fp32"}


@pytest.mark.parametrize("tolerance", [score.TOLERANCE, *score.GPU_TOLERANCES.values()])
@pytest.mark.parametrize("linear", [False, True])
def test_a_few_lost_keys_are_refused_and_half_precision_is_not(tolerance: float, linear: bool) -> None:
    plan, embeddings = score.Case(16, 8192, 64, 50, values=True, linear=linear).build()
    assert plan.values is not None
    kept = np.ones((len(plan.values), 1), np.float32)
    kept[np.random.default_rng(0).choice(len(kept), 8, replace=False)] = 0.0
    score.verify(score_with_path(plan, embeddings)[0], plan, embeddings, tolerance)
    with pytest.raises(ArithmeticError, match="wrong by"):
        lost = replace(plan, values=plan.values * kept)
        score.verify(score_with_path(lost, embeddings)[0], plan, embeddings, tolerance)
    if tolerance >= score.GPU_TOLERANCES["fp16"]:
        score.verify(score_with_path(half_plan(plan), embeddings)[0], plan, embeddings, tolerance)


def test_a_backend_that_breaks_costs_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(plan: Any, batch: Any, backend: str, check: bool) -> Any:
        if backend == "cpp":
            raise RuntimeError("it does not compile")
        return score_with_path(plan, batch, backend, check=check)

    monkeypatch.setattr(score, "score_with_path", breaks)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    run = Run("score", threads=1, repeats=1)
    score.run(run, ["q5-k40-d32-c60"])
    assert {"torch/cpu", "eager-best"} <= {row["impl"] for row in run.rows}
    assert run.failed == [f"q5-k40-d32-c60: {score.named('cpp', kind)}" for kind in PRECISIONS]


@pytest.mark.parametrize("values", [False, True])
def test_a_few_classes_stand_for_all_in_the_verification_and_bytes_are_those_of_keys_and_values(values: bool) -> None:
    case = score.Case(3, 40, 16, 9, values)
    plan, embeddings = case.build()
    for precision in PRECISIONS:
        narrow = plan.with_key_precision(precision)
        assert case.gigabytes(precision) == (narrow.keys.nbytes + (narrow.values.nbytes if values else 0)) / 1e9
    chosen = np.array([0, 4, 8])
    few = score_reference(score.only_classes(plan.with_key_precision("int8"), chosen), embeddings)
    whole = score_reference(plan.with_key_precision("int8"), embeddings)
    np.testing.assert_allclose(few, whole[:, chosen], rtol=1e-12)


def test_pipeline(exports_once: None) -> None:
    run = Run("pipeline", threads=1, repeats=1)
    pipeline.run(run, "demo", pictures=8, first_adapted_block=3)
    rows = by_name(run)
    ours = {f"{name}{bits}" for name in ("predict-folder", "predict", "fit", "encoder-only") for bits in ("", "-int8")}
    assert set(rows) == ours | {"obvious-script", "two-pass"}
    for name in ours:
        assert rows[name]["precision"] == ("int8" if "int8" in name else "fp32")
        assert set(rows[name]["ratios"]) == {"obvious-script", "two-pass"} and rows[name]["rate_unit"] == "images/s"
    assert rows["predict-folder"]["images"] == 8 and rows["predict-folder"]["labels_equal"] == 1


def test_one_file(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Runtimes whose programs are missing are left out with a line; one that gives other labels fails."""
    known = one_file.runtimes

    def wrong(model: Path, paths: list[Path]) -> list[one_file.Answer]:
        return [one | {"label": one["label"] + 1} for one in known(Path())["python"](model, paths)]

    monkeypatch.setattr(one_file, "runtimes", lambda folder: known(folder) | {"wrong": wrong})
    monkeypatch.setattr(one_file, "make_demo_bundle", lambda *_: demo_cache.demo_bundle(12, 5))
    monkeypatch.setattr(one_file, "CLASSIFIERS", ((12, 5),))
    monkeypatch.setattr(one_file, "LARGEST", 300)
    monkeypatch.setenv("PATH", "")
    run = Run("one-file", threads=1, repeats=1)
    one_file.run(run, pictures=4)
    assert run.failed == ["12-classes: wrong: 0.0% of the labels are equal"]
    run.failed.clear()
    rows = by_name(run)
    assert rows.pop("wrong")["labels_equal"] == 0
    assert set(rows) == {"python", *RUNTIMES} - {"onnxruntime"}
    assert all(row["images"] == 4 and row["labels_equal"] == row["accepted_equal"] == 1 for row in rows.values())
    said = capfd.readouterr().err
    assert all(f"left out: {name}: " in said for name in ("node", "wasm", "chromium", "c++"))


def test_other_labels_are_not_timed() -> None:
    labels = pipeline.Labels()
    assert labels.check("fp32", np.arange(10))["labels_equal"] == 1
    assert labels.check("int8", np.array([*range(9), 0]))["labels_equal"] == 0.9
    with pytest.raises(ArithmeticError, match=r"90.00% of the labels are right"):
        labels.check("fp32", np.array([*range(9), 0]))


def test_photographs_are_as_large_as_photographs_and_repeat(tmp_path: Path) -> None:
    paths = photographs.write_photographs(tmp_path / "a", 6)
    again = photographs.write_photographs(tmp_path / "b", 6)
    assert paths == sorted(paths) and len({path.read_bytes() for path in paths}) == 6
    for path, other in zip(paths, again, strict=True):
        assert 30_000 < path.stat().st_size < 90_000 and path.read_bytes() == other.read_bytes()
        assert Image.open(path, formats=["JPEG"]).size == (500, 375)
    with pytest.raises(ValueError, match="expected at most"):
        photographs.write_photographs(tmp_path / "c", 10**6)


def test_the_script_prints_rows_and_writes_them(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py")]
    words = ["score", "--case", "q2-k64-d16-c4", "--repeats", "1", "--threads", "1", "--json", "rows.json"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "q2-k64-d16-c4 |" in done.stdout and "| papers-formula |" in done.stdout
    assert {row["case"] for row in json.loads((tmp_path / "rows.json").read_text())} == {"q2-k64-d16-c4"}
    for wrong, said in (
        (["score", "--model", "demo"], "expected no --model with score"),
        (["one-file", "--device", "cuda"], "expected --device cpu with one-file"),
        (["score", "--case", "q0-k1-d1-c1"], "expected a case like"),
    ):
        refused = CliRunner().invoke(command_app(main, ListCommand), [*wrong, "--json", str(tmp_path / "other.json")])
        assert refused.exit_code == 2 and said in refused.stderr and "Traceback" not in refused.stderr


def test_what_users_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "METHODS", {"tip-adapter++": {"tune": "none"}})
    run = Run("change", threads=1, repeats=1)
    waits.change(run)
    waits.fit(run, "demo", pictures=20)
    waits.cold_start(run, "demo")
    rows = by_name(run)
    assert set(rows) == {"add-and-remove-class", "fit-again", "fit", "logistic-regression", "iosr-fast"}
    assert rows["iosr-fast"]["peak_memory_mb"] > 20
    with pytest.raises(ArithmeticError, match="expected 101 classes"):
        waits.classes(100)
    with pytest.raises(ArithmeticError, match="expected a, got b"):
        waits.peak("a", ["b", "1000"])
