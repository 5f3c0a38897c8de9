"""The benchmark of the search: its rival is the public grid, both are verified, and its rows say what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iosr_fast.benchmarks import harness
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.scoring.score import score
from tests import ROOT
from tests.conftest import unit_rows

pytest.importorskip("torch")

from iosr_fast.benchmarks import search
from iosr_fast.benchmarks.search import Case, PublicGrid

TINY = "v60-c6-s3-d24"


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid of 5 x 3 (x 4) points."""
    for name, number in (("alphas", 5), ("betas", 3), ("gammas", 4)):
        monkeypatch.setattr(PublicGrid, name, np.linspace(0, getattr(PublicGrid, name)[-1], number))


def test_cases_are_read_or_refused() -> None:
    assert Case.parse("tip-adapter") == Case("tip-adapter", 2500, 100, 16, 512)
    case = Case.parse("tip-x-v50000-c1000-s16-d512")
    assert case == Case("tip-x", 50000, 1000, 16, 512) and str(case) == "tip-x-v50000-c1000-s16-d512"
    for bad in ("gda", "tip-x-v10", f"tip-x-{TINY}x", "tip-adapter-v0-c1-s1-d1", ""):
        with pytest.raises(ValueError, match=r"expected .* got"):
            Case.parse(bad)


def test_a_case_leaves_alpha_something_to_weigh() -> None:
    support, queries, labels = Case.parse("tip-adapter-v500-c100-s16-d512").build()
    zero_shot = (queries.plain @ support.text.T).argmax(1) == labels
    tuned = search.tune("tip-adapter", support, queries, labels)
    assert 0.4 < zero_shot.mean() < 0.7 and zero_shot.mean() + 0.05 < tuned.search_accuracy < 0.9
    assert (support.counts == 16).all() and queries.plain.dtype == np.float32


def literal_grid(
    method: str, grid: PublicGrid, parts: tuple[np.ndarray, ...], tau: float, values: np.ndarray
) -> np.ndarray:
    """Right images at every point, by the public code's loops in float64, an image and a point at a time."""
    query, keys, text, labels = parts
    base, cosines = tau * query @ text.T, query @ keys.T
    extra, gammas = np.zeros_like(base), [0.0]
    if method == "tip-x":
        s, other = (np.exp(x @ text.T / 0.5) / np.exp(x @ text.T / 0.5).sum(1, keepdims=True) for x in (query, keys))
        divergence = np.array([[sum(p * (np.log(p) - np.log(q))) for q in other] for p in s])
        scaled = (divergence - divergence.min()) / (divergence.max() - divergence.min())
        extra, gammas = -(scaled * (cosines.max() - cosines.min()) + cosines.min()) @ values, list(grid.gammas)
    right = []
    for alpha, beta, gamma in product(grid.alphas, grid.betas, gammas):
        logits = base + gamma * extra + alpha * (np.exp(-(beta - beta * cosines)) @ values)
        right.append(sum(int(np.argmax(row)) == label for row, label in zip(logits, labels, strict=True)))
    return np.array(right)


@pytest.mark.parametrize("method", search.METHODS)
def test_the_rival_is_the_public_grid(method: str, coarse: None, monkeypatch: pytest.MonkeyPatch) -> None:
    support, queries, labels = Case.parse(f"{method}-{TINY}").build()
    grid = PublicGrid(method, support, queries, labels)
    parts = tuple(a.astype(float) for a in (queries.plain, support.embeddings.plain, support.text))
    expected = literal_grid(method, grid, (*parts, labels), support.tau, np.eye(6)[support.labels])
    points = [grid.point(i) for i in range(grid.n_points)]
    assert [grid.right_at(point) for point in points] == expected.tolist()
    assert 0 < expected.min() < expected.max() < 60
    best = (expected.max() / 60, points[int(expected.argmax())])
    assert grid.best() == best
    monkeypatch.setattr(search, "_CHUNK", 1)  # an image at a time
    assert grid.best() == best
    assert grid.spread(4)[0] == points[0] and grid.spread(4)[-1] == points[-1]
    assert grid.spread(10**9) == points


def test_right_by_alpha_counts_argmaxes(rng: np.random.Generator) -> None:
    alphas = np.linspace(0, 4, 9)
    for _ in range(50):  # small whole numbers, so that ties abound
        base, slope = rng.integers(-3, 4, (2, 20, 4)).astype(float)
        labels = rng.integers(0, 4, 20)
        expected = [int(((base + alpha * slope).argmax(1) == labels).sum()) for alpha in alphas]
        assert search._right_by_alpha(base, slope, labels, alphas).tolist() == expected


