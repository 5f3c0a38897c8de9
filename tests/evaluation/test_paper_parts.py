"""iosr_fast/evaluation/paper: problems, published figures and the tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch comes with the cpu extra")

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.evaluation import table
from iosr_fast.evaluation.accuracy import Draw, Result
from iosr_fast.evaluation.paper import cells, problems, published, report
from iosr_fast.evaluation.paper.command import check_out
from iosr_fast.evaluation.paper.problems import pose
from iosr_fast.evaluation.paper.run import Views, plan
from iosr_fast.evaluation.paper.store import Store
from iosr_fast.evaluation.sets import EvaluationSet
from iosr_fast.methods import METHODS
from iosr_fast.methods.tuning.tuned import Tuned
from iosr_fast.utils.temporaries import claimed
from tests import ROOT
from tests.evaluation.paper_sets import CLASSES, Pictures, model, tiny, without, write_dtd


def test_a_draw_is_balanced_and_more_shots_keep_the_images_of_fewer() -> None:
    problem = pose(tiny())
    labels = problem.source.splits["train"].labels
    for seed in (1, 2, 3):
        most = problem.support(3, seed)
        assert [labels[rows].tolist() for rows in most] == [list(range(CLASSES))] * 3
        assert len(set(np.concatenate(most))) == 3 * CLASSES
        for k in (1, 2):
            assert [a.tolist() for a in problem.support(k, seed)] == [a.tolist() for a in most[:k]]
    assert len({str(problem.support(3, seed)) for seed in range(5)}) == 5


@pytest.mark.slow
def test_the_demo_is_drawn_as_evaluate_draws_it_and_no_support_picture_is_asked() -> None:
    from iosr_fast.clip.demo.pictures import POOL
    from iosr_fast.evaluation.tasks import Encoded

    problem = problems.demo()
    split = problem.source.splits["test"]
    number = np.arange(len(split), dtype=np.float32)[:, None].repeat(2, 1)
    text = np.zeros((len(problem.source.class_names), 2), np.float32)
    theirs = Encoded(Embeddings(number), split.labels, text, 1.0).task(2, 7)
    ours = np.sort(np.concatenate(problem.support(2, 7)))
    np.testing.assert_array_equal(np.sort(theirs.support.embeddings.plain[:, 0]), ours)
    np.testing.assert_array_equal(theirs.queries.plain[:, 0], problem.queries(7))
    assert not set(np.concatenate(problem.support(POOL, 7))) & set(problem.queries(7)) and problem.most_shots() == POOL
    assert problem.most_shots(fewer=True) == problem.apart  # no test picture becomes support for want of others
    assert len(set(split.keys)) == len(split)


def test_a_class_without_images_is_refused_in_any_case() -> None:
    data = tiny()
    train: Any = data.splits["train"]
    cut = train.rows(np.flatnonzero(train.labels != 2))
    assert pose(replace(data, splits={**data.splits, "train": cut})).most_shots(fewer=True) == 0


def test_a_shifted_set_takes_its_support_from_the_classes_of_the_same_names() -> None:
    source = tiny("imagenet")
    other = without(tiny("other"), "train", "val")
    chosen = [3, 1]
    test: Any = other.splits["test"]
    few = test.rows(np.flatnonzero(np.isin(test.labels, chosen)))
    few.labels = np.array([chosen.index(c) for c in few.labels])
    target = replace(other, class_names=[source.class_names[c] for c in chosen], splits={"test": few})
    problem = pose(target, source)
    assert problem.shifted and problem.classes.tolist() == chosen
    np.testing.assert_array_equal(problem.labels_of(np.arange(CLASSES)), [-1, 1, -1, 0, -1])
    with pytest.raises(ValueError, match=r"every class of other among those of imagenet, got \['unicorn'\]"):
        pose(replace(target, class_names=["unicorn", source.class_names[1]]), source)
    with pytest.raises(ValueError, match="expected a split 'train' of other"):
        pose(target)


def test_classes_of_one_name_are_told_apart_by_the_folders_of_their_images() -> None:
    images = np.zeros((4, 8, 8, 3), np.uint8)
    train: Any = Pictures(images, np.array([0, 1, 2, 2]), ["n01/a.jpg", "n02/a.jpg", "n03/a.jpg", "n03/b.jpg"])
    test: Any = Pictures(images[:2], np.array([0, 1]), ["a/n03/x.jpg", "a/n01/y.jpg"])
    source = EvaluationSet("imagenet", ["missile", "cat", "missile"], ["{}"], {"train": train}, "s")
    target = EvaluationSet("imagenet_r", ["missile", "missile"], ["{}"], {"test": test}, "t")
    assert pose(target, source).classes.tolist() == [2, 0]
    elsewhere: Any = Pictures(images[:2], np.array([0, 1]), ["x.jpg", "y.jpg"])
    with pytest.raises(ValueError, match="expected one class of imagenet called 'missile', got several"):
        pose(replace(target, splits={"test": elsewhere}), source)


def test_data_sets_are_opened_under_their_root_and_all_that_is_missing_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DTD as CoOp lays it out; missing sets are listed with their sources before anything is read."""
    write_dtd(tmp_path, "jpg")
    monkeypatch.setattr(problems, "demo", lambda: pose(tiny("demo")))
    problem, demo = problems.open_problems(["dtd", "demo"], tmp_path)
    assert problem.name == "dtd" and problem.validated and not problem.shifted and demo.name == "demo"
    assert problem.support(3, 1)[2].shape == (CLASSES,) and problem.most_shots() == 3
    assert any("CoOp" in note for note in report._notes(problem, 1))
    for names, message in (
        (["dtd", "textures"], "expected --data out of demo, all, caltech101"),
        (["dtd", "eurosat", "imagenet_a"], "(?s)expected the data sets that were asked for:.*EuroSAT.*ImageNet-A"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            problems.open_problems(names, tmp_path)
    with pytest.raises(ValueError, match="expected --root, the folder that holds dtd"):
        problems.open_problems(["dtd"], None)


KILLED = """
import os, signal
from pathlib import Path
import numpy as np
from iosr_fast.evaluation.paper import cells, store

os.replace = os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
key = "0123456789abcdef" * 2
for write in (
    lambda: cells.write_json(Path("run.json"), {}),
    lambda: cells.write_json(Path("cells", key + ".json"), {}),
    lambda: store._write(Path("embeddings", "demo-test-" + key), "embeddings", {}, {"plain": np.zeros((1, 2))}),
):
    if os.fork() == 0:
        write()
    os.wait()
"""


@pytest.mark.slow
def test_what_killed_runs_leave_in_out_is_removed_by_the_next_run(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", KILLED], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    of_run = list(tmp_path.glob(".run.json.*"))
    assert of_run and all(list((tmp_path / name).iterdir()) for name in ("cells", "embeddings"))
    others = [tmp_path / "embeddings" / name for name in (".editor.settings", ".cache.folders0")]
    for path in others:
        path.mkdir()
    begun = tmp_path / "begun"
    begun.mkdir()
    for path in of_run:
        path.rename(begun / path.name)

    def start() -> None:
        check_out(begun, {"views": 3})
        cells.Cells(tmp_path / "cells")
        Store(tmp_path / "embeddings", None)  # type: ignore[arg-type]  # nothing is encoded

    with claimed(tmp_path / "cells" / f"{'0' * 32}.json") as written:
        written.write_text("{")
        start()
        assert written.is_file(), "a second run is at it"
        written.unlink()
    assert [path.name for path in begun.iterdir()] == ["run.json"] and not list((tmp_path / "cells").iterdir())
    assert sorted((tmp_path / "embeddings").iterdir()) == sorted(others)


def test_published_figures_have_sources_and_known_names() -> None:
    from iosr_fast.evaluation.sets import catalog

    shipped = published.read_published()
    assert len(shipped) > 200
    for (data, method, backbone, pretrained, shots), figures in shipped.items():
        assert data in catalog() and method in METHODS and pretrained == "openai" and shots in (0, 1, 2, 4, 8, 16)
        assert backbone in ("RN50", "RN101", "ViT-B-32", "ViT-B-16")
        for figure in figures:
            assert figure.paper and figure.where and figure.url.startswith("https://") and 10 < figure.value < 100
    values = [figure.value for figure in shipped["imagenet", "tip-x", "RN50", "openai", 16]]
    assert values == [62.61, 62.16]  # two papers quote it differently, and both are kept


WRONG: dict[str, tuple[Any, str]] = {
    "schema": (2, "expected schema 1, got 2"),
    "url": ("", "expected every source with url"),
    "paper": (None, "'paper' is missing"),
    "figures": ({"dtd": {"tip-x": {"4": "high"}}}, "expected accuracies in percent"),
    "share": ({"dtd": {"tip-x": {"4": 0.62}}}, "expected accuracies in percent"),
    "shots": ({"dtd": {"tip-x": {"0": 62.0}}}, "0 for zero-shot"),
    "zero-shot": ({"dtd": {"zero-shot": {"1": 62.0}}}, "0 for zero-shot"),
}


def own_figures(**more: Any) -> dict[str, Any]:
    source = {"paper": "ours", "url": "https://arxiv.org/abs/2409.11338", "where": "table 1", "backbone": "ViT-B/16"}
    figures = {"one": {"tip-x": {"2": 60.0}}, "two": {"tip-x": {"2": 70.0}}}
    return {"schema": 1, "sources": [{**source, "pretrained": "openai", "figures": figures, **more}]}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_of_figures_that_is_wrong_is_refused_by_name(wrong: str, tmp_path: Path) -> None:
    value, message = WRONG[wrong]
    whole = own_figures()
    if wrong == "schema":
        whole["schema"] = value
    elif value is None:
        del whole["sources"][0][wrong]
    else:
        whole["sources"][0]["figures" if isinstance(value, dict) else wrong] = value
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=message) as error:
        published.read_published([path])
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "compared"),
    [
        ({}, True),
        ({"model": "ViT-B/16"}, True),
        ({"model": "ViT-B-16-quickgelu"}, True),
        ({"model": "ViT-B-32"}, False),
        ({"model": "RN50"}, False),
        ({"pretrained": "laion2b_s34b_b88k"}, False),
        ({"pretrained": "weights.pt"}, False),
        ({"pretrained": None}, False),
        ({"data": "three"}, False),
        ({"method": "tip-x++"}, False),
        ({"reducer": "centre"}, False),
        ({"shots": 4}, False),
    ],
)
def test_a_figure_is_compared_with_the_same_thing_alone(change: dict[str, Any], compared: bool, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(own_figures()))
    row: dict[str, Any] = {"data": "one", "method": "tip-x", "reducer": "none", "shots": 2, "model": "ViT-B-16"}
    figures = published.comparable(published.read_published([path]), **{**row, "pretrained": "openai", **change})
    assert [figure.value for figure in figures] == ([60.0] if compared else [])


