"""iosr-fast evaluate paper as a whole, on five concepts of the demo: stored results, refusals, messages."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="torch comes with the cpu extra")
pytest.importorskip("open_clip", reason="open_clip comes with the cpu extra")

from iosr_fast.evaluation.paper import model as models
from iosr_fast.evaluation.paper import problems, store
from iosr_fast.evaluation.paper.cells import Cells
from iosr_fast.evaluation.paper.problems import Problem, pose
from iosr_fast.images.preprocess import random_view, resize_and_crop
from iosr_fast.methods import METHODS
from iosr_fast.methods.support_set import make_support_set, mean_of_views
from tests.cli.runs import main
from tests.demo_cache import shared_cache
from tests.evaluation.paper_sets import CLASSES, Pictures, tiny, without, write_dtd

pytestmark = pytest.mark.slow
Main = Callable[..., Path]
loaded = lru_cache(models.load_model)  # loading the demo's CLIP and opening its engine take long
ARGUMENTS = {"--data": "demo", "--runtime": "torch", "--shots": "1 2", "--seeds": "1 2", "--views": "3"}


@pytest.fixture
def posed(monkeypatch: pytest.MonkeyPatch, demo_cache: Path) -> Iterator[list[Problem]]:
    """What --data opens; a test may change it."""
    monkeypatch.setenv("IOSR_FAST_CACHE", str(demo_cache))
    made = [pose(tiny())]
    monkeypatch.setattr(problems, "open_problems", lambda wanted, root: made)
    monkeypatch.setattr(models, "load_model", loaded)
    with shared_cache():
        assert loaded("demo", None, "auto", "torch").encoder.adapted
    yield made


@pytest.fixture
def run(posed: list[Problem], tmp_path: Path) -> Main:
    def run(*words: str, out: str = "out") -> Path:
        folder = tmp_path / out
        defaults = [word for name, values in ARGUMENTS.items() if name not in words for word in (name, *values.split())]
        main("evaluate", "paper", *defaults, "--out", str(folder), *words)
        return folder

    return run


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((out / "results.json").read_text())
    return rows


def refuse_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "encode", lambda *_: pytest.fail("encoded again"))


def encoded_splits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits of the parts that are encoded from here on."""
    splits: list[str] = []
    encode = store.encode
    monkeypatch.setattr(store, "encode", lambda part, *more: (splits.append(part.split), encode(part, *more))[1])
    return splits


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
    text = (out / "results.md").read_text()
    for row in rows:
        assert f"{100 * row['mean']:.1f} ± {100 * row['std']:.1f}" in text
    assert "validation images" in text and "2 seeds" in text
    refuse_encoding(monkeypatch)
    monkeypatch.setattr("iosr_fast.evaluation.paper.run.evaluate_draw", lambda *_: pytest.fail("computed again"))
    run("--methods", "all")
    assert (out / "results.md").read_text() == text
    run("--methods", "tip-adapter", "--shots", "2", "--seeds", "2")


def test_a_number_is_that_of_the_classifiers_own_steps(run: Main, posed: list[Problem]) -> None:
    """Tip-Adapter++ by hand: the same views, averaged, tuned on the validation pictures."""
    from iosr_fast.clip.prompts import embed_classes
    from iosr_fast.encoders.encoder import Embeddings
    from iosr_fast.evaluation.paper.store import Wanted
    from iosr_fast.methods.tuning.tune import tune
    from iosr_fast.methods.tuning.tuned import Tuned
    from iosr_fast.scoring.score import score

    out = run("--methods", "tip-adapter++", "--seeds", "2", "--shots", "2")
    data = posed[0].source
    model = models.load_model("demo", None, "auto", "torch")

    def embed(split: str, rows: np.ndarray, views: int, rng: np.random.Generator) -> Embeddings:
        geometry, images = model.clip.geometry, [data.splits[split].image(row) for row in rows]
        if views == 1:
            return model.encoder.encode(np.stack([resize_and_crop(image, geometry) for image in images]))
        pixels = [random_view(image, geometry, rng, True) for image in images for _ in range(views)]
        return mean_of_views(model.encoder.encode(np.stack(pixels)), views)

    parts, labels = [], []
    for c_rows in posed[0].support(2, 2):
        assert data.splits["train"].labels[c_rows].tolist() == list(range(CLASSES))
        parts.append(embed("train", c_rows, 3, Wanted(data, "train", c_rows, 3, True, 2).generator()))
        labels.append(np.arange(CLASSES))
    keys = Embeddings(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("plain", "adapted")))
    text = embed_classes(model.clip, data.class_names, data.templates)
    support = make_support_set(keys, np.concatenate(labels), text, model.clip.logit_scale)
    validation, queries = (
        embed(split, np.arange(len(data.splits[split])), 1, np.random.default_rng(0)) for split in ("val", "test")
    )
    tuned = tune("tip-adapter++", support, validation, data.splits["val"].labels)
    expected = float((score(tuned.compile(support), queries).argmax(1) == data.splits["test"].labels).mean())
    row = rows_of(out)[0]
    assert row["accuracies"] == [expected]

    def accuracy(of: Tuned) -> float:
        return float((score(of.compile(support), validation).argmax(1) == data.splits["val"].labels).mean())

    # The run encodes in other batches; rounding decides between settings that are right on as many images.
    assert accuracy(replace(tuned, parameters=row["parameters"][0])) == accuracy(tuned) > 0.6


