"""benchmarks/claims: what a row says, and the data that each claim is measured on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, log_loss, precision_score, recall_score
from sklearn.model_selection import KFold
from sklearn.multiclass import OneVsRestClassifier

from benchmarks.claims import audit, data, promises, suggest
from benchmarks.claims.claim import Claim, fit
from benchmarks.claims.data import BURST, OTHERS, SIBLINGS, DataSet, LabelSets, drawn
from benchmarks.claims.promises import CHANCE, ONE_BY_ONE, PROMISES
from iosr_fast import Classifier, Embeddings
from iosr_fast.backbones.demo.pictures import load_pictures
from iosr_fast.encoders.encoder import unit
from iosr_fast.methods.conformal import of_answers
from tests.conftest import unit_rows
from tests.pictures import encode

pytestmark = pytest.mark.slow

CLASSES, WIDTH, EACH = 8, 16, 15
PARTS = ("val", "test")
CLAIMS = {claim.name: claim for module in (audit, promises, suggest) for claim in module.CLAIMS}


@pytest.fixture
def file(rng: np.random.Generator, tmp_path: Path) -> Path:
    """Images around the texts of their classes."""
    centres = unit_rows(rng, CLASSES, WIDTH)
    arrays: dict[str, np.ndarray] = {"text": centres.astype(np.float32)}
    for part, each in (("support1", 1), ("support4", 4), ("support8", 8), ("test", EACH)):
        arrays[f"{part}_y"] = np.repeat(np.arange(CLASSES), each)
        noise = 0.25 * rng.standard_normal((CLASSES * each, WIDTH))
        arrays[f"{part}_x"] = (centres[arrays[f"{part}_y"]] + noise).astype(np.float32)
    np.savez(tmp_path / "features.npz", **arrays)
    return tmp_path / "features.npz"


def rows_by_place(claim: Claim, file: Path, *words: str) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows that a script writes, by method and what they are of."""
    out = file.with_suffix(".json")
    claim.main([str(file), *words, "--json", str(out)])
    return {(row["method"], row["of"]): row for row in json.loads(out.read_text())}


