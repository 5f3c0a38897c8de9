"""tools/reproduce_paper.py as a whole, on five concepts of the demo: what is kept, what is refused, what is told."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iosr_fast.clip.demo.pictures import load_pictures
from iosr_fast.methods import METHODS
from iosr_fast.methods.support_set import encode_support
from tests import ROOT
from tools.reproduction import models, problems, store
from tools.reproduction.problems import OwnSet, Problem, pose

pytest.importorskip("torch", reason="torch comes with the train extra")
pytest.importorskip("open_clip", reason="open_clip comes with the train extra")

from tools.reproduce_paper import main

CLASSES, TRAIN, FIRST = 5, 3, 140


class Pictures:
    """A split in memory. Pictures of the rows in `bad` can't be read."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, keys: list[str], bad: tuple[int, ...] = ()) -> None:
        self.images, self.labels, self.keys, self.bad = images, labels, keys, bad

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, row: int) -> Any:
        if row in self.bad:
            raise OSError("cut off")
        return Image.fromarray(self.images[row])


def tiny(name: str = "tiny", validation: bool = True, first: int = FIRST) -> OwnSet:
    """Five concepts: three pictures of each to train, one to validate, the others to test."""
    pictures = held_out("held-out", min_styles=6)
    rows = {"train": [], "val": [], "test": []} if validation else {"train": [], "test": []}
    for c in range(first, first + CLASSES):
        mine = np.flatnonzero(pictures.concepts == c)
        rows["train"] += mine[:TRAIN].tolist()
        if validation:
            rows["val"] += mine[TRAIN : TRAIN + 1].tolist()
        rows["test"] += mine[TRAIN + 1 :].tolist()
    splits = {
        split: Pictures(
            pictures.images[chosen], pictures.concepts[chosen] - first, [f"{split}/{row}.png" for row in chosen]
        )
        for split, chosen in rows.items()
    }
    names = pictures.names[first : first + CLASSES]
    return OwnSet(name, names, ("{}", "a picture of {}"), splits, f"made of {first} {validation}")


Main = Callable[..., Path]
# Once for all tests: decoding the demo's sheets, and loading its CLIP.
held_out = lru_cache(load_pictures)
loaded = lru_cache(models.load_model)


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture
def posed(monkeypatch: pytest.MonkeyPatch, engines: Path) -> Iterator[list[Problem]]:
    """What --data opens; to be changed by a test."""
    monkeypatch.setenv("IOSR_FAST_CACHE", str(engines))
    made = [pose(tiny())]
    monkeypatch.setattr(problems, "open_problems", lambda wanted, root: made)
    monkeypatch.setattr(models, "load_model", loaded)
    yield made


@pytest.fixture
def run(posed: list[Problem], tmp_path: Path) -> Main:
    def run(*words: str, out: str = "out") -> Path:
        folder = tmp_path / out
        main([*ARGUMENTS, "--out", str(folder), *words])
        return folder

    return run


ARGUMENTS = ["--data", "demo", "--runtime", "torch", "--shots", "1", "2", "--seeds", "1", "2", "--views", "3"]


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((out / "results.json").read_text())
    return rows


def no_more_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(store, "encode", refuse)


def test_every_cell_is_filled_and_a_second_run_only_reads(run: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    out = run("--methods", "all")
    assert len(list((out / "cells").glob("*.json"))) == len(METHODS) * 2 * 2
    rows = rows_of(out)
    assert {(row["method"], row["shots"]) for row in rows} == {(name, k) for name in METHODS for k in (1, 2)}
    for row in rows:
        assert row["seeds"] == [1, 2] and len(row["accuracies"]) == 2 and row["classes"] == [CLASSES] * 2
        assert row["tuned_on"] == ("none" if row["method"] == "zero-shot" else "validation")
        assert row["views"] == 3 and row["adapter"] and row["published"] == []
    assert len({row["mean"] for row in rows}) > 3 and max(row["mean"] for row in rows) > 0.6
    with (out / "results.csv").open() as file:
        assert [float(row["mean"]) for row in csv.DictReader(file)] == [row["mean"] for row in rows]
    told = (out / "results.md").read_text()
    for row in rows:
        assert f"{100 * row['mean']:.1f} ± {100 * row['std']:.1f}" in told
    assert "validation images" in told and "2 seeds" in told
    no_more_encoding(monkeypatch)
    monkeypatch.setattr("tools.reproduction.run.evaluate_draw", lambda *_: pytest.fail("computed again"))
    run("--methods", "all")
    assert (out / "results.md").read_text() == told
    run("--methods", "tip-adapter", "--shots", "2", "--seeds", "2")


def test_a_number_is_that_of_the_classifiers_own_steps(run: Main, posed: list[Problem]) -> None:
    """Tip-Adapter++ by hand: the same views, averaged by encode_support, tuned on the validation pictures."""
    from iosr_fast.encoders.encoder import Embeddings
    from iosr_fast.methods.support_set import make_support_set
    from iosr_fast.methods.tuning.tune import tune
    from iosr_fast.scoring.score import score
    from tools.reproduction.store import Wanted

    out = run("--methods", "tip-adapter++", "--seeds", "2", "--shots", "2")
    data = posed[0].source
    model = models.load_model("demo", None, "auto", "torch")

    def embed(split: str, rows: np.ndarray, views: int, rng: np.random.Generator) -> Embeddings:
        return encode_support(model.encoder, [data.splits[split].image(row) for row in rows], views, True, rng)

    parts, labels = [], []
    for c_rows in posed[0].support(2, 2):
        assert data.splits["train"].labels[c_rows].tolist() == list(range(CLASSES))
        parts.append(embed("train", c_rows, 3, Wanted(data, "train", c_rows, 3, True, 2).generator()))
        labels.append(np.arange(CLASSES))
    keys = Embeddings(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("plain", "adapted")))
    text = model.embed_text(data.class_names, data.templates)
    support = make_support_set(keys, np.concatenate(labels), text, model.clip.logit_scale)
    held, asked = (
        embed(split, np.arange(len(data.splits[split])), 1, np.random.default_rng(0)) for split in ("val", "test")
    )
    tuned = tune("tip-adapter++", support, held, data.splits["val"].labels)
    expected = float((score(tuned.compile(support), asked).argmax(1) == data.splits["test"].labels).mean())
    row = rows_of(out)[0]
    assert row["accuracies"] == [expected] and row["parameters"] == [tuned.parameters]


