"""What ships with the package: the pictures, the CLIP and its adapter, and the demo that uses them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from iosr_fast.backbones.demo.pictures import FOLDER, held_out, load_index, load_pictures, only
from iosr_fast.cli import app
from iosr_fast.cli.command import command_app
from iosr_fast.images.geometry import Geometry


def run(main: Callable[..., None], *words: str) -> Result:
    return CliRunner().invoke(command_app(main), list(words))


@pytest.mark.slow
def test_splits_share_no_concept_and_every_picture_is_there() -> None:
    index = load_index()
    generic, held_out = load_pictures("generic"), load_pictures("held-out")
    assert len(generic.names) == 1000 and not set(generic.names) & set(held_out.names)
    assert len(generic.names) + len(held_out.names) == len(index["concepts"])
    for pictures in (generic, held_out):
        assert pictures.images.shape[1:] == (64, 64, 3) and pictures.images.dtype == np.uint8
        assert np.bincount(pictures.concepts).min() >= 4
        blank = (pictures.images == 255).all((1, 2, 3))
        assert not blank.any(), f"{blank.sum()} blank pictures"
    fewer = load_pictures("held-out", min_styles=5)
    assert np.bincount(fewer.concepts).min() >= 5 and len(fewer.names) < len(held_out.names)
    with pytest.raises(ValueError, match="'generic' or 'held-out'"):
        load_pictures("test")  # type: ignore[arg-type]


def test_sizes_and_licences() -> None:
    index = load_index()
    pictures = sum((FOLDER / f"{style}.webp").stat().st_size for style in index["styles"])
    assert pictures + (FOLDER / "index.json").stat().st_size < 12e6
    assert sum(path.stat().st_size for path in FOLDER.glob("*.safetensors")) < 16e6
    for style, entry in index["styles"].items():
        text = (FOLDER / f"LICENSE-{entry['licence']}.txt").read_text()
        assert f"{style}.webp" in text and entry["author"] in text and "<year>" not in text
    assert "index.json" in (FOLDER / "LICENSE-emojibase.txt").read_text()


@pytest.mark.slow
def test_the_shipped_adapter_belongs_to_the_shipped_clip_and_reduces_overlap() -> None:
    import torch

    from iosr_fast.backbones.fuse import build_dual_encoder
    from iosr_fast.backbones.load import load_clip
    from iosr_fast.export.pretrained import choose_adapter
    from iosr_fast.training.overlap import overlap_area, pair_cosines
    from iosr_fast.utils.ranking import auroc

    clip = load_clip("demo")
    adapter = choose_adapter(clip, "auto")
    assert adapter is not None and adapter.config.training["pictures"] == len(load_pictures("generic").images)
    held_out = load_pictures("held-out", min_styles=5)
    rows = held_out.concepts < 80
    with torch.inference_mode():
        parts = [build_dual_encoder(clip, adapter)(torch.from_numpy(held_out.images[rows]))]
    plain, adapted = (pair_cosines(part.numpy(), held_out.concepts[rows]) for part in parts[0])
    assert overlap_area(*adapted) < overlap_area(*plain)
    assert auroc(*adapted) > auroc(*plain)


@pytest.mark.slow
def test_another_adapter_is_evaluated_on_the_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that changes nothing: adapted and plain embeddings are the same."""
    from iosr_fast.backbones.adapter import init_adapter, save_adapter
    from iosr_fast.backbones.load import load_clip
    from iosr_fast.evaluation import demo
    from tests.cli.runs import main

    test, validation = demo.held_out()
    few = only(test, np.arange(len(test.names)) % 8 == 0)
    monkeypatch.setattr(demo, "held_out", lambda: (few, validation))
    adapter = init_adapter(load_clip("demo"), 4, 8)
    save_adapter(adapter, tmp_path / "fresh.safetensors")
    rows_file = tmp_path / "rows.json"
    words = ("--methods", "tip-adapter", "tip-adapter++", "--reducers", "none", "--shots", "2", "--seeds", "1")
    main("evaluate", "demo", "--adapter", str(tmp_path / "fresh.safetensors"), "--json", str(rows_file), *words)
    rows = json.loads(rows_file.read_text())
    assert {row["adapter"] for row in rows} == {"fresh.safetensors"}
    plain, adapted = (row["mean"] for row in rows if row["bench"] == "accuracy")
    assert plain == adapted
    with pytest.raises(SystemExit, match="2"):
        main("evaluate", "demo", "--adapter", str(tmp_path / "none.safetensors"))
    assert "no adapter at" in capsys.readouterr().err


def test_the_ten_classes_are_of_groups_that_differ() -> None:
    from tools.demo.run import distinct_concepts

    groups = {concept["name"]: concept["subgroup"] for concept in load_index()["concepts"]}
    names = distinct_concepts(held_out()[0])
    assert len({groups[name] for name in names}) == 10 and {"chicken", "bear", "dolphin"} <= set(names)


@pytest.mark.slow
def test_the_whole_demo_briefly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step runs and ends with ten classes: one epoch on some generic concepts, few held-out concepts."""
    from iosr_fast.training.pictures import TensorPictures
    from tests.demo_cache import export_once
    from tools.demo import run as demo

    monkeypatch.setattr("iosr_fast.export.source.export_onnx", export_once)
    generic, (test, validation) = demo.demo_pictures(Geometry(64)), held_out()
    some = TensorPictures(generic.images[::20], generic.labels[::20], generic.class_names)
    few = only(test, np.arange(len(test.names)) % 8 == 0)
    monkeypatch.setattr(demo, "demo_pictures", lambda geometry: some)
    monkeypatch.setattr(demo, "held_out", lambda: (few, validation))
    done = run(demo.main, "--out", str(tmp_path), "--epochs", "1", "--views", "1", "--seeds", "2")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "report.json").read_text())
    zero_shot, plain, _, adapted, auto = (row["4"][0] for row in report["accuracy"].values())
    assert 0 < zero_shot < plain < adapted < 1 and auto > plain
    assert report["overlap"]["adapted, shipped"] < report["overlap"]["plain"]
    ten = report["ten_classes"]
    assert len(ten["classes"]) == 10 and ten["right"] / ten["queries"] > 0.3 and ten["alike"] == ten["queries"]
    assert f"{ten['right']} of {ten['queries']} other pictures right" in done.stdout
    assert f"the hard task: {len(few.names)} concepts" in done.stdout
    for name in ("adapter.safetensors", "classifier/manifest.json", "engine/encoder.onnx"):
        assert (tmp_path / name).is_file()
    pictures = sorted((tmp_path / "pictures").glob("*.png"))
    assert len(pictures) == 5 and all(picture.name in done.stdout for picture in pictures)
    classified = CliRunner().invoke(app, ["classify", str(tmp_path / "classifier"), str(tmp_path / "pictures")])
    assert classified.exit_code == 0 and len(classified.stdout.splitlines()) == 6, classified.output
