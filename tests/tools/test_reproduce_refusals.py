"""tools/reproduce_paper.py: what is damaged is named and made again, what can't be is refused before it begins."""

# ruff: noqa: F811 - fixtures are imported, and come in as arguments
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch comes with the train extra")
pytest.importorskip("open_clip", reason="open_clip comes with the train extra")

from tests.tools.test_reproduce import (  # the fixtures too
    Main,
    Pictures,
    engines,  # noqa: F401
    loaded,
    posed,  # noqa: F401
    rows_of,
    run,  # noqa: F401
)
from tools.reproduction import models, store
from tools.reproduction.problems import Problem, pose


def damage_tensor(folder: Path) -> None:
    file = folder / store.FILE
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 255]))


def lose_tensor(folder: Path) -> None:
    (folder / store.FILE).unlink()


def cut_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"schema": 1')


def put_another(folder: Path) -> None:
    other = next(path for path in folder.parent.glob("tiny-t[!e]*") if path != folder)
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


@pytest.mark.parametrize("damage", [damage_tensor, lose_tensor, cut_manifest, put_another])
@pytest.mark.parametrize("part", ["tiny-test-*", "tiny-text-*"])
def test_damaged_embeddings_are_named_and_made_again(
    run: Main, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], part: str
) -> None:
    out = run("--methods", "tip-adapter")
    told = (out / "results.md").read_text()
    folder = next((out / "embeddings").glob(part))
    damage(folder)
    shutil.rmtree(out / "cells")
    capsys.readouterr()
    run("--methods", "tip-adapter")
    assert f"{folder.name} is damaged and is made again" in " ".join(capsys.readouterr().err.split())
    assert (out / "results.md").read_text() == told


@pytest.mark.parametrize("text", ["", "{}", "[]", "5", None])
def test_a_damaged_cell_is_named_and_computed_again(
    run: Main, capsys: pytest.CaptureFixture[str], text: str | None
) -> None:
    out = run("--methods", "tip-adapter")
    told = (out / "results.md").read_text()
    path = next((out / "cells").glob("*.json"))
    whole = json.loads(path.read_text())
    whole["found"]["accuracy"] = 0.999  # the hash tells
    path.write_text(json.dumps(whole) if text is None else text)
    capsys.readouterr()
    run("--methods", "tip-adapter", "--status")
    shown = capsys.readouterr()
    assert f"cell {path.name} is damaged" in shown.err and "3 of 4 cells done" in shown.out and not path.exists()
    run("--methods", "tip-adapter")
    assert (out / "results.md").read_text() == told


def test_an_unreadable_picture_stops_the_run_by_name_and_nothing_before_it_is_lost(
    run: Main, posed: list[Problem], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = posed[0].source
    test = good.splits["test"]
    bad = Pictures(test.images, test.labels, test.keys, bad=(4,))
    posed[:] = [pose(replace(good, splits={**good.splits, "test": bad}))]
    with pytest.raises(SystemExit):
        run("--methods", "tip-adapter")
    assert f"can't read image tiny/test/{test.keys[4]}: cut off" in capsys.readouterr().err
    posed[:] = [pose(good)]
    encoded: list[str] = []
    encode = store.encode
    monkeypatch.setattr(store, "encode", lambda part, *more: (encoded.append(part.split), encode(part, *more))[1])
    run("--methods", "tip-adapter", "--seeds", "1", "--shots", "1")
    assert encoded == ["test", "val"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--methods", "tip-adaptor"], "expected --methods of paper, all, zero-shot"),
        (["--reducers", "middle"], "expected a reducer"),
        (["--shots", "1", "4"], "tiny has 3"),
        (["--shots", "0"], "expected --shots and --views of at least 1"),
        (["--views", "0"], "expected --shots and --views of at least 1"),
        (["--seeds", "-1"], "--seeds of at least 0"),
        (["--runtime", "fast"], "expected runtime"),
        (["--model", "ViT-Z"], "expected 'demo' or one of open_clip's models"),
        (["--adapter", "nowhere.safetensors"], "no adapter at"),
        (["--published", "nowhere.json"], "no file of published figures at nowhere.json"),
        (["--status"], "no run in"),
    ],
)
def test_what_can_not_be_is_refused_before_anything_is_made(
    run: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    with pytest.raises(SystemExit):
        run(*words)
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_clip_is_refused(
    run: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], posed: list[Problem]
) -> None:
    from iosr_fast.clip.adapter import init_adapter, save_adapter
    from iosr_fast.clip.load import load_clip

    adapter = init_adapter(load_clip("demo"))
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
    monkeypatch.setattr(models, "load_model", lambda *given: replace(loaded.__wrapped__(*given), engine="0" * 64))
    with pytest.raises(SystemExit):
        run("--methods", "zero-shot")
    assert "has changed since this run began" in capsys.readouterr().err
