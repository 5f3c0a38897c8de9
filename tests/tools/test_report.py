"""The page of benchmarks: every number is its row's, nothing is left out in silence, the committed page is fresh."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.tools.report_rows import all_files, encoder, timing
from tools.report import app
from tools.reporting.charts import encoder_bars
from tools.reporting.load import BrokenResults, read_results
from tools.reporting.page import pages
from tools.reporting.text import number, plain


def write(folder: Path, name: str, content: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    for name, content in all_files().items():
        write(folder, name, content)
    return folder


def page_of(results: Path) -> str:
    return pages(read_results(results), results, results.parent)[0]


def tables(page: str) -> list[tuple[list[dict[str, str]], str]]:
    """Each table of the page as dictionaries, and the text between it and the next one."""
    blocks: list[tuple[list[dict[str, str]], str]] = []
    heads: list[str] = []
    for line in page.splitlines():
        if not line.startswith("| "):
            heads = []
            if blocks:
                blocks[-1] = (blocks[-1][0], f"{blocks[-1][1]}\n{line}")
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not heads:
            heads = cells
            blocks.append(([], ""))
        elif not set(line) <= set("| -:"):
            blocks[-1][0].append(dict(zip(heads, cells, strict=True)))
    return blocks


def value(cell: str) -> float:
    return float(cell.replace(",", ""))


def near(cell: str, expected: float) -> bool:
    """Whether a cell is `expected`, rounded to four digits."""
    return value(cell) == pytest.approx(expected, rel=5.1e-4)


def file_rows(results: Path) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    """Timing rows of all files by file, case, implementation and precision, those of a GPU's file among them."""
    rows = {}
    for path in results.glob("*.json"):
        content = json.loads(path.read_text())
        for row in content.get("rows", []) if isinstance(content, dict) else content:
            if "runtime_ms" in row:
                rows[path.name, row["case"], row["impl"], row.get("precision", "")] = row
    return rows


def test_every_number_of_a_timing_table_is_its_rows(results: Path) -> None:
    rows = file_rows(results)
    seen = set()
    for lines, below in tables(page_of(results)):
        if "impl" not in lines[0]:
            continue
        origin = next(line for line in below.splitlines() if line.startswith("Rows: "))
        match = re.search(r"Rows: \[(.+?)\]\(results/(.+?)\); (?:case `(.+?)`)?", origin)
        assert match is not None and match[1] == match[2]
        for line in lines:
            key = (match[1], line["case"].strip("`") if "case" in line else match[3], line["impl"], line["precision"])
            row = rows[key]
            seen.add(key)
            assert near(line["ms"], row["runtime_ms"])
            spread = [value(cell) for cell in line["p10 to p90"].split(" to ")]
            assert spread == pytest.approx(row["runtime_ms_spread"], rel=6e-4)
            for rival, ratio in row["ratios"].items():
                assert near(line[f"{rival} / this"], ratio)
            if row.get("rate") is not None:
                assert near(line[row["rate_unit"]], row["rate"])
            if row.get("ceiling") is not None:
                assert re.search(rf"Ceiling( \(.*?\))?: {plain(row['ceiling'])} {row['rate_unit']}\.", origin)
            if row.get("share_of_ceiling") is not None:
                assert value(line["of ceiling %"]) == pytest.approx(100 * row["share_of_ceiling"], abs=0.0051)
            if "accuracy" in row:
                mean, std = map(value, line["accuracy %"].split(" ± "))
                assert mean == pytest.approx(100 * row["accuracy"], abs=0.0051)
                assert std == pytest.approx(100 * row["accuracy_std"], abs=0.0051)
            if "min_cosine" in row:
                assert value(line["min cosine"]) == pytest.approx(row["min_cosine"], abs=6e-7)
            if "peak_memory_mb" in row:
                assert near(line["peak memory MB"], row["peak_memory_mb"])
            assert row["device"] in origin and f"commit {row['commit']}." in origin and "; 2 threads;" in origin
            assert all(f"{name} {version}" in origin for name, version in row["versions"].items())
    assert seen == set(rows)