def check_rows(made: list[dict], case: str, points: int) -> None:
    ours, theirs = made
    for row in made:
        assert (row["bench"], row["case"], row["threads"], row["precision"]) == ("search", case, 1, "fp32")
        assert row["runtime_ms"] > 0 and 0 < row["accuracy"] < 1 and set(row["parameters"]) >= {"alpha", "beta"}
        assert row["extra_memory_mb"] is None or 0 <= row["extra_memory_mb"] < 200
    assert (ours["impl"], theirs["impl"]) == ("exact", "public-grid")
    assert ours["settings"] > 20 and set(ours["ratios"]) == {"public-grid"}
    assert ours["accuracy"] >= theirs["accuracy"] == theirs["best_accuracy"] and "float64" in theirs["best_accuracy_by"]
    assert theirs["grid_points"] == points and 0 < theirs["extrapolated_from_points"] <= points
    assert theirs["extrapolated_from_images"] == 60


@pytest.mark.slow
def test_the_benchmark_runs_from_the_command_line(tmp_path: Path) -> None:
    case = f"tip-adapter-{TINY}"
    arguments = ["search", "--cases", case, "--repeats", "1", "--threads", "1", "--json", tmp_path / "rows.json"]
    command = [sys.executable, ROOT / "tools" / "benchmark.py", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_rows(json.loads((tmp_path / "rows.json").read_text()), case, 4000)


@pytest.mark.slow
def test_tip_x_and_its_grid_of_three_axes(coarse: None) -> None:
    case = f"tip-x-{TINY}"
    made = search.run([case], threads=1, repeats=1, points=7)
    check_rows(made, case, 5 * 3 * 4)
    assert made[1]["extrapolated_from_points"] == 7
    assert all(set(row["parameters"]) == {"alpha", "beta", "gamma"} for row in made)


@pytest.mark.slow
def test_a_part_of_the_grid_stands_for_all_where_it_is_much_work(
    coarse: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case.parse(f"tip-adapter-{TINY}")
    monkeypatch.setattr(search, "TIMED_FLOPS", 2.0 * 18 * (24 + 6) * 2 * 30)
    monkeypatch.setattr(harness, "measure", lambda calls, *_, **__: {name: [1.0] for name in calls})
    ours, theirs = search.run([str(case)], threads=1, repeats=1, points=2)
    assert "the grid's best accuracy is left out" in capsys.readouterr().out
    assert theirs["extrapolated_from_images"] == 30 and theirs["extrapolated_from_points"] == 2
    assert theirs["runtime_ms"] == 15 / 2 * 60 / 30 and ours["runtime_ms"] == 1.0
    assert theirs["accuracy"] is theirs["best_accuracy"] is theirs["parameters"] is None
    monkeypatch.setattr(search, "TIMED_FLOPS", 1e12)
    monkeypatch.setattr(search, "MOST_LOGITS", 60 * 6 * 15 - 1)
    theirs = search.run([str(case)], threads=1, repeats=1, points=2)[1]
    assert theirs["extrapolated_from_images"] == 60 and theirs["accuracy"] is None


def test_what_is_wrong_is_not_timed(coarse: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right_tune = search.tune
    monkeypatch.setattr(harness, "measure", lambda *_, **__: pytest.fail("timed a wrong search"))

    def boasts(*arguments: Any) -> search.Tuned:
        tuned = right_tune(*arguments)
        return replace(tuned, search_accuracy=tuned.search_accuracy + 3 / 60)

    def misses(*arguments: Any) -> search.Tuned:
        poor = replace(right_tune(*arguments), parameters={"alpha": 1e4, "beta": 1.0})
        _, support, queries, labels = arguments
        return replace(poor, search_accuracy=float((score(poor.compile(support), queries).argmax(1) == labels).mean()))

    for wrong, message in ((boasts, "exact is wrong: its plan has .*allowed: 2 apart"), (misses, "the grid 0.* at")):
        monkeypatch.setattr(search, "tune", wrong)
        with pytest.raises(ArithmeticError, match=message):
            search.run([f"tip-adapter-{TINY}"], threads=1, repeats=1)


def test_verification_sees_every_image(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    support, queries, labels = Case.parse(f"tip-adapter-{TINY}").build()
    tuned = search.tune("tip-adapter", support, queries, labels)
    monkeypatch.setattr(search, "_LEAST_ROWS", 7)
    monkeypatch.setattr(search, "_CHUNK", 1)
    search.verify(tuned, support, queries, labels)
    others = Embeddings(unit_rows(rng, 60, 24))
    with pytest.raises(ArithmeticError, match="exact is wrong"):
        search.verify(tuned, support, others, labels)