def sheets_of(accuracies: dict[str, float], own: dict[str, Any], tmp_path: Path, **weights: Any) -> list[table.Sheet]:
    """As report.sheets makes them, of cells with these accuracies; a name with "-" in it is a shifted set."""
    (tmp_path / "mine.json").write_text(json.dumps(own))
    figures = published.read_published([tmp_path / "mine.json"])
    tuned = Tuned("tip-x", "none", {}, 0.5, 5, "validation")
    groups, draws = [], {}
    for name, accuracy in accuracies.items():
        problem = pose(tiny(name), tiny("imagenet") if "-" in name else None)
        for seed in (0, 1, 2):
            group = plan([problem], [("tip-x", "none")], [2], [seed], Views(3), Store(tmp_path, model()))[0]
            draws[group.cells[0].key] = Draw(seed, accuracy + seed / 100, 10, 5, tuned, 0.0)
            groups.append(group)
    chosen = report.Weights(**{"model": "ViT-B-16", "pretrained": "openai", **weights})
    return report.sheets(groups, draws, figures, chosen)


def test_tables_have_means_spreads_and_differences(tmp_path: Path) -> None:
    accuracies = {"one": 0.6, "two": 0.8, "imagenet-v": 0.1}
    sheets = sheets_of(accuracies, own_figures(), tmp_path)
    assert [sheet.name for sheet in sheets] == ["one", "two", "imagenet-v", "mean"]
    assert sheets[0].lines() == (
        ["method", "reducer", "2 shots"],
        [["tip-x", "none", "61.0 ± 1.0"], ["  published", "", "60.0 (+1.0)"]],
    )
    assert sheets[2].lines()[1] == [["tip-x", "none", "11.0 ± 1.0"]]
    assert "support from imagenet" in " ".join(sheets[2].notes)
    assert sheets[3].lines()[1] == [["tip-x", "none", "71.0 ± 1.0"], ["  published", "", "65.0 (+6.0)"]]
    assert "mean over 2 data sets (one, two)" in sheets[3].notes[0]
    footer = report.footer(sheets, report.Weights("ViT-B-16", "openai"))
    assert "Splits, prompts and draws may differ" in " ".join(footer) and "not at hand" not in " ".join(footer)
    rows = table.rows_of(sheets)
    assert [[round(f["difference"], 6) for f in row["published"]] for row in rows] == [[1.0], [11.0], []]
    table.write_markdown(tmp_path / "t.md", sheets, {"views": 3, **table.facts()}, footer)
    text = (tmp_path / "t.md").read_text()
    assert "|   published |  | 65.0 (+6.0) |" in text and "; views 3; " in text and f"- {footer[0]}" in text


