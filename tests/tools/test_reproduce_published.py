"""tools/reproduction: published figures, what is compared with them, and the tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from iosr_fast.methods import METHODS
from iosr_fast.methods.tuning.tune import Tuned
from tests.tools.test_reproduce import tiny
from tests.tools.test_reproduce_parts import model
from tools.evaluation.accuracy import Draw, Result
from tools.reproduction import published, report
from tools.reproduction.problems import pose
from tools.reproduction.run import Views, plan
from tools.reproduction.store import Store


def test_published_figures_have_sources_and_known_names() -> None:
    from iosr_fast.training.data.evaluation_sets import names

    found = published.read_published()
    assert len(found) > 200
    for (data, method, backbone, pretrained, shots), figures in found.items():
        assert data in names() and method in METHODS and pretrained == "openai" and shots in (0, 1, 2, 4, 8, 16)
        assert backbone in ("RN50", "RN101", "ViT-B-32", "ViT-B-16")
        for figure in figures:
            assert figure.paper and figure.where and figure.url.startswith("https://") and 10 < figure.value < 100
    values = [figure.value for figure in found["imagenet", "tip-x", "RN50", "openai", 16]]
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
    value, told = WRONG[wrong]
    whole = own_figures()
    if wrong == "schema":
        whole["schema"] = value
    elif value is None:
        del whole["sources"][0][wrong]
    else:
        whole["sources"][0]["figures" if isinstance(value, dict) else wrong] = value
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=told) as error:
        published.read_published([path])
    assert str(path) in str(error.value)


def result(data: str, accuracy: float, method: str = "tip-x", reducer: str = "none", shots: int = 2) -> Result:
    tuned = Tuned(method, reducer, {}, 0.5, 5, "validation")
    return Result(
        data, method, reducer, shots, tuple(Draw(s, accuracy + s / 100, 10, 5, tuned, 0.0) for s in (0, 1, 2))
    )


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
    asked: dict[str, Any] = {"data": "one", "method": "tip-x", "reducer": "none", "shots": 2, "model": "ViT-B-16"}
    found = published.comparable(published.read_published([path]), **{**asked, "pretrained": "openai", **change})
    assert [figure.value for figure in found] == ([60.0] if compared else [])


def sheets_of(accuracies: dict[str, float], own: dict[str, Any], tmp_path: Path, **weights: Any) -> list[report.Sheet]:
    """As report.sheets makes them, of cells with these accuracies; a name with "-" in it is a shifted set."""
    (tmp_path / "mine.json").write_text(json.dumps(own))
    figures = published.read_published([tmp_path / "mine.json"])
    groups, found = [], {}
    for name, accuracy in accuracies.items():
        problem = pose(tiny(name), tiny("imagenet") if "-" in name else None)
        for seed in (0, 1, 2):
            group = plan([problem], [("tip-x", "none")], [2], [seed], Views(3), Store(tmp_path, model()))[0]
            found[group.cells[0].key] = result(name, accuracy).draws[seed]
            groups.append(group)
    return report.sheets(
        groups, found, figures, report.Weights(**{"model": "ViT-B-16", "pretrained": "openai", **weights})
    )


def test_tables_have_means_spreads_and_differences(tmp_path: Path) -> None:
    accuracies = {"one": 0.6, "two": 0.8, "imagenet-v": 0.1}
    made = sheets_of(accuracies, own_figures(), tmp_path)
    assert [sheet.name for sheet in made] == ["one", "two", "imagenet-v", "mean"]
    assert report.lines(made[0]) == (
        ["method", "reducer", "2 shots"],
        [["tip-x", "none", "61.0 ± 1.0"], ["  published", "", "60.0 (+1.0)"]],
    )
    assert report.lines(made[2])[1] == [["tip-x", "none", "11.0 ± 1.0"]]
    assert "support from imagenet" in " ".join(made[2].told)
    assert report.lines(made[3])[1] == [["tip-x", "none", "71.0 ± 1.0"], ["  published", "", "65.0 (+6.0)"]]
    assert "mean over 2 data sets (one, two)" in made[3].told[0]
    weights = report.Weights("ViT-B-16", "openai")
    told = report.about_published(made, weights)
    assert "Splits, prompts and draws may differ" in " ".join(told) and "not at hand" not in " ".join(told)
    rows = report.rows_of(made, {"views": 3})
    assert [[round(f["difference"], 6) for f in row["published"]] for row in rows] == [[1.0], [11.0], []]
    report.write_markdown(tmp_path / "t.md", made, weights, {"views": 3})
    assert "|   published |  | 65.0 (+6.0) |" in (tmp_path / "t.md").read_text()


def test_what_is_not_at_hand_is_said(tmp_path: Path) -> None:
    own = own_figures(url="https://example.org/other", figures={"one": {"tip-x": {"2": 60.0}}})
    made = sheets_of({"one": 0.6, "two": 0.8}, own, tmp_path)
    assert report.lines(made[2])[1] == [["tip-x", "none", "71.0 ± 1.0"]]  # no mean of half of the figures
    told = " ".join(report.about_published(made, report.Weights("ViT-B-16", "openai")))
    assert f"The figures of {published.PAPER} are not at hand" in told
    made = sheets_of({"one": 0.6}, own, tmp_path, pretrained="weights.pt")
    assert report.lines(made[0])[1] == [["tip-x", "none", "61.0 ± 1.0"]]
    assert "Weights of a file" in " ".join(report.about_published(made, report.Weights("ViT-B-16", "weights.pt")))