def test_without_validation_parameters_come_from_the_support_asked_in_one_view(run: Main, posed: list[Problem]) -> None:
    posed[:] = [pose(tiny(validation=False))]
    out = run("--methods", "tip-adapter", "--shots", "1", "3")
    assert {row["shots"]: row["tuned_on"] for row in rows_of(out)} == {1: "one-shot", 3: "loo"}
    assert rows_of(out)[1]["tuned_images"] == [3 * CLASSES] * 2
    stored = [json.loads(path.read_text()) for path in (out / "embeddings").glob("tiny-train-*/manifest.json")]
    assert {part["views"] for part in stored} == {1, 3}
    assert "no validation split" in (out / "results.md").read_text()


def test_test_labels_choose_no_parameter(run: Main, posed: list[Problem], rng: np.random.Generator) -> None:
    words = ("--methods", "zero-shot", "tip-adapter++", "ape", "gda", "proker", "--seeds", "1")
    first = rows_of(run(*words, out="as they are"))
    data = posed[0].source
    test = data.splits["test"]
    mixed = Pictures(test.images, rng.permutation(test.labels), test.keys)
    posed[:] = [pose(replace(data, splits={**data.splits, "test": mixed}))]
    second = rows_of(run(*words, out="permuted"))
    fields = ("method", "shots", "parameters", "tuned_accuracy")
    assert [[row[key] for key in fields] for row in first] == [[row[key] for key in fields] for row in second]
    assert [row["accuracies"] for row in first] != [row["accuracies"] for row in second]