def test_serving_and_accuracy_are_their_rows(results: Path) -> None:
    serving = json.loads((results / "cpu-serving.json").read_text())
    accuracy = json.loads((results / "accuracy-demo.json").read_text())
    page = page_of(results)
    all_lines = [lines for lines, _ in tables(page)]
    (runs,) = (lines for lines in all_lines if "load, of capacity" in lines[0])
    for line, run in zip(runs, sorted(serving["runs"], key=lambda run: run["load"]), strict=True):
        assert value(line["load, of capacity"]) == run["load"] and value(line["ok"]) == run["ok"]
        assert near(line["p50 ms"], run["p50_ms"]) and near(line["p99 ms"], run["p99_ms"])
    assert f"capacity per s {number(serving['capacity_rps']).rstrip('0').rstrip('.')}" in page
    peers = json.loads((results / "cpu-serving-peer.json").read_text())
    (servers,) = (lines for lines in all_lines if "x peer" in lines[0])
    for line, row in zip(servers, peers["servers"], strict=True):
        assert line["server"] == f"{row['server']} ({row['version']})" and line["engine"] == "torch, fp32"
        assert near(line["pictures/s"], row["pictures_per_s"]) and near(line["lone ms"], row["lone_ms"])
        assert line["p50, p99 ms at 0.8"] == "80, 160"
    assert [line["x peer"] for line in servers] == ["4.125", ""]
    goals = [line["met"] for lines in all_lines if "goal" in lines[0] for line in lines]
    assert goals == ["yes" if goal["met"] else "no" for goal in [*serving["goals"], *peers["goals"]]]
    (methods,) = (lines for lines in all_lines if "tuned on" in lines[0])
    cells = {
        (line["method"], shots): line[f"{shots} shot{'s' * (shots > 1)}, %"] for line in methods for shots in (1, 2)
    }
    for row in accuracy:
        if row["bench"] == "accuracy":
            assert cells[row["method"], row["shots"]] == f"{100 * row['mean']:.2f} ± {100 * row['std']:.2f}"


def test_summaries_and_joint_rows_are_their_rows(results: Path) -> None:
    rows = json.loads((results / "accuracy-demo.json").read_text())
    all_lines = [lines for lines, _ in tables(page_of(results))]
    (summary,) = (lines for lines in all_lines if "auto ahead worst" in lines[0])
    by_gap = sorted((row for row in rows if row["bench"] == "summary"), key=lambda row: row["gap_mean"])
    for line, row in zip(summary, by_gap, strict=True):
        assert line["method"] == row["method"] and value(line["cells"]) == len(row["at"])
        assert line["accuracy, %"] == f"{100 * row['mean']:.2f}"
        assert near(line["gap worst"], row["gap_worst"]) and near(line["log loss"], row["log_loss"])
    (joint,) = (lines for lines in all_lines if "few gain" in lines[0])
    (row,) = (row for row in rows if row["bench"] == "joint")
    assert joint[0]["joint, %"] == f"{100 * row['joint']:.2f}" and near(joint[0]["few gain"], row["few_gain"])
    assert value(joint[0]["few refused"]) == row["few_refused"]
    (labels,) = (lines for lines in all_lines if "8 shots, mAP in %" in lines[0])
    assert [labels[0][f"{k} shots, mAP in %"] for k in (2, 8)] == ["13.35 ± 0.71", "25.05 ± 0.71"]


def test_the_order_of_rows_changes_nothing(results: Path) -> None:
    page = page_of(results)
    for path in results.glob("*.json"):
        content = json.loads(path.read_text())
        if isinstance(content, list):
            write(results, path.name, content[::-1])
    assert page_of(results) == page


def test_old_rows_lack_fields(tmp_path: Path) -> None:
    write(tmp_path / "results", "old.json", [{"bench": "score", "case": "q1", "impl": "numpy", "runtime_ms": 3}])
    page = page_of(tmp_path / "results")
    assert tables(page)[0][0] == [{"impl": "numpy", "precision": "", "ms": "3.000"}]
    assert "device not given; versions not given; commit not given" in page
    assert "**No GPU.**" in page and "no rows of `encoder`" in page and "no rows of `score`" not in page


def test_several_machines_and_thread_counts(tmp_path: Path) -> None:
    rows = [timing("score", "q1", "numpy", 4.0), timing("score", "q1", "numpy", 2.0, threads=1)]
    write(tmp_path / "results", "cpu.json", [*rows, timing("score", "q1", "numpy", 1.0, device="another")])
    below_by_threads = {
        tuple(line.get("threads", "") for line in lines): below
        for lines, below in tables(page_of(tmp_path / "results"))
    }
    assert set(below_by_threads) == {("1", "2"), ("",)}
    assert "another; 2 threads;" in below_by_threads[("",)] and "threads;" not in below_by_threads["1", "2"]


