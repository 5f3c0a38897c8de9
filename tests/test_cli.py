"""The commands' manners: help as it is written, one line for an error, and that line before any work."""

from __future__ import annotations

import csv
import importlib
import io
import logging
import re
import subprocess
import sys
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from iosr_fast import Classifier, classifier
from iosr_fast.cli import app
from iosr_fast.pipeline.tables import escaped, write_table
from iosr_fast.utils.command import command_app
from iosr_fast.utils.outputs import check_new_file, check_new_folder
from iosr_fast.utils.progress import progress
from tests import ROOT
from tests.state.live_parts import LetterText, PixelEncoder, engine_folder, pictures, small_classifier

TOOLS = (
    *("build_engine", "classify", "embed", "load_test", "open_images_subset", "serve_ray", "train_adapter"),
    *("tune_kernels", "demo.bundle", "demo.run", "demo.train_clip"),
)


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(*words: object) -> str:
    """What a command says to its user's mistake, after exit code 2."""
    done = run(*words)
    assert done.exit_code == 2 and "Traceback" not in done.output, done.output
    return done.output


def never(*_: object, **__: object) -> Any:
    raise AssertionError("work has begun")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images, labels = pictures(np.random.default_rng(0), 3, 3)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = tmp_path / "in" / f"class_{label}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "in"


@pytest.fixture
def unfitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Classifier:
    """What from_pretrained gives in these tests."""
    made = Classifier(PixelEncoder(), engine_folder(tmp_path / "engine"), LetterText(), 20.0)
    monkeypatch.setattr(Classifier, "from_pretrained", lambda *_, **__: made)
    return made


def all_apps() -> dict[str, typer.Typer]:
    """iosr-fast, and every tool that typer reads the words of."""
    apps = {"iosr-fast": app}
    for name in ("benchmark", "report"):
        apps[name] = importlib.import_module(f"tools.{name}").app
    for name in TOOLS:
        try:
            main = importlib.import_module(f"tools.{name}").main
        except (ImportError, SystemExit):
            continue  # a package of an extra is missing here
        apps[name] = command_app(main)
    return apps


def test_help_shows_what_stands_in_brackets() -> None:
    checked = 0
    for name, one in all_apps().items():
        command = typer.main.get_command(one)
        commands = getattr(command, "commands", {None: command})
        for word, sub in commands.items():
            shown = CliRunner().invoke(one, [*([word] if word else []), "--help"]).output
            for parameter in sub.params:
                told = getattr(parameter, "help", None) or ""
                if "[" in told:
                    assert re.sub(r"\s", "", told) in re.sub(r"\s", "", shown), f"{name} {word}: {told}"
                    checked += 1
    assert checked > 25


def test_every_command_is_made_without_markup() -> None:
    sources = [path for part in ("iosr_fast", "tools", "kernels") for path in (ROOT / part).rglob("*.py")]
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert "typer.run(" not in text, path
        for call in re.findall(r"typer\.Typer\((.*?)\)\n", text, re.DOTALL):
            assert "rich_markup_mode=None" in call, path


def test_fit_takes_no_toy_without_a_word(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Classifier, "from_pretrained", never)
    assert "--model" in refused("fit", folder, "--out", tmp_path / "out")
    assert "near chance on photographs" in re.sub(r"\s+", " ", run("fit", "--help").output)


