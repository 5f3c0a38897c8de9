"""Every command line: help as it is written, one line for an error, and that line before any work."""

from __future__ import annotations

import importlib
import io
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner

from iosr_fast.cli import app
from iosr_fast.cli.command import command_app, output, say, write_figures, write_new
from iosr_fast.cli.options import echo_first
from iosr_fast.cli.suggest import _table
from iosr_fast.evaluation import table
from iosr_fast.evaluation.provenance import write_rows
from iosr_fast.exceptions import BadImageError, IosrFastError, printable
from iosr_fast.files.suggest import FolderSuggestions
from iosr_fast.head.labelled_images import labelled_images
from iosr_fast.images.listing import Skipped
from iosr_fast.reports.page import document
from iosr_fast.sealed.folders import check_new_folder
from iosr_fast.sealed.outputs import check_new_file
from iosr_fast.utils.text import PrintableFormatter
from tests import ROOT
from tests.cli.runs import Terminal, refused

TOOLS = ("benchmark", "load_test", "demo.bundle", "demo.run", "demo.train_clip")


def all_commands() -> Iterator[tuple[typer.Typer, list[str], Any]]:
    """Each app, the words that lead to one of its commands, and that command: iosr-fast's, and every tool's."""
    apps = {"iosr-fast": app}
    for name in TOOLS:
        try:
            apps[name] = command_app(importlib.import_module(f"tools.{name}").main)
        except (ImportError, SystemExit):
            continue  # a package of an extra is missing here
    for one in apps.values():
        pending = [([], typer.main.get_command(one))]
        while pending:
            words, command = pending.pop()
            if isinstance(command, TyperGroup):
                pending += [([*words, name], command.get_command(None, name)) for name in command.list_commands(None)]
            else:
                yield one, words, command


@pytest.mark.slow
def test_help_shows_what_stands_in_brackets() -> None:
    checked = 0
    for one, words, command in all_commands():
        shown = CliRunner().invoke(one, [*words, "--help"]).output
        for parameter in command.params:
            text = getattr(parameter, "help", None) or ""
            if "[" in text:
                assert re.sub(r"\s", "", text) in re.sub(r"\s", "", shown), f"{words}: {text}"
                checked += 1
    assert checked > 25


