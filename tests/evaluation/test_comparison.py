"""iosr-fast evaluate features and demo: no test image has a part in a choice, and the rows agree with the tables."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.evaluation import demo
from iosr_fast.evaluation.comparison import compare, pairs_of
from iosr_fast.evaluation.features import open_sources, read_features
from iosr_fast.evaluation.rivals import RIVALS
from iosr_fast.evaluation.tasks import EncodedSet, with_unequal_classes
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods import METHODS
from iosr_fast.methods.config import Config
from iosr_fast.methods.conformal import of_logits
from iosr_fast.scoring.reference import score_reference
from tests.cli.runs import main, refused
from tests.conftest import unit_rows

CLASSES, WIDTH = 6, 16
Arrays = dict[str, np.ndarray]
Save = Callable[[Arrays], Path]


def near(rng: np.random.Generator, centres: np.ndarray, labels: np.ndarray, noise: float) -> np.ndarray:
    rows = centres[labels] + noise * unit_rows(rng, len(labels), centres.shape[1])
    unit: np.ndarray = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return unit


@pytest.fixture
def arrays(rng: np.random.Generator) -> Arrays:
    """Every array a feature file may have; float16, not quite normalised."""
    centres = unit_rows(rng, CLASSES, WIDTH)
    named: Arrays = {"text": near(rng, centres, np.arange(CLASSES), 0.9), "tau": np.float32(20.0)}
    for part, each in (("support1", 1), ("support2", 2), ("support4", 4), ("val", 5), ("test", 8)):
        labels = rng.permutation(np.repeat(np.arange(CLASSES), each))
        named[f"{part}_y"] = labels.astype(np.int32)
        named[f"{part}_x"] = (1.1 * near(rng, centres, labels, 1.3)).astype(np.float16)
        named[f"{part}_xa"] = near(rng, centres, labels, 0.8).astype(np.float16)
    return named


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(arrays: Arrays) -> Path:
        path = tmp_path / f"features{len(list(tmp_path.glob('*.npz')))}.npz"
        np.savez(path, **arrays)
        return path

    return write


def without(arrays: Arrays, pattern: str) -> Arrays:
    return {name: value for name, value in arrays.items() if not re.fullmatch(pattern, name)}


def evaluated(tmp_path: Path, *words: object) -> list[dict[str, Any]]:
    out = tmp_path / "rows.json"
    main("evaluate", "features", *words, "--json", out)
    rows: list[dict[str, Any]] = json.loads(out.read_text())
    return rows


def test_a_feature_file_is_read_as_it_was_written(arrays: Arrays, save: Save) -> None:
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
    task = read_features(save(without(arrays, r"text|tau|val_.*|.*_xa")), [2]).draw(2, 0)
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
        ({"test_x": np.zeros((48, 5))}, None, r"\(N, 16\), as wide as the other embeddings, got \(48, 5"),
        ({"test_x": np.zeros((48, WIDTH))}, None, "finite rows other than zero"),
        ({"test_y": np.zeros(3, int)}, None, r"test_y of shape \(48,\) of integers, got \(3,\)"),
        ({"test_y": np.full(48, 6)}, None, r"test_y in 0\.\.5, got 6\.\.6"),
        ({"test_y": np.zeros(48)}, None, "of integers, got .* float64"),
        ({"text": np.ones(16)}, None, r"text of shape \(N, D\)"),
        ({"tau": np.float32(0)}, None, "tau finite and above 0"),
        ({"test_x": np.array([{}])}, None, "not an .npz file of plain arrays"),
    ],
)
def test_what_is_wrong_with_a_feature_file_is_named(
    change: dict[str, np.ndarray | None], shots: list[int] | None, message: str, arrays: Arrays, save: Save
) -> None:
    path = save({name: value for name, value in {**arrays, **change}.items() if value is not None})
    with pytest.raises(IosrFastError, match=message):
        read_features(path, shots)


def test_other_files_are_refused(tmp_path: Path, arrays: Arrays, save: Save) -> None:
    with pytest.raises(FileNotFoundError, match="no feature file at"):
        read_features(tmp_path / "nothing.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(IosrFastError, match=r"not an \.npz file of plain arrays"):
        read_features(tmp_path / "text.npz")
    with pytest.raises(IosrFastError, match=r"expected arrays support1_x, .* got \['x'\]"):
        read_features(save({"x": np.zeros(3)}))
    path = save(arrays)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(IosrFastError, match="more than once; rename one"):
        open_sources([str(path), str(tmp_path / "other" / path.name)])
    with pytest.raises(IosrFastError, match="--shots from 1 to 4 on the demo's pictures, got"):
        open_sources(["demo"], [4, 8])
    with pytest.raises(IosrFastError, match="feature files with --no-text, got demo"):
        open_sources(["demo"], use_text=False)


def test_support_sets_are_drawn_from_the_largest(arrays: Arrays, save: Save) -> None:
    path = save(arrays)
    source = read_features(path, [2, 3], seeds=3, use_text=False)
    whole = read_features(path, [4]).draw(4, 0).support
    known = {row.tobytes(): label for row, label in zip(whole.embeddings.plain, whole.labels, strict=True)}
    drawn = [source.draw(2, seed).support for seed in source.seeds]
    for support in drawn:
        assert support.text is None and support.counts.tolist() == [2] * CLASSES
        assert [known[row.tobytes()] for row in support.embeddings.plain] == support.labels.tolist()
    assert len({support.embeddings.plain.tobytes() for support in drawn}) == 3
    np.testing.assert_array_equal(source.draw(2, 1).support.embeddings.plain, drawn[1].embeddings.plain)
    with pytest.raises(IosrFastError, match="--shots below 4 with --seeds"):
        read_features(path, [4], seeds=2)


def test_unequal_classes_have_all_or_a_quarter_of_their_images(arrays: Arrays, save: Save) -> None:
    source = with_unequal_classes(read_features(save(arrays), [4]))
    counts = source.draw(4, 0).support.counts
    assert sorted(counts) == [1, 1, 1, 4, 4, 4] and source.name.endswith(".npz, unequal classes")
    np.testing.assert_array_equal(source.draw(4, 0).support.counts, counts)


@pytest.mark.slow
@pytest.mark.parametrize("validated", [True, False])
def test_no_test_label_has_a_part_in_any_parameter(
    validated: bool, arrays: Arrays, save: Save, tmp_path: Path, rng: np.random.Generator
) -> None:
    arrays = arrays if validated else without(arrays, "val_.*")
    words = ("--shots", 1, 2, "--methods", "tip-adapter", "gda++", "proker", "auto", "--reducers", "none", "centre")
    first = evaluated(tmp_path, save(arrays), *words)
    moved = {**arrays, "test_y": rng.permutation(arrays["test_y"]), "test_x": arrays["test_x"][::-1]}
    second = evaluated(tmp_path, save(moved), *words)
    assert len(first) == len(second) == 2 * (2 + 2 + 2 + 1)
    kept = ("method", "reducer", "shots", "tuned_on", "tuned_accuracy", "chosen", "parameters")
    assert [[row[key] for key in kept] for row in first] == [[row[key] for key in kept] for row in second]
    assert [row["accuracies"] for row in first] != [row["accuracies"] for row in second]


def test_accuracies_are_those_of_the_plan_in_float64(arrays: Arrays, save: Save, tmp_path: Path) -> None:
    path = save(arrays)
    for row in evaluated(tmp_path, path, "--shots", 2, "--methods", "tip-adapter++", "ape", "--reducers", "pca"):
        task = read_features(path).draw(2, 0)
        plan = Config(method=row["method"], parameters=row["parameters"][0], reducer="pca").compile(task.support)
        right = (score_reference(plan, task.queries).argmax(1) == task.labels).mean()
        assert row["mean"] == pytest.approx(right)
        expected = of_logits(score_reference(plan, task.queries) * row["factors"][0], task.labels).reliability
        assert row["log_loss"] == pytest.approx(expected.log_loss, rel=1e-4)
        assert row["calibration_error"] == pytest.approx(expected.error, abs=1e-4)
        assert row["se"] == pytest.approx(np.sqrt(right * (1 - right) / len(task.labels))) and row["std"] is None
        assert row["test_images"] == [48] and row["seeds"] == [0] and row["tuned_on"] == "validation"


@pytest.mark.slow
def test_parameters_come_from_validation_images_or_the_support_set(arrays: Arrays, save: Save) -> None:
    pairs = pairs_of(["zero-shot", "tip-adapter", "ape", "auto"], ["none"])
    results = compare(read_features(save(arrays), [1, 2]), pairs).results
    assert [result.protocol for result in results] == ["none"] * 2 + ["validation"] * 4 + ["one-shot", "loo"]
    results = compare(read_features(save(without(arrays, "val_.*")), [1, 2]), pairs).results
    assert [result.protocol for result in results] == ["none"] * 2 + ["one-shot", "loo"] * 3


def test_methods_that_the_data_does_not_allow_are_left_out_by_name(
    arrays: Arrays, save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = save(without(arrays, r"text|val_.*|.*_xa"))
    words = ("--shots", 1, 2, 4, "--reducers", "none", "--methods", "all", "LinearDiscriminantAnalysis")
    rows = evaluated(tmp_path, bare, *words)
    available = {name for name, method in METHODS.items() if not (method.needs_text or method.needs_adapter)}
    assert {row["method"] for row in rows} - {*RIVALS} == available | {"auto"}
    out = " ".join(capsys.readouterr().out.split())
    assert "left out: tip-x compares images with texts" in out and "left out: gda++ compares adapted" in out
    assert (
        "left out: LinearDiscriminantAnalysis needs more images than classes, also" in out and "(at 1, 2 shots)" in out
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "tip-x"], "a method that the data allows, got none: tip-x compares"),
        (["--methods", "tipx"], "--methods of all, scikit-learn, auto, zero-shot, .* got tipx"),
        (["--reducers", "center"], "expected a reducer of none, centre, pca or .* got 'center'"),
        (["--shots", "3"], r"expected --shots out of \[1, 2, 4\]"),
        (["--json", "no/where.json"], "expected a folder to write"),
        (["none.npz"], "no feature file at none.npz"),
    ],
)
def test_wrong_options_are_refused_before_any_work(
    words: list[str], message: str, arrays: Arrays, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iosr_fast.evaluation.comparison.evaluate_draw", lambda *_: pytest.fail("work has begun"))
    bare = save(without(arrays, r"text"))
    assert re.search(message, " ".join(refused("evaluate", "features", bare, *words).split()))


@pytest.mark.slow
def test_rows_agree_with_the_tables(
    arrays: Arrays, save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two files have a table each, and one of the means of the rows that both have."""
    files = save(arrays), save(without(arrays, "text"))
    words = ("--methods", "zero-shot", "tip-adapter", "gda++", "auto", "--shots", 1, 4, "--reducers", "none", "pca")
    rows = evaluated(tmp_path, *files, *words)
    printed = capsys.readouterr().out
    assert "one draw ± its binomial standard error (se)" in printed and "48 test images of 6 classes" in printed
    assert len(rows) == 2 * ((1 + 2 + 2 + 1) + (2 + 2 + 1))
    lines = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in printed.splitlines()]
    for row in rows:
        column = 2 + [1, 4].index(row["shots"])
        of_row = [cells[column] for cells in lines if cells[:2] == [row["method"], row["reducer"]]]
        assert f"{100 * row['mean']:.1f} ± {100 * row['se']:.1f}" in of_row
        assert f"{row['log_loss']:.3f} / {100 * row['calibration_error']:.1f}" in of_row
    of_tip = [row["mean"] for row in rows if (row["method"], row["reducer"], row["shots"]) == ("tip-adapter", "pca", 4)]
    assert ["tip-adapter", "pca", f"{100 * np.mean(of_tip):.1f}"] in [[*cells[:2], cells[-1]] for cells in lines]
    assert "mean accuracy in % over 2 data sets (features0.npz, features1.npz)" in printed


