"""tools/report.py: benchmarks/README.md is what the rows in benchmarks/results give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.report import RESULTS, SUBJECTS, page

FACTS = {"device": "a processor", "versions": {"numpy": "2.0"}, "commit": "abc"}
ACCURACY = {
    "bench": "accuracy",
    "data": "flowers",
    "reducer": "none",
    "seeds": [0, 1],
    "test_images": [90, 90],
    **FACTS,
}


def page_of(folder: Path, **files: list[dict[str, Any]]) -> str:
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return page(folder)


def test_the_page_is_what_the_rows_give() -> None:
    text = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
    assert text == page(), "run python tools/report.py"
    assert {path.stem for path in RESULTS.iterdir()} <= SUBJECTS.keys()  # nothing else lies there
    assert len(text.split()) < 14_000


def test_times_stand_by_implementation_and_case_in_a_table_for_each_machine(tmp_path: Path) -> None:
    times = {"bench": "score", "runtime_ms": 12.3456, "runtime_ms_spread": [11.0, 14.25], **FACTS}
    rows = [{**times, "impl": impl, "case": case} for impl in ("ours", "theirs") for case in ("few", "many")]
    text = page_of(tmp_path, score=[*rows[:3], {**rows[0], "device": "another"}])
    assert "|  | few | many |\n| --- | --- | --- |\n| ours | 12.35 (11 to 14.25) | 12.35 (11 to 14.25) |" in text
    assert "| theirs | 12.35 (11 to 14.25) |  |" in text
    assert "[score.json](results/score.json); a processor; abc\n" in text and "another; abc" in text


def test_accuracies_stand_by_method_and_shots_with_their_spread(tmp_path: Path) -> None:
    rows = [
        {**ACCURACY, "method": "gda", "shots": 1, "mean": 0.5, "std": 0.02},
        {**ACCURACY, "method": "gda", "shots": 4, "mean": 0.75, "std": None, "se": 0.01},
        {**ACCURACY, "bench": "overlap"},
    ]
    text = page_of(tmp_path, **{"accuracy-demo": rows})
    assert "|  | 1-shot | 4-shot |" in text and "| gda | 50.0 ± 2.0 | 75.0 ± 1.0 |" in text
    assert "flowers; test images: 90; draws: 2; a processor" in text


def test_claims_and_loads_have_a_line_for_each_row(tmp_path: Path) -> None:
    claim = {**ACCURACY, "bench": "joint", "method": "auto", "of": "", "shots": 4, "alone": 0.5, "joint": None}
    load = {"bench": "serving", "case": "even", **FACTS, "lone_ms": 2.0, "runs": [{"load": 0.5, "ok": 1000}]}
    common = page_of(tmp_path, joint=[claim, {**claim, "of": "half"}])
    assert (
        "| of | alone |\n| --- | --- |\n|  | 50.0% |\n| half | 50.0% |" in common and "method: auto; shots: 4" in common
    )
    text = page_of(tmp_path, joint=[claim], serving=[load])
    assert "| method | shots | alone |\n| --- | --- | --- |\n| auto | 4 | 50.0% |" in text
    assert "| case | load | ok | lone ms |\n| --- | --- | --- | --- |\n| even | 50% | 1,000 | 2.0 |" in text


def test_a_file_without_a_subject_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got score-before; name them there"):
        page_of(tmp_path, **{"score-before": []})