def test_the_demo_that_nobody_named_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretrained = pytest.importorskip("iosr_fast.export.pretrained")
    opened = pretrained.Opened(PixelEncoder(), Path("none"), LetterText(), 20.0)
    monkeypatch.setattr(pretrained, "open_pretrained", lambda model, *_: opened if model == "demo" else never())
    classifier._warn_of_the_demo.cache_clear()
    with caplog.at_level(logging.WARNING, "iosr_fast"):
        Classifier.from_pretrained("demo")
        assert not caplog.records
        Classifier.from_pretrained()
        Classifier.from_pretrained()
    assert len(caplog.records) == 1
    for words in ("64x64", "emoji", "near chance on photographs", "'ViT-B-32', 'laion2b_s34b_b79k'"):
        assert words in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"adapter": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"adapter": __file__}, "test_cli.py"),
        ({"adapter": "clip"}, "not an adapter of iosr_fast"),
        ({"adapter": "demo"}, "expected demo with 6 blocks of width 128, got ViT-B-32 with 12 of width 768"),
        ({"engine": "nowhere"}, "expected a folder with a manifest.json"),
        ({"runtime": "abacus"}, "expected runtime 'auto' or one of"),
        ({"precision": "fp7"}, "expected a precision of"),
        ({"precision": "bf16", "runtime": "torch"}, "which compute in bf16"),
        ({"pretrained": "nowhere/weights.pt"}, "no weights file at"),
        ({"pretrained": "no-such-tag"}, "has no pretrained tag 'no-such-tag'"),
        ({"pretrained": None}, "needs weights"),
        ({"model": "ViT-Z-99"}, "one of open_clip's models"),
        ({"model": "RN50", "pretrained": "openai"}, "RN50 has a ResNet image encoder; expected"),
        ({"model": "convnext_base_w", "pretrained": "laion2b_s13b_b82k"}, "has a timm image encoder"),
        ({"model": "ViT-B-16-SigLIP", "pretrained": "webli"}, "has a timm image encoder"),
        ({"model": "EVA02-B-16", "pretrained": "merged2b_s8b_b131k"}, "has a timm image encoder"),
        ({"model": "coca_ViT-B-32", "pretrained": "laion2b_s13b_b90k"}, "an attentional pooler"),
        ({"model": "ViT-L-14-CLIPA", "pretrained": "none"}, "pooling; expected 'tok'"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_clip_is_made(
    options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_clip = pytest.importorskip("open_clip")
    from iosr_fast.export.pretrained import DEMO_ADAPTER, DEMO_FOLDER

    for name in ("create_model", "create_model_and_transforms", "get_tokenizer", "load_openai_model"):
        monkeypatch.setattr(open_clip, name, never, raising=False)
    files = {"demo": DEMO_ADAPTER, "clip": DEMO_FOLDER / "clip.safetensors"}
    given = {"model": "ViT-B-32", "pretrained": "openai", **options}
    if "adapter" in given:
        given["adapter"] = files.get(given["adapter"], given["adapter"])
    with pytest.raises((ValueError, OSError), match=said):
        Classifier.from_pretrained(**given)


def test_the_configuration_refuses_what_the_model_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """check_architecture against fold's look at the encoder itself, made of shapes alone."""
    torch, open_clip = pytest.importorskip("torch"), pytest.importorskip("open_clip")
    from open_clip.model import _build_vision_tower

    from iosr_fast.clip.architecture import check_architecture, vision_config
    from iosr_fast.clip.fuse import _check_fusible

    def says(act: Any) -> bool:
        try:
            act()
        except ValueError:
            return True
        return False

    seen = {True: 0, False: 0}
    for name in open_clip.list_models():
        vision = vision_config(name)
        if vision.get("timm_model_name") or isinstance(vision.get("layers"), list):
            assert says(lambda name=name: check_architecture(name))
            continue
        with torch.device("meta"):
            tower = _build_vision_tower(512, {**vision, "layers": 1})
        by_model = says(lambda name=name, tower=tower: _check_fusible(name, tower))
        assert says(lambda name=name: check_architecture(name)) == by_model, name
        seen[by_model] += 1
    assert min(seen.values()) > 3


@pytest.mark.parametrize(
    "failure",
    [
        urllib.error.URLError("no route to host"),
        ConnectionError("offline mode is enabled\nsecond line"),
        RuntimeError("Failed to download weights for 'ViT-B-32'\ntraceback of theirs"),
        Exception(""),
    ],
)
def test_a_download_that_fails_is_one_line_that_names_the_model(
    failure: Exception, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_clip = pytest.importorskip("open_clip")

    def fails(*_: object, **__: object) -> Any:
        raise failure

    monkeypatch.setattr(open_clip, "create_model", fails)
    words = ("--model", "ViT-B-32", "--pretrained", "laion2b_s34b_b79k")
    said = refused("fit", folder, "--out", tmp_path / "out", *words)
    assert "the weights 'laion2b_s34b_b79k' of ViT-B-32 can't be downloaded" in said and "--pretrained FILE" in said
    assert len(said.strip().splitlines()) == 1
    with pytest.raises(OSError, match="of ViT-B-32 can't be downloaded"):
        Classifier.from_pretrained("ViT-B-32", "laion2b_s34b_b79k")


def test_a_place_that_can_not_be_written_is_named_before_the_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Classifier, "from_pretrained", never)
    monkeypatch.setattr(Classifier, "load", never)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "manifest.json").write_text('{"name": "an extension of a browser"}')
    engine_folder(tmp_path / "an-engine")
    for place, said in {
        "file": "got the file",
        "file/below": "got the file",
        "mine": "holds other things than iosr_fast writes",
        "foreign": "holds other things than iosr_fast writes",
        "an-engine": "holds a folder of kind 'engine'",
    }.items():
        assert said in refused("fit", folder, "--model", "demo", "--out", tmp_path / place)
    for place, said in {
        "labels.txt": "to end in .csv or .parquet",
        "nowhere/labels.csv": "expected a folder to write",
        "file/labels.csv": "expected a folder to write",
        "mine": "to end in .csv or .parquet",
    }.items():
        assert said in refused("classify", tmp_path / "bundle", folder, "--out", tmp_path / place)
    (tmp_path / "there.csv").write_text("mine")
    assert "exists already" in refused("classify", tmp_path / "bundle", folder, "--out", tmp_path / "there.csv")
    (tmp_path / "folder.csv").mkdir()
    assert "got the folder" in refused("classify", tmp_path / "bundle", folder, "--out", tmp_path / "folder.csv")
    assert (tmp_path / "there.csv").read_text() == "mine" and (tmp_path / "mine" / "thesis.txt").exists()


def test_places_that_can_be_written_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine_folder(tmp_path / "engine")
    (tmp_path / "empty").mkdir()
    for place in ("new", "deep/er/new", "empty"):
        check_new_folder(tmp_path / place, "classifier")
    check_new_folder(tmp_path / "engine", "engine")
    check_new_file(tmp_path / "new.csv", (".csv",))
    monkeypatch.chdir(tmp_path)
    check_new_file(Path("new.csv"))
    check_new_folder(Path("new"))
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(PermissionError, match="can't be written to"):
        check_new_file(tmp_path / "new.csv")
    with pytest.raises(PermissionError, match="can't be written to"):
        check_new_folder(tmp_path / "new")


@pytest.mark.parametrize(
    "words", [("benchmark.py", "updates", "--cases", "nonsense"), ("report.py", "--results", "empty", "--out", "out")]
)
def test_a_mistake_with_a_tool_is_a_line(words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("the page of before")
    command = [sys.executable, str(ROOT / "tools" / words[0]), *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: expected "), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert (tmp_path / "out" / "README.md").read_text() == "the page of before"


@pytest.mark.parametrize(
    ("tool", "words"),
    [
        ("load_test", ("--json", "nowhere/report.json")),
        ("benchmark", ("score", "--json", "nowhere/rows.json")),
        ("benchmark", ("classifier", "--csv", ".")),
    ],
)
def test_tools_look_at_the_place_before_the_work(
    tool: str, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"tools.{tool}")
    monkeypatch.setattr(module, "open_bundle", never, raising=False)
    monkeypatch.setattr(module, "limit_blas", never, raising=False)
    one = module.app if hasattr(module, "app") else command_app(module.main)
    done = CliRunner().invoke(one, list(words))
    assert done.exit_code == 2 and "expected a f" in done.output, done.output


def test_options_and_folders_are_looked_at_before_a_clip_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Classifier, "from_pretrained", never)
    common = ("--model", "demo", "--out", tmp_path / "out")
    assert "found no folder" in refused("fit", tmp_path / "nowhere", *common)
    assert "found no folder" in refused("fit", folder / "class_0" / "0.png", *common)
    assert "at least two class folders" in refused("fit", folder / "class_0", *common)
    assert "expected a method of" in refused("fit", folder, *common, "--method", "magic")
    assert "leave alpha out" in refused("fit", folder, *common, "--alpha", "1")
    assert "views of at least 1, got -1" in refused("fit", folder, *common, "--views", "-1")
    assert "key_precision of fp32" in refused("fit", folder, *common, "--key-precision", "fp8")
    assert "expected templates with {}" in refused("fit", folder, *common, "--template", "a photo")


def test_classify_names_what_is_missing_before_the_bundle_is_opened(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Classifier, "load", never)
    (tmp_path / "empty").mkdir()
    said = refused("classify", "bundle", folder, tmp_path / "nowhere.png", tmp_path / "gone")
    assert "no such file or folder" in said and "nowhere.png" in said and "gone" in said
    assert "found none in" in refused("classify", "bundle", tmp_path / "empty")
    assert "found none in" in refused("classify", "bundle", tmp_path / "empty", "--out", tmp_path / "labels.csv")
    assert "--top of at least 1, got -3" in refused("classify", "bundle", folder, "--top", "-3")
    assert not (tmp_path / "labels.csv").exists()


def test_a_folder_given_to_predict_is_called_a_folder(folder: Path) -> None:
    with pytest.raises(ValueError, match="it is a folder; fit_folder and predict_folder"):
        small_classifier().predict(folder)
    with pytest.raises(ValueError, match="no such file"):
        small_classifier().predict(folder / "nowhere.png")


def test_nothing_read_is_no_success(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = small_classifier(engine_folder(tmp_path / "engine"))
    monkeypatch.setattr(Classifier, "load", lambda *_, **__: made)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    said = refused("classify", "bundle", tmp_path / "bad.png", "--skip-bad", "--batch", "2", "--threads", "1")
    assert "none of the images could be read" in said
    done = run("classify", "bundle", tmp_path / "bad.png", folder, "--skip-bad", "--batch", "2", "--threads", "1")
    assert done.exit_code == 0 and "left out 1 of 10 images" in done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--max-body-mb", "nan"), "expected --max-body-mb to be a number of MB, got nan"),
        (("--max-image-mb", "inf"), "expected --max-image-mb to be a number of MB, got inf"),
        (("--token-file", "nowhere"), "can't read the token in nowhere"),
        (("--token-file", "."), "can't read the token in ."),
        (("--port", "-1"), "expected a port"),
    ],
)
def test_options_of_serve_are_called_by_name(words: tuple[str, ...], said: str) -> None:
    pytest.importorskip("fastapi")
    assert said in refused("serve", "bundle", *words)


@pytest.mark.parametrize("command", ["classify", "export-triton", "serve"])
def test_what_is_no_bundle_is_a_line(command: str, folder: Path, tmp_path: Path) -> None:
    more = {"classify": (folder,), "export-triton": (tmp_path / "models",), "serve": ()}[command]
    engine_folder(tmp_path / "an-engine")
    (tmp_path / "empty").mkdir()
    for wrong in ("nowhere", "in/class_0/0.png", "empty", "an-engine"):
        said = refused(command, tmp_path / wrong, *more)
        assert said.startswith("iosr-fast: ") and len(said.strip().splitlines()) == 1, said


def test_fit_shows_what_it_does(
    unfitted: Classifier, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    unfitted.fit_folder(folder, method="tip-adapter", views=2, progress=True)
    for verb in ("encode", "tune", "9/9"):
        assert verb in shown.getvalue()
    shown.truncate(0)
    unfitted.fit_folder(folder, method="tip-adapter", views=2)
    with progress("quiet", 3, shown=False) as advance:
        advance(1)
    assert "encode" not in shown.getvalue() and "quiet" not in shown.getvalue()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    done = run("fit", folder, "--model", "demo", "--out", tmp_path / "out", "--views", "1")
    assert done.exit_code == 0 and "3 classes, 9 images" in done.output, done.output


def test_fit_says_once_what_it_skips(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "notes.txt").write_text("not an image")
    done = run("fit", folder, "--model", "demo", "--out", tmp_path / "out", "--views", "1")
    assert done.exit_code == 0, done.output
    assert caplog.text.count("skipped 1 of") == 1


FORMULAS = (
    *('=HYPERLINK("http://x","y")', "+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", '"=1', "'=1", "\u00a0=1"),
    *("\ufeff=1", "\u200b=1", "\uff1d1", "\uff20x", "-1", "''+1"),
)
HARMLESS = ("cat", "a=b", "3-1", "'s", '"quoted"', "", "  ", "caf\u00e9", "x@y", "#1", "1e5")


def test_no_cell_is_a_formula(tmp_path: Path) -> None:
    rows: list[Any] = [(name, [[name, 0.5], ["plain", 0.25]]) for name in (*FORMULAS, *HARMLESS)]
    rows.append(("photos/a.jpg", "=error"))
    write_table(tmp_path / "labels.csv", rows, top=2)
    with (tmp_path / "labels.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.reader(file))[1:]
    for (name, _), cells in zip(rows[:-1], found, strict=False):
        expected = f"'{name}" if name in FORMULAS else name
        assert cells == [expected, expected, "0.5000", "plain", "0.2500", ""]
    assert found[-1][-1] == "'=error"
    for name in (*FORMULAS, *HARMLESS):  # and programs get every name back
        told = escaped(name)
        assert (told[1:] if told[:1] == "'" and escaped(told[1:]) == told else told) == name
    from tools.evaluation.table import write_csv

    write_csv(tmp_path / "rows.csv", [{"bench": "accuracy", "data": "=x.npz", "gain": -0.5, "seeds": [1]}])
    assert "accuracy,'=x.npz,-0.5,[1]" in (tmp_path / "rows.csv").read_text()


def test_parquet_keeps_names_as_they_are_and_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    rows: list[Any] = [(name, [[name, 0.5]]) for name in FORMULAS]
    write_table(tmp_path / "labels.parquet", rows, top=1)
    assert pq.read_table(tmp_path / "labels.parquet")["label"].to_pylist() == list(FORMULAS)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'iosr_fast\[parquet\]' brings it"):
        write_table(tmp_path / "again.parquet", rows, top=1)


def test_a_missing_package_is_answered_with_the_pip_command(folder: Path, tmp_path: Path) -> None:
    """As after `pip install iosr_fast[cpu]`: every way in, in a process where no other extra can be imported."""
    code = f"""
import io, runpy, sys
blocked = "torch torchvision open_clip onnx onnxscript tritonclient pyarrow lightning_fabric"
sys.modules.update(dict.fromkeys(blocked.split()))
from typer.testing import CliRunner
from iosr_fast import Classifier
from iosr_fast.cli import app

def told(act):
    try:
        print(act())
    except ImportError as error:
        print(error)

def run(*words):
    done = CliRunner().invoke(app, words)
    return f"{{done.exit_code}} {{done.output.strip()}}"

told(lambda: Classifier.from_pretrained("demo"))
told(lambda: run("fit", {str(folder)!r}, "--model", "demo", "--out", {str(tmp_path / "out")!r}))
told(lambda: run("export-triton", "bundle", {str(tmp_path / "models")!r}))
told(lambda: run("classify", "bundle", {str(folder)!r}, "--out", {str(tmp_path / "labels.parquet")!r}))

def tool(name):
    sys.argv, sys.stderr = [name], io.StringIO()
    try:
        runpy.run_path(f"tools/{{name}}.py", run_name="__main__")
    except SystemExit as stop:
        return f"{{stop.code}} {{sys.stderr.getvalue().strip()}}"

told(lambda: tool("build_engine"))
told(lambda: tool("train_adapter"))
sys.modules["fastapi"] = None
told(lambda: run("serve", "bundle"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert len(lines) == 7, done.stdout + done.stderr
    extras = ("train", "train", "triton-server", "parquet", "train", "train", "serve")
    for line, extra in zip(lines, extras, strict=True):
        assert f"is not installed: pip install 'iosr_fast[{extra}]' brings it" in line, lines
    for line, prefix in zip(lines[1:], ["iosr-fast"] * 3 + ["error"] * 2 + ["iosr-fast"], strict=True):
        assert line.startswith(f"2 {prefix}: ")
