"""iosr-fast evaluate features and demo: no test image has a part in a choice, and the rows agree with the tables."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iosr_fast.clip.demo.pictures import POOL, Pictures, only
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.evaluation import accuracy
from iosr_fast.evaluation.calibration import measure
from iosr_fast.evaluation.demo import check_shots, in_domain, shifted
from iosr_fast.evaluation.features import read_features
from iosr_fast.evaluation.rivals import RIVALS
from iosr_fast.evaluation.tasks import Encoded, split_styles
from iosr_fast.methods import METHODS, compile_method
from iosr_fast.scoring.reference import score_reference
from iosr_fast.training.overlap import auroc, overlap_area, pair_cosines
from tests.cli.runs import main
from tests.conftest import unit_rows

CLASSES, WIDTH, STYLES = 6, 16, 7
Arrays = dict[str, np.ndarray]


def near(rng: np.random.Generator, centres: np.ndarray, labels: np.ndarray, noise: float) -> np.ndarray:
    rows = centres[labels] + noise * unit_rows(rng, len(labels), centres.shape[1])
    unit: np.ndarray = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return unit


@pytest.fixture
def arrays(rng: np.random.Generator) -> Arrays:
    """Every array a feature file may have; float16, not quite normalised."""
    centres = unit_rows(rng, CLASSES, WIDTH)
    named: Arrays = {"text": near(rng, centres, np.arange(CLASSES), 0.9), "tau": np.float32(20.0)}
    named["class_names"] = np.array([f"class {c}" for c in range(CLASSES)])
    for part, each in (("support1", 1), ("support2", 2), ("support4", 4), ("val", 5), ("test", 8)):
        labels = rng.permutation(np.repeat(np.arange(CLASSES), each))
        named[f"{part}_y"] = labels.astype(np.int32)
        named[f"{part}_x"] = (1.1 * near(rng, centres, labels, 1.3)).astype(np.float16)
        named[f"{part}_xa"] = near(rng, centres, labels, 0.8).astype(np.float16)
    return named


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Arrays], Path]:
    def write(arrays: Arrays) -> Path:
        path = tmp_path / f"features{len(list(tmp_path.glob('*.npz')))}.npz"
        np.savez(path, **arrays)
        return path

    return write


def without(arrays: Arrays, pattern: str) -> Arrays:
    return {name: value for name, value in arrays.items() if not re.fullmatch(pattern, name)}


def evaluated(path: Path, tmp_path: Path, *words: str) -> list[dict[str, Any]]:
    out = tmp_path / "rows.json"
    main("evaluate", "features", str(path), "--json", str(out), *words)
    rows: list[dict[str, Any]] = json.loads(out.read_text())
    return rows


def of(rows: list[dict[str, Any]], bench: str = "accuracy") -> list[dict[str, Any]]:
    return [row for row in rows if row["bench"] == bench]


def test_a_feature_file_is_read_as_it_was_written(arrays: Arrays, save: Callable[[Arrays], Path]) -> None:
    source = read_features(save(arrays))
    assert source.shots == (1, 2, 4) and source.seeds == (0,)
    task = source.draw(4, 0)
    assert task.support.n_classes == CLASSES and task.support.tau == 20.0 and task.support.text is not None
    assert task.validation is not None and len(task.validation[0]) == 5 * CLASSES
    np.testing.assert_array_equal(task.labels, arrays["test_y"])
    for given, key in ((task.queries.plain, "test_x"), (task.queries.adapted, "test_xa")):
        exact = arrays[key].astype(np.float32)
        assert given.dtype == np.float32
        np.testing.assert_allclose(given, exact / np.linalg.norm(exact, axis=1, keepdims=True), atol=1e-6)
    bare = without(arrays, r"text|tau|class_names|val_.*|.*_xa")
    task = read_features(save(bare), [2]).draw(2, 0)
    assert task.support.text is None and task.validation is None and task.queries.adapted is None
    assert task.support.n_classes == CLASSES and task.support.tau == 100.0


@pytest.mark.parametrize(
    ("change", "shots", "message"),
    [
        ({"test_x": None}, None, "expected an array test_x, got"),
        ({"support2_y": None}, [2], "expected an array support2_y"),
        ({}, [3, 4], r"--shots out of \[1, 2, 4\], which .* holds, got \[3\]"),
        ({"val_y": None}, None, "expected an array val_y"),
        ({"val_xa": None}, None, "adapted embeddings for every part or for none"),
        (
            {"test_x": np.zeros((48, 5))},
            None,
            r"test_x of shape \(N, 16\), as wide as the other embeddings, got \(48, 5",
        ),
        ({"test_x": np.zeros((48, WIDTH))}, None, "finite rows other than zero"),
        ({"test_y": np.zeros(3, int)}, None, r"test_y of shape \(48,\) of integers, got \(3,\)"),
        ({"test_y": np.full(48, 6)}, None, r"test_y in 0\.\.5, got 6\.\.6"),
        ({"test_y": np.zeros(48)}, None, "of integers, got .* float64"),
        ({"text": np.ones(16)}, None, r"text of shape \(N, D\)"),
        ({"class_names": np.array(["one"])}, None, "a class name for each of 6 texts"),
        ({"tau": np.float32(0)}, None, "tau finite and above 0"),
        ({"test_x": np.array([{}])}, None, "not an .npz file of plain arrays"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(
    change: dict[str, np.ndarray | None],
    shots: list[int] | None,
    message: str,
    arrays: Arrays,
    save: Callable[[Arrays], Path],
) -> None:
    path = save({name: value for name, value in {**arrays, **change}.items() if value is not None})
    with pytest.raises(ValueError, match=message):
        read_features(path, shots)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no feature file at"):
        read_features(tmp_path / "nothing.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(ValueError, match=r"not an \.npz file of plain arrays"):
        read_features(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match=r"expected arrays support1_x, .* got \['x'\]"):
        read_features(tmp_path / "other.npz")


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["validation", "loo"])
def test_no_test_label_has_a_part_in_any_parameter(
    tune: str, arrays: Arrays, save: Callable[[Arrays], Path], tmp_path: Path, rng: np.random.Generator
) -> None:
    words = ("--shots", "1", "2", "--tune", tune, "--methods", "tip-adapter", "gda++", "proker", "auto")
    words += ("--reducers", "none", "centre")
    first = of(evaluated(save(arrays), tmp_path, *words))
    moved = {**arrays, "test_y": rng.permutation(arrays["test_y"]), "test_x": arrays["test_x"][::-1]}
    second = of(evaluated(save(moved), tmp_path, *words))
    assert len(first) == len(second) == 2 * (2 + 2 + 2 + 1)
    kept = ("method", "reducer", "shots", "tuned_on", "tuned_accuracy", "chosen", "parameters")
    assert [[row[key] for key in kept] for row in first] == [[row[key] for key in kept] for row in second]
    assert [row["accuracies"] for row in first] != [row["accuracies"] for row in second]


def test_accuracies_are_those_of_the_plan_in_float64(
    arrays: Arrays, save: Callable[[Arrays], Path], tmp_path: Path
) -> None:
    path = save(arrays)
    for row in of(evaluated(path, tmp_path, "--shots", "2", "--methods", "tip-adapter++", "ape", "--reducers", "pca")):
        task = read_features(path).draw(2, 0)
        plan = compile_method(row["method"], task.support, reducer="pca", **row["parameters"][0])
        right = (score_reference(plan, task.queries).argmax(1) == task.labels).mean()
        assert row["mean"] == pytest.approx(right)
        logits = score_reference(plan, task.queries) * row["factors"][0]
        expected = measure(logits, task.labels)
        assert row["log_loss"] == pytest.approx(expected.log_loss, rel=1e-4)
        assert row["calibration_error"] == pytest.approx(expected.calibration_error, abs=1e-4)
        assert row["se"] == pytest.approx(np.sqrt(right * (1 - right) / len(task.labels))) and row["std"] is None


@pytest.mark.slow
def test_what_parameters_are_chosen_on(arrays: Arrays, save: Callable[[Arrays], Path], tmp_path: Path) -> None:
    words = ("--shots", "1", "2", "--methods", "zero-shot", "tip-adapter", "ape", "auto", "--reducers", "none")
    with_validation = of(evaluated(save(arrays), tmp_path, *words))
    assert [row["tuned_on"] for row in with_validation] == [
        *("none", "none"),
        *("validation", "validation") * 2,
        *("one-shot", "loo"),
    ]
    bare = save(without(arrays, "val_.*"))
    rows = of(evaluated(bare, tmp_path, *words))
    chosen = {(row["method"], row["shots"]): row["tuned_on"] for row in rows}
    assert chosen["tip-adapter", 2] == chosen["ape", 2] == chosen["auto", 2] == "loo"
    assert chosen["tip-adapter", 1] == "one-shot"


def test_methods_that_the_data_does_not_allow_are_left_out(
    arrays: Arrays, save: Callable[[Arrays], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = save(without(arrays, r"text|class_names|val_.*|.*_xa"))
    rows = of(evaluated(bare, tmp_path, "--shots", "2"))
    available = {name for name, method in METHODS.items() if not (method.needs_text or method.needs_adapter)}
    assert {row["method"] for row in rows} - {*RIVALS} == available | {"auto"}
    out = " ".join(capsys.readouterr().out.split())
    assert "left out: tip-x compares images with texts" in out and "left out: gda++ needs an encoder" in out
    for words, told in (
        (["--methods", "tip-x"], "a method that the data allows, got none: tip-x compares"),
        (["--methods", "tipx"], "--methods of all, scikit-learn, auto, zero-shot, .* got tipx"),
        (
            ["--reducers", "center"],
            "expected a reducer of none, centre, pca, pca:NUMBER, isoclip or isoclip:TOP,BOTTOM, got 'center'",
        ),
        (["--shift"], "No such option: --shift"),
        (["--tune", "validation"], "a validation set for --tune validation, got none"),
        (["--json", str(tmp_path / "no" / "where.json")], "expected a folder to write"),
    ):
        with pytest.raises(SystemExit):
            main("evaluate", "features", str(bare), *words)
        assert re.search(told, " ".join(capsys.readouterr().err.split()))


@pytest.mark.slow
def test_rows_agree_with_the_tables(
    arrays: Arrays, save: Callable[[Arrays], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--methods", "zero-shot", "tip-adapter", "tip-adapter++", "gda", "auto", "--shots", "1", "4"]
    rows = evaluated(save(arrays), tmp_path, *words)
    printed = capsys.readouterr().out
    assert "one draw ± its binomial standard error (se)" in printed and "48 test images of 6 classes" in printed
    accuracies = of(rows)
    assert len(accuracies) == 2 * (1 + 3 * 3 + 1)
    table = {
        tuple(cells[:2]): cells[2:]
        for line in printed.splitlines()
        if len(cells := [cell.strip() for cell in line.strip("│┃").split("│")]) == 4 and "±" in cells[2]
    }
    for row in accuracies:
        cell = f"{100 * row['mean']:.1f} ± {100 * row['se']:.1f}"
        assert table[row["method"], row["reducer"]][[1, 4].index(row["shots"])] == cell
    overlap = of(rows, "overlap")
    names = ["plain", "plain, centre", "plain, pca", "adapted", "adapted, centre"]
    assert [row["embeddings"] for row in overlap] == names
    task = read_features(tmp_path / "features0.npz").draw(4, 0)
    pairs = pair_cosines(task.queries.plain, task.labels)
    assert overlap[0]["overlap_area"] == pytest.approx(overlap_area(*pairs))
    assert overlap[0]["auroc"] == pytest.approx(auroc(*pairs))
    assert overlap[1]["feature_variance"] > overlap[0]["feature_variance"] > 0


def pictures_of(rng: np.random.Generator, concepts: int = 12) -> Encoded:
    """Concepts drawn in five to seven styles, of seven."""
    labels, styles = [], []
    for c in range(concepts):
        for style in np.sort(rng.permutation(STYLES)[: 5 + c % 3]):
            labels.append(c)
            styles.append(style)
    centres = unit_rows(rng, concepts, WIDTH)
    y = np.array(labels)
    embeddings = Embeddings(near(rng, centres, y, 1.3), near(rng, centres, y, 0.8))
    return Encoded(embeddings, y, near(rng, centres, np.arange(concepts), 1.0), 20.0, np.array(styles))


def rows_of(encoded: Encoded, embeddings: Embeddings) -> np.ndarray:
    """Which pictures these are."""
    found = (encoded.embeddings.plain[None] == embeddings.plain[:, None]).all(2)
    assert (found.sum(1) == 1).all()
    row: np.ndarray = found.argmax(1)
    return row


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shots", [1, 2, 4])
def test_support_and_queries_share_no_style_under_a_shift(rng: np.random.Generator, shots: int, seed: int) -> None:
    encoded = pictures_of(rng)
    inside, across = shifted(encoded, [f"style {s}" for s in range(STYLES)], [1, shots], [seed])
    task, mixed = across.draw(shots, seed), inside.draw(shots, seed)
    support, queries = (encoded.styles[rows_of(encoded, part)] for part in (task.support.embeddings, task.queries))
    assert not set(support) & set(queries)
    assert (task.support.counts == shots).all() and set(task.labels) == set(range(task.support.n_classes))
    assert mixed.support.n_classes == task.support.n_classes
    kept = {encoded.labels[row] for row in rows_of(encoded, task.queries)}
    assert kept == {encoded.labels[row] for row in rows_of(encoded, mixed.queries)}
    one = across.draw(1, seed)
    np.testing.assert_array_equal(one.queries.plain, task.queries.plain)
    told = across.notes[0]
    assert f"{len(kept)} of 12 concepts" in told and f"{len(task.queries)} queries" in told
    assert {name.split(";")[0] for name in re.findall(r"style (\d)", told.split(";")[0])} >= {str(s) for s in support}


def test_a_split_leaves_enough_concepts(rng: np.random.Generator) -> None:
    encoded = pictures_of(rng, 30)
    splits = [split_styles(encoded, 2, seed, siblings=[[0, 1], [3, 4]]) for seed in range(9)]
    for split in splits:
        assert split.sum() == 4 and encoded.enough(2, split).sum() >= 0.75 * 30
        assert split[0] == split[1] and split[3] == split[4]
    different = {tuple(split) for split in splits}
    assert len(different) > 1 and len({tuple(split) for split in splits[: len(different)]}) == len(different)
    few = replace(encoded, styles=np.zeros_like(encoded.styles))
    with pytest.raises(ValueError, match="in more than 4 styles to split, got 1"):
        split_styles(few, 1, 0)


def test_the_spread_over_seeds_is_a_standard_deviation(rng: np.random.Generator) -> None:
    source = in_domain(pictures_of(rng), [2], [0, 1, 2])
    (result,) = accuracy.evaluate(source, [("tip-adapter", "centre")], "loo")
    row = result.row()
    assert row["se"] is None and row["std"] == pytest.approx(np.std(row["accuracies"], ddof=1))
    assert row["mean"] == pytest.approx(np.mean(row["accuracies"]))
    assert row["seeds"] == [0, 1, 2] and len(row["parameters"]) == len(row["tune_seconds"]) == 3
    with pytest.raises(ValueError, match="--shots from 1 to 4"):
        check_shots([5])


def test_only_renumbers_pictures(rng: np.random.Generator) -> None:
    images = rng.integers(0, 256, (6, 2, 2, 3), dtype=np.uint8)
    styles = np.arange(6)
    pictures = Pictures(images, np.array([0, 0, 1, 1, 2, 2]), styles, ["a", "b", "c"], ["s"])
    kept = only(pictures, np.array([True, False, True]))
    assert kept.names == ["a", "c"]
    np.testing.assert_array_equal(kept.concepts, [0, 0, 1, 1])
    np.testing.assert_array_equal(kept.styles, [0, 1, 4, 5])
    np.testing.assert_array_equal(kept.images, images[[0, 1, 4, 5]])
    assert POOL == 4
