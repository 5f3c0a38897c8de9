"""iosr-fast train-adapter: invalid options are refused before training, and a full disk at the end loses nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch comes with the cpu extra")
pytest.importorskip("open_clip", reason="open_clip comes with the cpu extra")
pytest.importorskip("lightning_fabric", reason="lightning-fabric comes with the train extra")

from PIL import Image  # noqa: E402
from typer.testing import CliRunner, Result  # noqa: E402

from iosr_fast.cli import train_adapter as tool  # noqa: E402
from iosr_fast.clip.adapter import load_adapter  # noqa: E402
from iosr_fast.utils.command import command_app  # noqa: E402
from tests.training.small import logged  # noqa: E402

APP = command_app(tool.train_adapter)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("red", "blue"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (64, 64), name).save(tmp_path / "in" / name / f"{i}.png")
    return tmp_path


def run(folder: Path, *options: str) -> Result:
    words = ["--data", str(folder / "in"), "--out", str(folder / "out" / "a.safetensors"), "--workers", "0"]
    return CliRunner().invoke(APP, [*words, "--first-adapted-block", "5", "--batch", "4", *options])


def printed(result: Result) -> str:
    """The output, without the frame around errors."""
    return " ".join(result.output.replace("│", " ").split())


REFUSED: list[tuple[Sequence[str], str]] = [
    (["--bottleneck", "0"], "expected a bottleneck of at least 1, got 0"),
    (["--epochs", "0"], "expected epochs of at least 1, got 0"),
    (["--batch", "0"], "expected batch of at least 1, got 0"),
    (["--objective", "dino", "--dino-out", "0"], "expected out_dim of at least 1, got 0"),
    (["--objective", "dino", "--augment"], "expected cached_views=0 and augment=False"),
    (["--accelerator", "abacus"], "abacus"),
    (["--schedule", "linear"], "expected schedule constant or cosine, got 'linear'"),
]
if not torch.cuda.is_available():
    REFUSED.append((["--accelerator", "cuda"], "can't train on accelerator 'cuda'"))


@pytest.mark.slow
@pytest.mark.parametrize(("options", "expected"), REFUSED, ids=[" ".join(options) for options, _ in REFUSED])
def test_invalid_options_are_refused_and_never_replaced_by_a_default(
    folder: Path, options: Sequence[str], expected: str
) -> None:
    refused = run(folder, *options)
    assert refused.exit_code == 2 and expected in printed(refused), refused.output
    assert not list(folder.rglob("*.csv"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "place"),
    [
        ([], (4, 256, 0.1)),
        (["--preset", "paper"], (0, 64, 0.03)),
        (["--preset", "paper", "--bottleneck", "8"], (0, 8, 0.03)),
        (["--preset", "demo", "--epochs", "1"], (3, 256, 0.1)),
        (["--preset", "paper", "--objective", "dino", "--epochs", "1", "--dino-out", "8"], (0, 64, 0.1)),
    ],
    ids=["default", "paper", "override", "demo", "dino"],
)
def test_a_preset_gives_the_defaults(folder: Path, options: Sequence[str], place: tuple[int, int, float]) -> None:
    out = folder / "a.safetensors"
    words = ["--data", str(folder / "in"), "--out", str(out), "--workers", "0", "--batch", "4", "--local-crops", "1"]
    done = CliRunner().invoke(APP, [*words, *options])
    assert done.exit_code == 0, done.output
    config = load_adapter(out).config
    assert (config.first_adapted_block, config.bottleneck, config.scale) == place
    assert config.training["epochs"] == 1


@pytest.mark.slow
def test_only_an_adapter_is_replaced(folder: Path) -> None:
    out = folder / "out" / "a.safetensors"
    out.parent.mkdir()
    out.write_text("my diary")
    refused = run(folder)
    assert refused.exit_code == 2 and "exists and is no adapter" in printed(refused)
    assert out.read_text() == "my diary"
    out.unlink()
    assert run(folder).exit_code == 0
    again = run(folder, "--bottleneck", "8")
    assert again.exit_code == 0 and "exists and is replaced when this training ends" in printed(again)
    assert load_adapter(out).config.bottleneck == 8


def test_a_file_where_the_logs_go_is_refused(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "a.safetensors.training").write_text("a file")
    refused = run(folder)
    assert refused.exit_code == 2 and "got a file of that name; move it" in printed(refused)


@pytest.mark.slow
def test_an_adapter_that_does_not_fit_the_disk_is_written_by_the_next_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("iosr_fast.clip.adapter.save_adapter", full)
        failed = run(folder, "--epochs", "2")
    assert failed.exit_code == 2 and "the same command writes it at once" in printed(failed)
    training = folder / "out" / "a.safetensors.training"
    assert len(logged(training)) == 2
    done = run(folder, "--epochs", "2")
    assert done.exit_code == 0 and (folder / "out" / "a.safetensors").is_file(), done.output
    assert [path.name for path in (training / "log").iterdir()] == ["version_0"], "no step was taken again"
    assert not (training / "checkpoints").exists()


def test_a_second_ctrl_c_says_where_it_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("iosr_fast.training.train.train_adapter", interrupted)
    monkeypatch.setattr(os, "_exit", leave)
    stopped = run(folder)
    assert stopped.exit_code == 130 and "stopped at once: the same command resumes from the last" in printed(stopped)