@pytest.mark.parametrize("name", ["audit", "suggest"])
def test_a_row_has_the_means_of_its_draws_and_is_printed(
    name: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_by_place(CLAIMS[name], file, "--shots", "4", "--seeds", "2")
    printed = capsys.readouterr().out.splitlines()
    with pytest.raises(SystemExit):
        CLAIMS[name].main(["none.npz", "--json", str(file.with_name("none.json"))])
    assert "no feature file at" in capsys.readouterr().err
    assert len(printed) == len(rows) and all("features.npz" in line and "4 shots: " in line for line in printed)
    for row in rows.values():
        assert (row["bench"], row["seeds"], row["test_images"]) == (name, [0, 1], CLASSES * EACH)
        assert {"device", "versions", "commit"} <= row.keys()
        for figure in row["draws"][0].keys() - {"of"}:
            values = [draw[figure] for draw in row["draws"]]
            assert row[figure] is None or row[figure] == pytest.approx(np.mean(values)), figure


def test_the_audit_is_level_with_cleanlab_on_labels_exchanged_between_classes(file: Path) -> None:
    own = np.repeat(np.arange(6), 10)
    exchanged = audit.exchange_labels(own, 0.2, seed=3)
    assert (exchanged != own).sum() == 12 and (np.bincount(exchanged) == 10).all()
    rows = rows_by_place(CLAIMS["audit"], file, "--shots", "8")
    ours, rival = rows["auto", ""], rows["cleanlab", ""]
    assert ours["wrong"] == 6 and ours["auroc"] > rival["auroc"] - 0.01 and rival["estimate"] is None
    assert ours["found"] <= ours["listed"] and ours["false_alarms"] < 2
    assert rows_by_place(CLAIMS["audit"], file, "--shots", "1") == {}  # nothing can be left out


def test_promises_are_measured_on_draws_of_validation_and_test_images(file: Path) -> None:
    arrays = dict(np.load(file))
    arrays |= {"val_x": -arrays["support8_x"], "val_y": arrays["support8_y"]}  # rows that tell where they are from
    np.savez(file, **arrays)
    one, without_texts, *others = promises.automation_sources([str(file)], [8], 2)
    assert (one.name, without_texts.name) == (file.name, f"{file.name}, without texts")
    assert without_texts.draw(8, 0).support.text is None
    assert [cell.draw(8, 0).of for cell in others] == [OTHERS, "32 dimensions", "64 dimensions", "128 dimensions"]
    first, second = (one.draw(8, seed) for seed in one.seeds)
    for task in (first, second):
        images = np.concatenate([task.support.embeddings.plain, task.queries.plain])
        assert len(np.unique(images, axis=0)) == len(images) == (8 + EACH) * CLASSES
        assert (task.support.counts == 8).all() and 0.2 < of_validation(task.support.embeddings, arrays) < 0.8
    assert (first.support.embeddings.plain != second.support.embeddings.plain).any()


def of_validation(images: Embeddings, arrays: dict[str, np.ndarray]) -> float:
    """The share of images that are nearer to a validation image than to any test image."""
    nearest = [(images.plain @ arrays[name].T).max(1) for name in ("val_x", "test_x")]
    return float((nearest[0] > nearest[1]).mean())


def test_a_row_has_what_is_said_beside_what_is_true(file: Path) -> None:
    found = CLAIMS["automation"].main([str(file), "--shots", "4", "13", "--seeds", "2", "--json", f"{file}.json"])
    rows = {(row["data"], row["shots"], row["of"]): row for row in found}
    one = rows[file.name, 13, ""]
    assert one["own"] > 0.9 and one["true"] > 0.9 and one["covered"] > 0.7 and one["labelled_10%"] > 0.8
    assert one["labelled_1%"] == one["wrong_1%"] == 0, "104 images can promise no 1%"
    cells = {"", "half known", OTHERS, *(f"{width} dimensions" for width in (32, 64, 128))}
    assert {of for data, shots, of in rows if (data, shots) == (file.name, 13)} == cells
    assert (file.name, 4, "half known") not in rows and rows[file.name, 13, "half known"]["auroc"] > 0.9
    for row in found:
        assert "draws" not in row
        if row["of"] != "half known":
            assert row["low"] < row["own"] < row["high"] and 0 <= row["breaks"] <= row["made"] <= 2 * len(PROMISES)
            assert all(row[f"wrong_{name}"] <= row[f"worst_{name}"] for name in PROMISES)


def test_broken_promises_are_counted_over_all_draws() -> None:
    draw = {"own": 1.0}
    for labelled, broken, name in zip((0.0, 0.1, 0.2, 0.3), (0, 1, 1, 1), PROMISES, strict=True):
        draw |= {f"labelled_{name}": labelled, f"broken_{name}": broken, f"wrong_{name}": labelled / 2}
    found = promises.of_draws([draw, draw | {"wrong_5%": 0.4}])
    assert (found["made"], found["breaks"], found["worst_5%"], found["worst_10%"]) == (6, 6, 0.4, 0.15)
    assert found["p"] == pytest.approx(CHANCE**6)


def test_what_is_true_is_measured_as_elsewhere(file: Path) -> None:
    with np.load(file) as arrays:
        head = fit(Embeddings(arrays["support8_x"]), arrays["support8_y"], None, 100.0)
        rows, labels = unit(arrays["test_x"])[:-7], arrays["test_y"][:-7]
    found = promises.of_labels(head, Embeddings(rows), labels)
    proba, sets = head.predict_proba(rows), head.predict_sets(rows, 0.9)
    top, right = proba.max(1), head.predict(rows) == labels
    bins = [(top > low / 10) & (top <= (low + 1) / 10) for low in range(10)]
    expected = {
        "true": right.mean(),
        "alike": np.mean([right[labels == c].mean() for c in range(CLASSES)]),
        "loss": log_loss(labels, proba),
        "error": sum(abs(right[one].mean() - top[one].mean()) * one.mean() for one in bins if one.any()),
        "covered": np.mean([label in one for label, one in zip(labels, sets, strict=True)]),
        "labelled_10%": np.mean(head.predict(rows, max_error=0.1) != np.array(None)),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert found["alike"] != found["true"] and found["labelled_10%"] > 0


def test_a_calibration_is_of_the_other_half_or_of_the_tests_images(file: Path, tmp_path: Path) -> None:
    with np.load(file) as arrays:
        x, y = (np.concatenate([arrays[f"{part}_{name}"] for part in ("support8", "test")]) for name in "xy")
    split = np.repeat(["train", "test"], [8 * CLASSES, EACH * CLASSES])
    np.savez(tmp_path / "shops.npz", x=x, y=y, split=split)
    cells = promises.automation_sources([str(tmp_path / "shops.npz")], None, 1)
    for cell, of_train, tests in zip(cells, (None, True, False), (EACH, EACH, EACH / 2), strict=True):
        task = cell.draw(16, 0)
        assert (task.support.counts == 4).all() and len(task.labels) == tests * CLASSES
        given = () if task.validation is None else task.validation[0].plain
        rows = np.concatenate([*filter(len, (task.support.embeddings.plain, task.queries.plain, given))])
        assert len(np.unique(rows, axis=0)) == len(rows)
        if of_train is not None:
            near = (given @ unit(x).T).argmax(1) < 8 * CLASSES
            assert (near == of_train).all()
    rows = CLAIMS["automation"].main(
        [str(tmp_path / "shops.npz"), "--seeds", "1", "--json", str(tmp_path / "rows.json")]
    )
    assert [row["of"] for row in rows] == ["", SIBLINGS, OTHERS] and rows[0]["data"] == "shops.npz, as split"


def test_promises_on_a_tree_are_measured_by_level_beside_classes_alone(file: Path) -> None:
    found = CLAIMS["tree"].main([str(file), "--shots", "8", "--seeds", "2", "--json", f"{file}.json"])
    rows = {row["of"]: row for row in found if row["data"] == file.name}
    assert set(rows) == {"flat", "tree"} and len(found) == 4
    for row in rows.values():
        levels = [row.get(f"level{level}_10%", 0) for level in range(3)]
        assert sum(levels) == pytest.approx(row["labelled_10%"], abs=1e-4) and "draws" not in row
    assert rows["tree"]["labelled_10%"] >= rows["flat"]["labelled_10%"] > 0.5 > rows["flat"]["labelled_2%"] == 0


def test_a_burst_has_variants_of_one_picture_and_the_test_others() -> None:
    data_set = in_bursts(BURST)
    source = drawn(data_set, (4, 16), (0,))
    for shots, burst in ((4, 2), (16, 4)):
        task = source.draw(shots, 0)
        support, test = (pictures_of(data_set, one) for one in (task.support.embeddings, task.queries))
        assert (task.support.counts == shots).all() and (np.unique(support, return_counts=True)[1] == burst).all()
        assert not set(support) & set(test) and len(set(test)) == len(task.labels)


def in_bursts(variants: int) -> DataSet:
    """Six pictures of each of three classes."""
    numbers = np.arange(18 * variants)
    images = Embeddings(np.stack([np.cos(numbers), np.sin(numbers)], axis=1).astype(np.float32))
    return DataSet("made", images, np.repeat(np.arange(3), 6), variants=variants)


def pictures_of(data_set: DataSet, images: Embeddings) -> np.ndarray:
    return (data_set.images.plain @ images.plain.T).argmax(0) // data_set.variants


def test_a_calibration_is_of_further_variants_or_of_other_pictures() -> None:
    data_set = in_bursts(2 * BURST)
    assert promises.others_of(data_set) == dict.fromkeys((ONE_BY_ONE, SIBLINGS, OTHERS), data_set)
    for calibration, of_support in ((SIBLINGS, True), (OTHERS, False)):
        task = drawn(data_set, (16,), (0,), calibration).draw(16, 0)
        assert task.validation is not None
        parts = task.support.embeddings, task.validation[0], task.queries
        support, given, test = (pictures_of(data_set, one) for one in parts)
        np.testing.assert_array_equal(data_set.labels[given], task.validation[1])
        assert len(np.unique(np.concatenate([part.plain for part in parts]), axis=0)) == sum(map(len, parts))
        assert not set(given) & set(test) and (set(given) == set(support)) == of_support
        assert len(given) == (len(support) if of_support else BURST * 3), "half of six other pictures"


@pytest.mark.filterwarnings("ignore::iosr_fast.exceptions.LookAlikesWarning")
def test_bursts_are_left_out_together_and_one_by_one(rng: np.random.Generator) -> None:
    """Of pictures without a class, of which a burst gives the label away."""
    pictures = np.repeat(unit_rows(rng, 18, 4 * WIDTH), BURST, axis=0)
    images = Embeddings(unit(pictures + 0.06 * rng.standard_normal(pictures.shape)))
    data_set = DataSet("made", images, np.repeat(np.arange(3), 6), variants=BURST)
    tasks = [drawn(data_set, (16,), (0,), of).draw(16, 0) for of in ("", ONE_BY_ONE)]
    together, alone = (next(promises.automation(task, "gda", promises.HALVES)) for task in tasks)
    assert (together["of"], alone["of"]) == ("", ONE_BY_ONE) and alone["own"] > 0.9 > 0.6 > together["own"]


def test_each_concept_is_in_as_many_images_beside_another() -> None:
    pictures = np.repeat(np.arange(24, dtype=np.uint8), 64 * 64 * 3).reshape(24, 64, 64, 3)
    rows = [np.arange(3 * c, 3 * c + 3) for c in range(8)]
    images, members = data.paste_pairs(pictures, rows, 5, np.random.default_rng(0))
    assert images.shape == (20, 64, 64, 3) and (members.sum(0) == 5).all() and (members.sum(1) == 2).all()
    assert (images[:, :12] == 255).all()
    sides = np.sort(images[:, 32, [8, 56], 0] // 3, axis=1)
    np.testing.assert_array_equal(sides, [np.flatnonzero(row) for row in members])


def tagged(rng: np.random.Generator, n: int, tests: int) -> LabelSets:
    """Images with two of the labels, some of them far off."""
    centres = unit_rows(rng, CLASSES, WIDTH)
    members = np.stack([np.isin(np.arange(CLASSES), rng.choice(CLASSES, 2, replace=False)) for _ in range(n + tests)])
    images = Embeddings(unit(members @ centres + 0.35 * rng.standard_normal((n + tests, WIDTH))))
    return LabelSets(images[:n], members[:n], images[n:], members[n:], centres.astype(np.float32))


def test_several_labels_have_scikit_learns_figures(rng: np.random.Generator) -> None:
    task = tagged(rng, 240, 200)
    (ours,) = list(promises.labels(task, "auto", 0))
    head = fit(task.support, task.members.astype(int), task.text, task.tau)
    queries, truth = task.queries.plain, task.labels
    answers, accepted = head.predict(queries), head.predict(queries, max_error=0.1)
    average = average_precision_score(truth, head.decision_function(queries), average="macro")
    expected = {
        "map": average,
        "precision": precision_score(truth, answers, average="micro"),
        "found": recall_score(truth, answers, average="micro"),
        "labelled_10%": recall_score(truth, accepted, average="micro"),
        "wrong_10%": 1.0 - precision_score(truth, accepted, average="micro"),
    }
    assert {name: ours[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert abs(ours["said"] - ours["precision"]) < 0.1 and ours["found"] > ours["labelled_10%"] > 0
    assert f"{ours['said']:.1%} of" in head.snapshot().summary()


def test_a_promise_about_labels_is_broken_where_wrong_ones_are_beyond_chance() -> None:
    """Of 100 pictures with two accepted labels each: what counts is pictures, as of one both may be wrong."""

    def broken(wrong: int, both: bool) -> bool:
        truth = np.ones((100, 2), bool)
        truth[:wrong, 0], truth[: wrong if both else 0, 1] = False, False
        logits = np.full((100, 2), 5.0)
        judged, test = (of_answers(logits, one, logits > 0, np.arange(100)) for one in (np.ones((100, 2), bool), truth))
        found = promises.of_promises(judged, test, 200)
        assert found["labelled_1%"] == 0 and not found["broken_1%"], "100 pictures can promise no 1%"
        assert found["wrong_5%"] == wrong * (2 if both else 1) / 200
        return found["broken_5%"]

    assert [broken(wrong, both=True) for wrong in (9, 10)] == [False, True], "binom.sf(8, 100, 0.05) = 0.063"
    assert [broken(wrong, both=False) for wrong in (18, 20)] == [False, True], "9 and 10 of 100, of 18 and 20 of 200"


def test_the_rivals_parameter_is_chosen_on_the_support_images(rng: np.random.Generator) -> None:
    task = tagged(rng, 60, 40)
    images, members = task.support.plain, task.members.astype(int)

    def left_out(c: float) -> float:
        scores = np.zeros(members.shape)
        for rows, out in KFold(promises.FOLDS, shuffle=True, random_state=0).split(images):
            scores[out] = rival(c).fit(images[rows], members[rows]).decision_function(images[out])
        return average_precision_score(members, scores, average="macro")

    def rival(c: float) -> OneVsRestClassifier:
        return OneVsRestClassifier(LogisticRegression(C=c, max_iter=300))

    scores = rival(max(promises.CS, key=left_out)).fit(images, members).decision_function(task.queries.plain)
    found, in_bursts = (next(promises.labels(one, "auto", 0)) for one in (task, replace(task, of="bursts 0.2")))
    assert found["rival"] == pytest.approx(average_precision_score(task.labels, scores, average="macro"))
    assert in_bursts["rival"] is None and in_bursts["map"] == found["map"]


def test_scenes_are_made_of_disjoint_images(rng: np.random.Generator, tmp_path: Path) -> None:
    """Of images that differ in one direction each, so that scenes tell what they are made of."""
    each, classes = 20, 10
    arrays = {f"{part}_x": np.eye(2 * each * classes, dtype=np.float32)[half::2] for half, part in enumerate(PARTS)}
    arrays |= {f"{part}_y": np.repeat(np.arange(classes), each) for part in PARTS}
    arrays |= {"support1_x": arrays["val_x"][::each], "support1_y": np.arange(classes)}
    np.savez(tmp_path / "f.npz", **arrays)
    alone, *in_bursts = promises.labels_sources([str(tmp_path / "f.npz")], [4, 10], 2)
    assert [source.shots for source in (alone, *in_bursts)] == [(4, 10), *[(10,)] * len(promises.BURSTS)]
    task = alone.draw(10, 0)
    made = np.concatenate([task.support.plain, task.queries.plain])
    members = np.concatenate([task.members, task.labels])
    used = (made > 0).sum(0)
    assert used.max() == 1 and used.sum() > 0.9 * len(used) and len(task.members) == 40 and len(task.labels) == 120
    for scene, row in zip(made, members, strict=True):
        of_class = np.flatnonzero(scene) // 2 % (each * classes) // each
        assert sorted(of_class) == np.flatnonzero(row).tolist() and 1 <= len(of_class) <= 4
    assert scene[scene > 0].min() > 0.4 * scene.max()
    assert not np.array_equal(alone.draw(10, 1).members, task.members)
    for source in in_bursts:
        burst = source.draw(10, 0)
        cosines = burst.support.plain[::3] @ burst.support.plain[1::3].T
        assert (cosines.argmax(1) == np.arange(40)).all() and cosines.diagonal().max() < 0.99
        assert (burst.members == np.repeat(task.members, 3, axis=0)).all() and (burst.labels == task.labels).all()
        assert burst.groups is None or burst.groups.tolist() == np.repeat(np.arange(40), 3).tolist()
        assert (burst.groups is not None) == ("groups" in burst.of)


def test_pictures_of_a_table_are_support_or_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "Classifier", lambda _: Classifier("demo"))
    images, names = load_pictures("held-out", min_styles=5).images, ("a", "b", "c", "a;b", "")
    lines = ["path,labels", *(f"{i}.png,{names[i % 5]}" for i in range(60))]
    (tmp_path / "all.csv").write_text("\n".join(lines))
    for i in range(60):
        (tmp_path / f"{i}.png").write_bytes(encode(images[i]))
    rows = CLAIMS["labels"].main([f"own={tmp_path / 'all.csv'}", "--seeds", "2", "--json", str(tmp_path / "rows.json")])
    assert [(row["shots"], row["test_images"]) for row in rows] == [(4, 48), (7, 39), (10, 30)]
    assert rows[0]["data"] == "own" and rows[0]["breaks"] <= rows[0]["made"] and "draws" not in rows[0]
    (source,) = promises.labels_sources([f"aquarium={tmp_path / 'all.csv'}"], [6], 1)
    assert "CC BY" in source.name