@pytest.mark.parametrize("check", [check_new_file, check_new_folder])
def test_a_place_that_can_not_be_written_to_is_refused(check: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(PermissionError, match="can't be written to"):
        check(tmp_path / "new")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [("benchmark.py", "score", "--case", "nonsense"), ("benchmark.py", "compare", "HEAD")]
)
def test_a_mistake_with_a_tool_is_a_line(words: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / words[0]), *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode and re.match("(error|iosr-fast): expected ", done.stderr), done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_missing_package_is_answered_with_the_pip_command(tmp_path: Path) -> None:
    """As after `pip install iosr_fast onnxruntime`: every way in, in a process where no other extra can be imported."""
    folder = tmp_path / "in"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        (folder / name / "a.png").touch()
    code = f"""
import sys
blocked = "torch torchvision open_clip onnx onnxscript pyarrow lightning_fabric"
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

told(lambda: Classifier("demo").encoder)
told(lambda: run("fit", {str(folder)!r}, "--model", "demo", "--out", {str(tmp_path / "out")!r}))
told(lambda: run("classify", "bundle", {str(folder)!r}, "--out", {str(tmp_path / "labels.parquet")!r}))
told(lambda: run("classify", "bundle", {str(folder)!r}, "--out", {str(tmp_path / "parts")!r}))
told(lambda: run("build-engine", "--out", {str(tmp_path / "engine")!r}))
told(lambda: run("train-adapter", "--out", {str(tmp_path / "a.safetensors")!r}))
sys.modules["fastapi"] = None
told(lambda: run("serve", "bundle"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert len(lines) == 7, done.stdout + done.stderr
    extras = ("cpu", "cpu", "parquet", "parquet", "cpu", "train", "serve")
    for line, extra in zip(lines, extras, strict=True):
        assert f"is not installed: pip install 'iosr_fast[{extra}]' brings it" in line, lines
    assert all(line.startswith("2 iosr-fast: ") for line in lines[1:]), lines


@pytest.mark.parametrize(
    "words",
    [
        ("audit", "none", "--html", "a.html"),
        ("audit", "none", "--json", "a.json"),
        ("evaluate", "features", "none", "--json", "a.json"),
        ("benchmark", "none", "--json", "a.json"),
        ("suggest", "none", "none", "--out", "a.csv"),
        ("classify", "none", "none", "--out", "a.csv"),
    ],
)
def test_another_file_is_not_replaced(words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(words[-1]).write_text('<p>My notes on iosr_fast, {"mine": "iosr_fast"}</p>')
    said = refused(*words)
    assert f"{words[-1]} exists already, and does not say that iosr_fast wrote it" in " ".join(said.split())
    assert "mine" in Path(words[-1]).read_text()


def test_what_these_commands_wrote_and_empty_files_are_replaced(tmp_path: Path) -> None:
    write_new(page := tmp_path / "a.html", document("Mine", "word " * 1_000_000))
    write_figures(figures := tmp_path / "a.json", {"accuracy": 0.5, "images": ["a.png"] * 1_000_000})
    write_rows(rows := tmp_path / "rows.json", [{"mean": 0.5, **table.facts()}])
    (empty := tmp_path / "empty.csv").touch()
    for file in (page, figures, rows, empty):
        check_new_file(file)


@pytest.mark.parametrize("name", ["a\rb.png", "a\nb", "a\r\nb", "\rb.png", "a,b'.png", "=a.png", "'a.png", "a\tb"])
def test_any_file_name_comes_back_from_a_table_of_suggestions(name: str, tmp_path: Path) -> None:
    paths = [tmp_path / name]
    found = FolderSuggestions(paths, np.ones(1, int), np.array(["cat"]), np.ones(1), 1, [], Skipped())
    write_new(tmp_path / "labels.csv", _table(found).replace(",,cat,", ",dog,cat,"))
    assert labelled_images(tmp_path / "labels.csv")[:2] == (paths, ["dog"])


STEERING = "a\x1b[2Jb\rc\x07d\x9be\u202ef\u200bg\u2028h\udce9i\nj"
SHOWN = r"a\x1b[2Jb\rc\x07d\x9be\u202ef\u200bg\u2028h\udce9i\nj"


def test_no_name_steers_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable(STEERING) == SHOWN and printable(STEERING, keep="\n") == SHOWN.replace(r"\n", "\n")
    flag, farmer = "\U0001f3f4\U000e0067\U000e007f", "\U0001f468\u200d\U0001f33e"
    for harmless in ("caf\u00e9", "\u732b", farmer, flag, "two\u00a0words"):
        assert printable(harmless) == harmless
    say(f"{STEERING}: 3 images", "done")
    assert capsys.readouterr().out == f"{SHOWN}: 3 images\ndone\n"
    assert str(IosrFastError(f"no class {STEERING}")) == f"no class {SHOWN}".replace(r"\n", "\n")
    error = BadImageError(Path("a\x1b[2J.png"), 0, "it is empty")
    assert str(error) == r"can't read image a\x1b[2J.png: it is empty" and error.path == Path("a\x1b[2J.png")
    record = logging.LogRecord("iosr_fast", logging.WARNING, "", 0, "left out: %s", ("a\x1b[2J\u202e",), None)
    assert PrintableFormatter("%(name)s: %(message)s").format(record) == r"iosr_fast: left out: a\x1b[2J\u202e"


@pytest.mark.parametrize(
    "words",
    [
        ("classify", "nowhere", "a\x1b[2J.png"),
        ("fit", "a\x1b[2J", "--model", "demo", "--out", "out"),
        ("info", "a\x1b[2J"),
        ("suggest", "nowhere", "a\x1b[2J", "-n", "1"),
        ("a\x1b[2J",),
        ("--a\x1b[2J",),
        ("fit", "--a\x1b[2J"),
    ],
)
def test_errors_show_names_with_escapes(words: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and "\x1b" not in done.output and r"a\x1b[2J" in done.output


def test_a_table_is_exact_in_a_file_and_printable_on_a_terminal() -> None:
    file, terminal = io.StringIO(), Terminal()
    for target in (file, terminal):
        output(target).write("a\x1b[2J.png,cat\n")
    assert file.getvalue() == "a\x1b[2J.png,cat\n" and terminal.getvalue() == "a\\x1b[2J.png,cat\n"


def test_the_line_below_a_list_is_true(capsys: pytest.CaptureFixture[str]) -> None:
    echo_first("title", [*"abc"], most=1)
    echo_first("title", [*"abc"], 9, most=1, by="--json")
    ends = [line for line in capsys.readouterr().out.split("\n") if "more" in line]
    assert ends == ["  and 2 more; --html or --json lists them", "  and 8 more; --json lists the first 3"]