def test_without_validation_parameters_come_from_the_support_asked_in_one_view(run: Main, posed: list[Problem]) -> None:
    posed[:] = [pose(tiny(validation=False))]
    out = run("--methods", "tip-adapter", "--shots", "1", "3")
    assert {row["shots"]: row["tuned_on"] for row in rows_of(out)} == {1: "one-shot", 3: "loo"}
    assert rows_of(out)[1]["tuned_images"] == [3 * CLASSES] * 2
    stored = [json.loads(path.read_text()) for path in (out / "embeddings").glob("tiny-train-*/manifest.json")]
    assert {part["views"] for part in stored} == {1, 3}
    assert "no validation split" in (out / "results.md").read_text()


def test_test_labels_choose_no_parameter(run: Main, posed: list[Problem], rng: np.random.Generator) -> None:
    chosen = {}
    for name in ("as they are", "permuted"):
        if name == "permuted":
            data = posed[0].source
            test = data.splits["test"]
            mixed = Pictures(test.images, rng.permutation(test.labels), test.keys)
            posed[:] = [pose(replace(data, splits={**data.splits, "test": mixed}))]
        out = run("--methods", "all", out=name)
        chosen[name] = [(row["method"], row["shots"], row["parameters"], row["tuned_accuracy"]) for row in rows_of(out)]
    assert chosen["as they are"] == chosen["permuted"]
    one, other = (
        [row["accuracies"] for row in rows_of(out.parent / name) if row["method"] != "zero-shot"] for name in chosen
    )
    assert one != other


DRIVER = """
import sys, time
from tests.tools.test_reproduce import ARGUMENTS, tiny, pose, problems
from tools.reproduce_paper import main
from tools.reproduction import cells, store

problems.open_problems = lambda wanted, root: [pose(tiny())]
pause = float(sys.argv[1])
write, put = cells.Cells.write, store._write
cells.Cells.write = lambda *given: (time.sleep(pause), write(*given))
store._write = lambda *given: (time.sleep(pause), put(*given))
main([*ARGUMENTS, "--methods", "tip-adapter", "tip-adapter++", "tip-x", "--out", sys.argv[2]])
"""


def drive(out: Path, pause: float, engines: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "IOSR_FAST_CACHE": str(engines), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", DRIVER, str(pause), str(out)]
    return subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def test_a_run_killed_twice_goes_on_and_ends_with_the_same_table(tmp_path: Path, engines: Path, run: Main) -> None:
    whole = run("--methods", "tip-adapter", "tip-adapter++", "tip-x", out="whole")
    out = tmp_path / "killed"
    kept: dict[Path, float] = {}
    for folder, enough in (("embeddings", 3), ("cells", 2)):
        started = drive(out, 0.1, engines)
        while len([path for path in (out / folder).glob("[!.]*")]) < enough and started.poll() is None:
            time.sleep(0.01)
        assert started.poll() is None, started.stderr.read() if started.stderr else ""
        os.kill(started.pid, signal.SIGKILL)
        assert started.wait() == -signal.SIGKILL
        for path, written in kept.items():
            assert path.stat().st_mtime_ns == written, f"{path} was made again"
        kept = {
            path: path.stat().st_mtime_ns for part in ("embeddings", "cells") for path in (out / part).glob("[!.]*")
        }
        assert len(kept) >= enough
    run("--methods", "tip-adapter", "tip-adapter++", "tip-x", out="killed")
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    assert (out / "results.md").read_text() == (whole / "results.md").read_text()
    timed = ("tune_seconds", "fit_seconds")
    one, other = ([{k: v for k, v in row.items() if k not in timed} for row in rows_of(each)] for each in (out, whole))
    assert one == other