def test_bars_of_a_waterfall() -> None:
    bars, one_pass = encoder_bars(encoder("demo-b64", 3, 100.0))
    assert [(bar.label, round(bar.row["runtime_ms"], 6)) for bar in bars] == [
        ("two passes, PyTorch", 250.0),
        ("two passes, torch.compile", 220.0),
        ("two passes, ONNX Runtime", 201.23),
        ("fused, adapters from block 0, ONNX Runtime", 170.0),
        ("fused, adapters from block 3, ONNX Runtime", 110.0),
        ("fused, adapters from block 3, OpenVINO", 105.0),
    ]
    assert one_pass is not None and one_pass["runtime_ms"] == 100.0


def test_timings_of_an_unknown_bench_are_shown(results: Path) -> None:
    assert "## novel (no section of its own yet)" in page_of(results)


def test_a_gpu_file(results: Path, tmp_path: Path) -> None:
    page = page_of(results)
    assert "### NVIDIA H200" in page and "**No GPU.**" not in page
    assert "- tensorrt: tensorrt is not installed" in page and "#### Gpu encoder" in page
    assert "Parity: status done; seconds 12.3; agree yes." in page
    (line,) = next(lines for lines, _ in tables(page) if "worst error" in lines[0])
    assert line == {"kernel": "cache", "worst error": "0.00012", "ok": "yes"}
    trial = {"kind": "gpu-check", "trial": True, "device": "a CPU", "rows": [], "parts": {}}
    write(tmp_path / "trial" / "results", "a100.json", trial)
    assert "**No GPU.**" in page_of(tmp_path / "trial" / "results")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{", "can't be read"),
        ("3", "got int"),
        ("[]", "got an empty one"),
        ('{"hello": 1}', "got a dictionary of hello"),
        ('[{"bench": "odd"}]', "case, impl, runtime_ms missing"),
        ("[3]", "row 0 is int"),
        ('[{"bench": "score", "case": "q1", "impl": "numpy"}]', "runtime_ms missing"),
        ('[{"bench": "score", "case": "q1", "impl": "numpy", "runtime_ms": NaN}]', "NaN"),
        ('[{"bench": "score", "case": "q1", "impl": "numpy", "runtime_ms": 0}]', "above 0"),
        ('[{"bench": "score", "case": "q1", "impl": "numpy", "runtime_ms": 1, "ratios": {"a": "b"}}]', "ratios"),
        ('[{"bench": ["score"]}]', "a word as its bench"),
        ('[{"bench": "accuracy", "data": "demo"}]', "method, reducer, shots, mean missing"),
        (
            '[{"bench": "block-sweep", "first_adapted_block": 1, "bottleneck": 2, "cost": 1.0, "test_accuracy": 3}]',
            "form",
        ),
        ('{"capacity_rps": 3, "runs": [{}]}', "load, ok, p50_ms, p99_ms missing"),
    ],
)
def test_a_broken_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(BrokenResults, match=f"broken.json: .*{message}"):
        page_of(tmp_path)
    done = CliRunner().invoke(app, ["--results", str(tmp_path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2 and "broken.json" in done.output and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_figures_are_drawn_and_checked(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    options = ["--results", str(results), "--out", str(out)]
    run = CliRunner().invoke
    (out / "plots").mkdir(parents=True)
    (out / "plots" / "stale.png").write_bytes(b"old")
    assert run(app, [*options, "--check"]).exit_code == 1
    done = run(app, options)
    assert done.exit_code == 0, done.output
    page = (out / "README.md").read_text()
    names = {path.name for path in (out / "plots").iterdir()}
    drawn = ("waterfall-demo", "waterfall-vit-b-16", "throughput-vit-b-32", "scaling-score")
    expected = {f"{name}.png" for name in drawn}
    assert names == set(re.findall(r"\]\(plots/(.+?)\)", page)) == expected
    for path in (out / "plots").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    assert run(app, [*options, "--check"]).exit_code == 0
    (out / "plots" / "scaling-score.png").unlink()
    done = run(app, [*options, "--check"])
    assert done.exit_code == 1 and "scaling-score.png: missing" in done.output
    shutil.copy(out / "plots" / "waterfall-demo.png", out / "plots" / "scaling-score.png")
    (out / "README.md").write_text(page.replace("4 shots", "5 shots").replace(" 1,6", " 1,7"))
    done = run(app, [*options, "--check"])
    assert done.exit_code == 1 and "is not what the rows give" in done.output


def test_the_committed_page_is_what_its_rows_give() -> None:
    done = CliRunner().invoke(app, ["--check"])
    assert done.exit_code == 0, done.output