def test_the_spread_over_seeds_is_a_standard_deviation(rng: np.random.Generator) -> None:
    labels = np.repeat(np.arange(CLASSES), 7)
    centres = unit_rows(rng, CLASSES, WIDTH)
    encoded = EncodedSet(Embeddings(near(rng, centres, labels, 1.3)), labels, centres, 20.0)
    (result,) = compare(demo.encoded_source(encoded, [2], [0, 1, 2]), [("tip-adapter", "centre")]).results
    row = result.row()
    assert row["se"] is None and row["std"] == result.spread == pytest.approx(np.std(row["accuracies"], ddof=1))
    assert row["mean"] == pytest.approx(np.mean(row["accuracies"])) and row["test_images"] == [3 * CLASSES] * 3
    assert row["seeds"] == [0, 1, 2] and len(row["parameters"]) == len(row["tune_seconds"]) == 3


def test_support_and_queries_of_pictures_share_nothing(rng: np.random.Generator) -> None:
    labels, centres = np.repeat(np.arange(CLASSES), 6), unit_rows(rng, CLASSES, WIDTH)
    encoded = EncodedSet(Embeddings(near(rng, centres, labels, 1.3)), labels, centres, 10.0)
    queries = []
    for shots in (1, 2, 4):
        task = encoded.task(shots, seed=3)
        assert len(task.support.embeddings) == CLASSES * shots and len(task.queries) == len(task.labels) == CLASSES * 2
        assert (task.support.embeddings.plain @ task.queries.plain.T).max() < 0.9999
        queries.append(task.queries.plain)
    np.testing.assert_array_equal(queries[0], queries[2])
    assert not np.array_equal(encoded.task(1, seed=4).queries.plain, queries[0])
    with pytest.raises(ValueError, match=r"shots from 1 to 4, .* got 5"):
        encoded.task(5, seed=0)
