"""Rows as tables: what is printed of a subject, what a block of the docs gives, and that README's numbers are rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.show import block, filled, lines_of, page, rows_of
from tests import ROOT

TIMES = {"bench": "score", "runtime_ms": 12.3456, "runtime_ms_spread": [11.0, 14.25], "device": "cpu", "commit": "abc"}
RIVAL = "LogisticRegression"
UNEQUAL = {"data": "flowers102.npz, unequal classes", "shots": 4}
GROCERIES = {"data": "groceries.npz", "shots": 16}
AUDIT = {"data": "flowers102.npz", "shots": 16}
SCORED = {"case": "q64-k1600-d512-c100-values", "device": "AMD EPYC, 2 hardware threads"}
AMX = "Intel(R) Xeon(R) Processor with AMX, 2 hardware threads"
PERCENT = "{percent:.1f} ± {spread_percent:.1f}%"
README = {  # the start of a line of "Measured": subject, fields of a row and the format of its numbers
    "Caltech-101": [
        ("accuracy-embeddings", {"data": "caltech70.npz", "shots": 4, "method": "auto"}, PERCENT),
        ("accuracy-embeddings", {"data": "caltech70.npz, without texts", "shots": 4, "method": RIVAL}, PERCENT),
    ],
    "half of the classes": [
        ("unequal", {**UNEQUAL, "method": method}, PERCENT) for method in ("auto", RIVAL, "NearestCentroid")
    ],
    "photographs without": [("photographs", {**GROCERIES, "method": method}, PERCENT) for method in ("auto", RIVAL)],
    "wrong labels": [("audit", {**AUDIT, "method": method}, "{auroc:.4f}") for method in ("auto", "cleanlab")],
    "ViT-B/16": [
        (
            "encoder",
            {"case": "vit-b-16-b8", "impl": "openvino-s8", "device": SCORED["device"]},
            "{runtime_ms:.0f} ms {ratios[eager-two-pass]:.2f}x {ratios[best-compiled-two-pass]:.2f}x",
        )
    ],
    "64 queries": [
        ("score", {**SCORED, "impl": "cpp/avx512"}, "{runtime_ms:.3f} ms"),
        ("score", {**SCORED, "impl": "eager-best"}, "{runtime_ms:.2f} ms"),
    ],
    "500 JPEG": [
        ("pipeline", {"impl": impl, "device": AMX}, "{images_per_s:.1f}")
        for impl in ("predict-folder-int8", "obvious-script")
    ],
    "served over": [
        ("serving-peer", {"case": "capacity", "server": server}, "{ok_rps:.1f}")
        for server in ("iosr_fast, int8", "infinity-emb 0.0.78")
    ],
}


def measured() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Measured")[2]
    return re.findall(r"^\| (?!what|--)(.*)$", text.partition("\n## ")[0], re.MULTILINE)


def test_each_line_of_the_readme_is_checked() -> None:
    assert [sum(line.startswith(start) for start in README) for line in measured()] == [1] * len(README)


@pytest.mark.parametrize("start", README)
def test_the_readmes_numbers_are_those_of_rows(start: str) -> None:
    (line,) = [line for line in measured() if line.startswith(start)]
    for subject, wanted, form in README[start]:
        (row,) = [row for row in rows_of(subject) if wanted.items() <= row.items()]
        percent = {"percent": 100 * row.get("mean", 0), "spread_percent": 100 * (row.get("std") or 0)}
        numbers = re.findall(r"[\d.]+(?: ± [\d.]+%|x)?", filled({**row, **percent}, form))
        assert numbers and all(number in line for number in numbers), (numbers, line)


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    (folder / "score.json").write_text(json.dumps(rows))
    return folder


def test_a_block_has_the_rows_that_it_names_in_its_order(tmp_path: Path) -> None:
    rows = [{**TIMES, "impl": impl, "case": case} for impl in ("theirs", "ours") for case in ("few", "many", "most")]
    spec = {"subject": "score", "where": {"impl": ["ours", "theirs"], "case": ["many", "few"]}, "names": {"ours": "we"}}
    pivoted = {**spec, "line": "{impl}", "column": "{case}", "cell": "{runtime_ms:.1f}"}
    folder = written(tmp_path, *rows)
    assert block(pivoted, folder) == [
        "|  | many | few |",
        "| --- | --- | --- |",
        "| we | 12.3 | 12.3 |",
        "| theirs | 12.3 | 12.3 |",
    ]
    named = block({**spec, "line": "{impl}, {case}", "columns": {"ms": "{runtime_ms:.0f}"}}, folder)
    assert named[0] == "|  | ms |" and named[2] == "| ours, many | 12 |"
    for wrong in ({"where": {"impl": "none"}}, {"columns": {"ms": "{nothing}"}}):
        with pytest.raises(ValueError, match="expected rows with figures"):
            block({**spec, "line": "{impl}", **wrong}, folder)


def test_times_stand_by_implementation_and_case_and_claims_in_lines() -> None:
    rows = [{**TIMES, "impl": impl, "case": case} for impl in ("ours", "theirs") for case in ("few", "many")]
    assert lines_of(rows[:3])[2:] == [
        "| ours | 12.35 (11 to 14.25) | 12.35 (11 to 14.25) |",
        "| theirs | 12.35 (11 to 14.25) |  |",
    ]
    claim = {"bench": "audit", "method": "auto", "of": "half", "shots": 4, "auroc": 0.98765, "seeds": [0]}
    assert lines_of([claim]) == ["auto, half, 4 shots: auroc 0.9877"]


def test_every_subject_is_shown_with_what_it_was_measured_on() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert all(row["commit"] and row["device"] for row in rows_of(path.stem))
        assert path.stem in page(path.stem)
    with pytest.raises(ValueError, match="expected one of the subjects"):
        page("none")