def test_what_is_not_at_hand_is_said(tmp_path: Path) -> None:
    own = own_figures(url="https://example.org/other", figures={"one": {"tip-x": {"2": 60.0}}})
    sheets = sheets_of({"one": 0.6, "two": 0.8}, own, tmp_path)
    assert sheets[2].lines()[1] == [["tip-x", "none", "71.0 ± 1.0"]]  # no mean of half of the figures
    footer = " ".join(report.footer(sheets, report.Weights("ViT-B-16", "openai")))
    assert f"The figures of {published.PAPER} are not at hand" in footer
    sheets = sheets_of({"one": 0.6}, own, tmp_path, pretrained="weights.pt")
    assert sheets[0].lines()[1] == [["tip-x", "none", "61.0 ± 1.0"]]
    assert "Weights of a file" in " ".join(report.footer(sheets, report.Weights("ViT-B-16", "weights.pt")))


def test_a_single_draw_of_a_mean_over_sets_has_no_spread() -> None:
    result = Result("mean", "tip-x", "none", 2, (Draw(0, 0.6, 10, 5, Tuned("tip-x", "none", {}, 0.5, 5, "loo"), 0.0),))
    assert table.Sheet("mean", (result,), ()).lines()[1] == [["tip-x", "none", "60.0"]]
    assert table.Sheet("one", (result,), ()).lines()[1] == [["tip-x", "none", "60.0 ± 15.5"]]
