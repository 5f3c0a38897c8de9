"""`iosr-fast evaluate demo --task labels`: pictures pasted two to an image, and what rivals are given."""

from __future__ import annotations

import json

import numpy as np
import pytest
from rich.console import Console
from sklearn.metrics import average_precision_score, f1_score

from iosr_fast import Embeddings
from iosr_fast.clip.demo.pictures import Pictures, held_out
from iosr_fast.evaluation import labels_table
from iosr_fast.evaluation.labels_table import RIVALS, PastedSource, image_f1, measure, paste, paste_pairs, run
from iosr_fast.evaluation.selection import Options
from iosr_fast.exceptions import IosrFastError
from tests.cli.runs import refused
from tests.methods.test_multi_label import images_of

CONCEPTS = 6


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    return held_out()[0]


@pytest.fixture
def source(pictures: Pictures, monkeypatch: pytest.MonkeyPatch) -> PastedSource:
    """Six concepts, encoded by the mean colours of 4 x 4 tiles."""
    monkeypatch.setattr(labels_table, "held_out", lambda: (pictures, None))
    monkeypatch.setattr(labels_table, "CONCEPTS", CONCEPTS)
    monkeypatch.setattr(labels_table, "QUERIES", 4)
    source = PastedSource((2, 4), range(2))

    def encode(images: np.ndarray) -> Embeddings:
        tiles = images.reshape(len(images), 4, 16, 4, 16, 3).mean((2, 4)).reshape(len(images), -1) - 200.0
        rows = (tiles / np.linalg.norm(tiles, axis=1, keepdims=True)).astype(np.float32)
        return Embeddings(rows, rows[:, ::-1].copy())

    class Clip:
        logit_scale = 20.0

    source.__dict__["_encoder"] = Clip(), encode
    texts = np.linalg.qr(np.random.default_rng(0).normal(size=(48, CONCEPTS)))[0].T.astype(np.float32)
    monkeypatch.setattr("iosr_fast.clip.prompts.embed_classes", lambda clip, names: texts[: len(names)])
    return source


def test_an_image_holds_both_pictures() -> None:
    one, other = (np.full((64, 64, 3), value, np.uint8) for value in (10, 90))
    beside, above = paste(one, other, True), paste(one, other, False)
    assert beside.shape == above.shape == (64, 64, 3)
    assert (beside[20:44, 4:28] == 10).all() and (beside[20:44, 36:60] == 90).all() and (beside[:12] == 255).all()
    assert (above[4:28, 20:44] == 10).all() and (above[36:60, 20:44] == 90).all() and (above[:, :12] == 255).all()


def test_each_concept_is_in_as_many_images_beside_another(pictures: Pictures) -> None:
    rows = [np.flatnonzero(pictures.concepts == c)[:3] for c in range(8)]
    images, labels = paste_pairs(pictures, rows, 5, np.random.default_rng(0))
    assert images.shape == (20, 64, 64, 3) and images.dtype == np.uint8
    assert (labels.sum(0) == 5).all() and (labels.sum(1) == 2).all()


def test_support_and_test_images_share_no_picture_and_fewer_shots_are_the_first(source: PastedSource) -> None:
    task = source.draw(0)
    assert task.labels.shape == (12, CONCEPTS) and len(task.support.labels) == 12
    few = task.shots(2)
    assert few.counts.tolist() == [2] * CONCEPTS
    np.testing.assert_array_equal(few.embeddings.plain, task.support.embeddings.plain[:6])
    again = source.draw(0)
    np.testing.assert_array_equal(again.queries.plain, task.queries.plain)
    assert not np.array_equal(source.draw(1).queries.plain, task.queries.plain)


def test_rows_have_the_figures_of_all_seeds(source: PastedSource) -> None:
    said: list[str] = []
    out = Console(record=True, width=200)
    rows = run([source], Options(["auto", "rivals"], report=said.append), out)
    assert [(row["method"], row["shots"]) for row in rows] == [(m, k) for m in ("auto", *RIVALS) for k in (2, 4)]
    json.dumps(rows)
    for row in rows:
        values = [draw["map"] for draw in row["draws"]]
        assert row["map"] == pytest.approx(np.mean(values)) and row["map_std"] == pytest.approx(np.std(values, ddof=1))
        assert 0 < row["map"] <= 1 and row["images"] == 12 and row["classes"] == CONCEPTS
        assert ("f1" in row) == (row["method"] == "auto")
    assert len(said) == len(rows) and "mean average precision in % over 6 concepts on 12 images" in out.export_text()


def test_figures_are_scikit_learns() -> None:
    images = images_of(40)
    task = labels_table.Pasted(images, images.embeddings, images.labels)
    found = measure("zero-shot", task, 40 * 2 // 5)
    assert images.text is not None
    cosines = images.embeddings.plain @ images.text.T
    # The slope of a class is that of all: biases alone move its scores, which ranks no image otherwise.
    assert found["map"] == pytest.approx(average_precision_score(images.labels, cosines, average="macro"))
    members = np.random.default_rng(0).random(images.labels.shape) < 0.3
    some = images.labels.any(1)
    expected = f1_score(images.labels[some], members[some], average="samples", zero_division=0)
    assert image_f1(images.labels[some], members[some]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("demo", "--task", "labels", "--shift"), "expected no --shift"),
        (("demo", "--task", "labels", "--shots", "0"), "--shots of at least 1"),
        (("demo", "--task", "labels", "--methods", "gda"), "gda can't learn from several labels"),
        (("demo", "--task", "labels", "--reducers", "centre"), "neither --reducers nor"),
        (("features", "demo", "--task", "labels"), "expected the command demo, got features"),
    ],
)
def test_wrong_options_are_refused_before_any_work(
    words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PastedSource, "draw", lambda *_: pytest.fail("pictures were pasted"))
    assert message in " ".join(refused("evaluate", *words).split())


def test_an_unknown_method_is_named(source: PastedSource) -> None:
    with pytest.raises(IosrFastError, match="expected --methods of rivals, auto"):
        run([source], Options(["nothing"]), Console())