def test_an_interrupted_run_resumes_and_ends_with_the_same_table(run: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted while it writes embeddings, then while it writes cells: nothing that is stored is made again."""
    words = ("--methods", "tip-adapter", "tip-adapter++", "tip-x")
    whole = run(*words, out="whole")
    out = whole.parent / "interrupted"
    stored: dict[Path, int] = {}
    for owner, name, calls, folder in ((store, "_write", 3, "embeddings"), (Cells, "write", 2, "cells")):
        write, left = getattr(owner, name), [calls]

        def interrupted(*arguments: Any, write: Any = write, left: list[int] = left) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            write(*arguments)

        with monkeypatch.context() as patched, pytest.raises(SystemExit, match="130"):
            patched.setattr(owner, name, interrupted)
            run(*words, out="interrupted")
        assert all(path.stat().st_mtime_ns == written for path, written in stored.items())
        stored = {
            path: path.stat().st_mtime_ns for part in ("embeddings", "cells") for path in (out / part).glob("[!.]*")
        }
        assert len(list((out / folder).glob("[!.]*"))) == calls
    run(*words, out="interrupted")
    assert all(path.stat().st_mtime_ns == written for path, written in stored.items())
    assert (out / "results.md").read_text() == (whole / "results.md").read_text()
    timed = ("tune_seconds", "fit_seconds")
    one, other = ([{k: v for k, v in row.items() if k not in timed} for row in rows_of(each)] for each in (out, whole))
    assert one == other


def test_an_image_that_changes_is_encoded_again_though_its_size_is_the_same(
    run: Main, posed: list[Problem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from iosr_fast.evaluation.sets import open_evaluation_set

    root = write_dtd(tmp_path / "data")
    posed[:] = [pose(open_evaluation_set("dtd", root))]
    words = ("--methods", "tip-adapter", "--shots", "1", "--seeds", "1")
    before = rows_of(run(*words))
    split: Any = posed[0].source.splits["train"]
    for row in posed[0].support(1, 1)[0]:  # every picture of the support becomes another class's
        path = split.folder / split.keys[row]
        size, late = path.stat().st_size, path.stat().st_mtime_ns + 10**9
        Image.fromarray(tiny().splits["train"].images[(row + 3) % (3 * CLASSES)]).save(path)
        os.utime(path, ns=(late, late))
        assert path.stat().st_size == size
    fingerprint, posed[:] = posed[0].source.fingerprint, [pose(open_evaluation_set("dtd", root))]
    assert posed[0].source.fingerprint == fingerprint, "which has no times in it"
    splits = encoded_splits(monkeypatch)
    after = rows_of(run(*words))
    assert splits == ["train"], "validation and test images have not changed"
    assert after[0]["accuracies"] != before[0]["accuracies"]


def test_one_clip_called_in_two_ways_is_one_run(run: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load_model", lambda name, _, *more: loaded(name, None, *more))
    run("--methods", "zero-shot", "--pretrained", "weights.safetensors")
    refuse_encoding(monkeypatch)
    out = run("--methods", "zero-shot", "--pretrained", str(tmp_path / "weights.safetensors"))
    assert rows_of(out)[0]["pretrained"] == str(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("validation", [True, False])
def test_fewer_images_than_shots_are_refused_or_all_taken(
    run: Main, posed: list[Problem], capsys: pytest.CaptureFixture[str], validation: bool
) -> None:
    """One training picture of the first class, two of the second, three of the others."""
    data = tiny()
    train: Any = data.splits["train"]
    cut = train.rows([row for row in range(len(train)) if row not in (1, 2, 5)])
    data = replace(data, splits={**data.splits, "train": cut}, fingerprint="uneven")
    posed[:] = [pose(data if validation else without(data, "val"))]
    words = ("--methods", "tip-adapter", "gda++", "proker", "--shots", "1", "3", "--seeds", "1")
    with pytest.raises(SystemExit):
        run(*words)
    assert "got 3: tiny has 1. --fewer lets" in capsys.readouterr().err
    out = run(*words, "--fewer")
    assert {row["shots"] for row in rows_of(out)} == {1, 3}
    assert "2 of 5 classes have fewer than 3 images to draw from (1 and more)" in (out / "results.md").read_text()
    assert sorted(np.concatenate(posed[0].support(3, 1))) == list(range(3 * CLASSES - 3))
    with pytest.raises(SystemExit):
        run(*words[:2], "--shots", "4", "--fewer")
    assert "of the largest class and none without, got 4: tiny has 3" in capsys.readouterr().err


def test_a_damaged_cell_is_named_and_computed_again(run: Main, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("--methods", "tip-adapter")
    text = (out / "results.md").read_text()
    path = next((out / "cells").glob("*.json"))
    whole = json.loads(path.read_text())
    whole["found"]["accuracy"] = 0.999  # the hash gives it away
    path.write_text(json.dumps(whole))
    capsys.readouterr()
    run("--methods", "tip-adapter", "--status")
    shown = capsys.readouterr()
    assert f"cell {path.name} is damaged" in shown.err and "3 of 4 cells done" in shown.out and not path.exists()
    run("--methods", "tip-adapter")
    assert (out / "results.md").read_text() == text


def test_an_unreadable_picture_stops_the_run_by_name_and_nothing_before_it_is_lost(
    run: Main, posed: list[Problem], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = posed[0].source
    test: Any = good.splits["test"]
    bad = Pictures(test.images, test.labels, test.keys, bad=(4,))
    posed[:] = [pose(replace(good, splits={**good.splits, "test": bad}))]
    with pytest.raises(SystemExit):
        run("--methods", "tip-adapter")
    assert f"can't read image tiny/test/{test.keys[4]}: cut off" in capsys.readouterr().err
    posed[:] = [pose(good)]
    splits = encoded_splits(monkeypatch)
    run("--methods", "tip-adapter", "--seeds", "1", "--shots", "1")
    assert splits == ["test", "val"]


EARLY = [
    (["--methods", "tip-adaptor"], "expected --methods of paper, all, scikit-learn, auto, zero-shot"),
    (["--methods", "auto"], "expected --methods without auto"),
    (["--reducers", "middle"], "expected a reducer of none, centre, pca"),
    (["--shots", "0"], "'--shots': "),
    (["--views", "0"], "'--views': "),
    (["--seeds", "-1"], "'--seeds': "),
    (["--runtime", "fast"], "expected runtime"),
    (["--published", "nowhere.json"], "no file of published figures at nowhere.json"),
    (["--data", "dtd"], "expected --model"),
]


def test_wrong_options_are_refused_before_any_data_set_is_opened(
    run: Main, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(problems, "open_problems", lambda *_: pytest.fail("a large set was looked through"))
    for words, message in EARLY:
        with pytest.raises(SystemExit):
            run(*words)
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shots", "1", "4"], "tiny has 3"),
        (["--model", "ViT-Z"], "or one of open_clip's models, got 'ViT-Z'"),
        (["--adapter", "nowhere.safetensors"], "no adapter at"),
        (["--status"], "no run in"),
    ],
)
def test_a_run_that_can_not_be_is_refused_before_anything_is_written(
    run: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        run(*words)
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_adapter_of_another_clip_is_refused(run: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from iosr_fast.clip.adapter import init_adapter, save_adapter

    adapter = init_adapter(loaded("demo", None, "auto", "torch").clip)
    adapter.config = replace(adapter.config, clip_fingerprint="0" * 64)
    save_adapter(adapter, tmp_path / "other.safetensors")
    with pytest.raises(SystemExit):
        run("--adapter", str(tmp_path / "other.safetensors"))
    assert "the adapter was trained for another CLIP" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_of_other_things_or_of_another_run_is_refused(
    run: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(SystemExit):
        run(out="mine")
    assert "holds other things than a run's" in capsys.readouterr().err
    run("--methods", "zero-shot")
    with pytest.raises(SystemExit):
        run("--methods", "zero-shot", "--views", "4")
    assert "is of another run: views 3, now 4" in capsys.readouterr().err
    (tmp_path / "out" / "run.json").write_text("{")
    with pytest.raises(SystemExit):
        run("--methods", "zero-shot")
    assert "run.json is damaged" in capsys.readouterr().err


def test_without_an_adapter_the_paper_s_methods_are_told_and_a_named_one_is_refused(
    run: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(models, "load_model", loaded.__wrapped__)
    monkeypatch.setattr("iosr_fast.export.pretrained.DEMO_ADAPTER", None)
    with pytest.raises(SystemExit):
        run("--methods", "tip-adapter++")
    assert "tip-adapter++: no adapter for demo: give --adapter FILE" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    out = run("--seeds", "1", "--shots", "1")
    assert "left out: tip-adapter++, tip-x++" in capsys.readouterr().err
    assert [row["method"] for row in rows_of(out)] == ["zero-shot", "tip-adapter", "tip-x"]
    row = rows_of(out)[2]
    assert row["std"] is None and f"{100 * row['mean']:.1f} ± {100 * row['se']:.1f}" in (out / "results.md").read_text()


def test_weights_that_change_during_a_run_are_refused(
    run: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "load_model", lambda *source: replace(loaded(*source), engine="0" * 64))
    with pytest.raises(SystemExit):
        run("--methods", "zero-shot")
    assert "has changed since this run began" in capsys.readouterr().err


def test_a_resnet_is_encoded_by_open_clip_s_own_encoder() -> None:
    import torch

    from iosr_fast.clip.adapter import encode_plain

    model = models.load_model("RN50", "none", "auto")
    assert model.adapter is None and not model.encoder.adapted
    pixels = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    embeddings = model.encoder.encode(pixels)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (model.clip.mean, model.clip.std))
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        rows = encode_plain(model.clip, (scaled - mean) / std).numpy()
    np.testing.assert_allclose(embeddings.plain, rows / np.linalg.norm(rows, axis=1, keepdims=True), atol=1e-5)
    assert embeddings.adapted is None and model.encoder.width == embeddings.plain.shape[1]
