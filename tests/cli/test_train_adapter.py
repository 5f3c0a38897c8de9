"""iosr-fast train-adapter: invalid options are refused before training, and a full disk at the end loses nothing."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from iosr_fast.backbones.adapter import load_adapter
from tests.cli import runs
from tests.training.small import logged


@pytest.fixture
def words(tmp_path: Path) -> list[object]:
    """A run on eight pictures of two classes."""
    for name in ("red", "blue"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (64, 64), name).save(tmp_path / "in" / name / f"{i}.png")
    given = ["--data", tmp_path / "in", "--out", tmp_path / "out" / "a.safetensors", "--workers", "0", "--batch", "4"]
    return ["train-adapter", *given, "--first-adapted-block", "5"]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("--bottleneck 0", {}, "expected a bottleneck of at least 1, got 0"),
    ("--batch 0", {"training": {"batch": 4}}, "expected batch of at least 1, got 0"),
    ("--accelerator abacus", {}, "abacus"),
    ("--objective dino", {"training": {"dino": None}}, "expected settings of --objective dino"),
    ("", {"training": {"dino": {}}}, "expected settings of --objective supervised"),
    ("", {"training": {"batch": "8"}}, "settings.json: Expected `int`, got `str` - at `$.training.batch`"),
    ("--model nothing", {}, "nothing"),
    ("--data missing", {}, "missing"),
    ("", {"training": {"accumulate": 3}}, "in 3 equal parts"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "settings", "expected"), REFUSED)
def test_invalid_settings_are_refused_and_never_replaced_by_a_default(
    words: list[object], tmp_path: Path, options: str, settings: dict[str, Any], expected: str
) -> None:
    file = written(tmp_path, settings)
    assert expected in runs.refused(*words, "--settings", file, *options.split())
    file.write_text("[training]")
    assert "settings.json to hold settings as a JSON object" in runs.refused(*words, "--settings", file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "settings.json"]


def written(folder: Path, settings: dict[str, Any]) -> Path:
    file = folder / "settings.json"
    file.write_text(json.dumps(settings))
    return file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "settings", "place"),
    [
        ("", {}, (4, 256, 0.1)),
        ("--preset paper --bottleneck 8", {"bottleneck": 9}, (0, 8, 0.03)),
        ("--preset demo", {"scale": 0.2, "training": {"epochs": 1}}, (3, 256, 0.2)),
        (
            "--preset paper --objective dino --epochs 1",
            {"training": {"dino": {"out_dim": 8, "local_crops": 1}}},
            (0, 64, 0.1),
        ),
    ],
    ids=["default", "paper", "demo", "dino"],
)
def test_options_go_before_settings_and_these_before_the_preset(
    words: list[object], tmp_path: Path, options: str, settings: dict[str, Any], place: tuple[int, int, float]
) -> None:
    runs.done(*words[:-2], "--settings", written(tmp_path, settings), *options.split())
    config = load_adapter(words[4]).config  # type: ignore[arg-type]
    assert (config.first_adapted_block, config.bottleneck, config.scale) == place
    assert config.training["epochs"] == 1
    used = json.loads((tmp_path / "out" / "a.safetensors.training" / "settings.json").read_bytes())
    assert (used["first_adapted_block"], used["bottleneck"], used["scale"]) == place
    assert used["training"] == {name: config.training[name] for name in used["training"]}


@pytest.mark.slow
def test_a_start_that_fails_leaves_what_was_there(words: list[object], tmp_path: Path) -> None:
    out, training = tmp_path / "out" / "a.safetensors", tmp_path / "out" / "a.safetensors.training"
    (tmp_path / "in" / "red" / "0.png").write_bytes(b"no picture")
    assert "0.png" in runs.refused(*words) and not out.parent.exists()
    (tmp_path / "in" / "red" / "0.png").unlink()
    runs.done(*words)
    (training / "checkpoints").mkdir()  # as of an interrupted training
    before = (training / "settings.json").read_bytes()
    (tmp_path / "in" / "red" / "0.png").write_bytes(b"no picture")
    assert "0.png" in runs.refused(*words, "--bottleneck", "8")
    assert (training / "settings.json").read_bytes() == before


@pytest.mark.slow
def test_only_an_adapter_is_replaced_and_a_full_disk_loses_no_training(
    words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, training = tmp_path / "out" / "a.safetensors", tmp_path / "out" / "a.safetensors.training"
    out.parent.mkdir()
    training.write_text("a file")
    assert "got a file of that name; move it" in runs.refused(*words)
    training.unlink()
    out.write_text("my diary")
    assert "exists and is no adapter" in runs.refused(*words) and out.read_text() == "my diary"
    out.unlink()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("iosr_fast.backbones.adapter.save_adapter", full)
        assert "the same command writes it at once" in runs.refused(*words, "--epochs", "2")
    assert len(logged(training)) == 2
    runs.done(*words, "--epochs", "2")
    assert [path.name for path in (training / "log").iterdir()] == ["version_0"], "no step was taken again"
    assert out.is_file() and not (training / "checkpoints").exists()
    assert "exists and is replaced when this training ends" in runs.run(*words, "--bottleneck", "8").output
    assert load_adapter(out).config.bottleneck == 8


def test_a_second_ctrl_c_says_that_the_same_command_resumes(
    words: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("iosr_fast.training.train.train_adapter", interrupted)
    monkeypatch.setattr(os, "_exit", leave)
    stopped = runs.run(*words)
    assert stopped.exit_code == 130 and "stopped at once: the same command resumes from the last" in stopped.output
