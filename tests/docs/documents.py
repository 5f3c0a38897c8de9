"""The code blocks of a Markdown document, and how each kind is run."""

from __future__ import annotations

import inspect
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from configparser import RawConfigParser
from itertools import chain
from pathlib import Path
from typing import Any

import typer
import yaml
from packaging.requirements import Requirement
from sybil import Document as Parsed
from sybil import Example, Region
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer
from typer.core import TyperGroup

from benchmarks.show import block as table_of_rows
from iosr_fast.serving.http import metrics
from tests import ROOT
from tests.cli.runs import done

OUTPUT = ("", "text", "bibtex")  # no code: what something prints, or a citation
SHELL = ("sh", "bash", "console")
# Lines that tests can't run, and why. The options of iosr-fast's commands are parsed all the same.
NOT_RUN = {
    r"serve-ray|--ray": "starts Ray; tests/test_ray.py and tests/files do",
    r"--runtime tensorrt|--gpu|--device cuda": "needs an NVIDIA GPU",
    r"torchrun": "trains in several processes; tests/training does",
    r"evaluate paper": "needs the paper's data sets; tests/evaluation makes small ones",
    r"docker": "needs Docker",
    r"git clone|cd iosr_fast": "needs the repository's address",
    r"python3? -m venv|\.venv/bin/activate": "the tests run in an environment already",
}
_fitted: dict[str, Path] = {}
SHELL_SYNTAX = r"[$`|&;<>*?(){}]"


class Document:
    """A document's blocks, run in their order in one folder, one Python namespace and one shell environment.

    A line of iosr-fast runs in this process, where PyTorch is imported already; servers are processes of their own.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.folder = folder
        self.blocks = blocks(path)
        self._server: Any = None
        (folder / ".environment").touch()

    def run(self, block: Example) -> None:
        text, kind = block.parsed, block.region.lexemes["language"]
        if kind == "python":
            exec(compile("\n" * block.line + text, block.path, "exec"), block.namespace)
        elif kind in SHELL:
            for line in shell_lines(text, kind):
                self._shell(line)
        elif kind == "rows":
            table_of_rows(yaml.safe_load(text))
        elif kind in ("ini", "yaml"):
            check_configuration(text, kind)
        else:
            assert kind in OUTPUT, f"line {block.line}: expected python or one of {SHELL + OUTPUT}, got {kind!r}"

    def _shell(self, line: str) -> None:
        words = shlex.split(line, comments=True)
        if words[:2] == ["pip", "install"]:
            check_requirements(words[2:])
        elif words[0] == "make":
            command = ["make", "-C", str(ROOT), "--dry-run", *words[1:]]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        elif any(re.search(pattern, line) for pattern in NOT_RUN):
            check_options(words)
        elif re.search(r"\biosr-fast serve ", line):
            self._serve(line.rstrip("& "))
        elif words[0] == "iosr-fast" and not re.search(SHELL_SYNTAX, line):
            self._command(line, words)
        else:
            if self._server is not None:
                line = line.replace(":8000", f":{self._server.port}")
            script = f"set -euo pipefail\nsource .environment\n{line}\nexport -p > .environment"
            ended = subprocess.run(["bash", "-c", script], cwd=self.folder, capture_output=True, text=True)
            assert ended.returncode == 0, f"{line}\n{ended.stdout}{ended.stderr}"

    def _command(self, line: str, words: list[str]) -> None:
        """Run a line of iosr-fast. A fit that an earlier line has asked for, but for the folder's name, is copied."""
        out = words[words.index("--out") + 1] if words[1] == "fit" else ""
        fit = line.replace(f"--out {out}", "")
        if fit in _fitted and not Path(out).exists():
            shutil.copytree(_fitted[fit], out)
            return
        done(*words[1:])
        if out:
            _fitted[fit] = Path(shutil.copytree(out, self.folder / f".{out}", dirs_exist_ok=True))

    def _serve(self, line: str) -> None:
        """Start a server in place of the one of an earlier line, and wait until it is ready."""
        from tests.serving.http_process import Process

        self.close()
        self._server = Process(command=["bash", "-c", f"set -a; source .environment; exec {line} --port 0"])

    def close(self) -> None:
        if self._server is not None:
            self._server.kill()


def blocks(path: Path) -> list[Example]:
    """All fenced blocks; `region.lexemes` has the language, "" where none is named."""
    parsed = Parsed.parse(str(path), _fenced_blocks)
    found = list(parsed.examples())
    fences = len(re.findall(r"^\s*(?:```|~~~)", parsed.text, re.M))
    assert fences == 2 * len(found), f"{path.name}: {fences} fences, but {len(found)} blocks"
    return found


def _fenced_blocks(document: Parsed) -> Iterator[Region]:
    for region in RawFencedCodeBlockLexer(re.compile(r" *(?P<language>\S*)[^\n]*\n"))(document):
        region.parsed = region.lexemes["source"]
        yield region


def shell_lines(text: str, kind: str) -> list[str]:
    """The commands: continued lines joined, without comments; in a console those after a prompt."""
    lines = text.replace("\\\n", " ").splitlines()
    if kind == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line for line in lines if shlex.split(line, comments=True)]


def check_requirements(words: list[str]) -> None:
    """The extras of iosr_fast in a `pip install` are those of pyproject.toml."""
    known = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    for word in words:
        path, _, extras = word.partition("[")
        if path in (".", "iosr_fast", "dist/*.whl") and extras:
            assert Requirement(f"iosr_fast[{extras}").extras <= known, f"{word}: expected extras of {sorted(known)}"


def check_configuration(text: str, kind: str) -> None:
    """A unit or YAML parses, and names options of `iosr-fast serve` and metrics of the server that exist."""
    parse: Any = yaml.safe_load if kind == "yaml" else RawConfigParser().read_string
    parse(text)
    options = chain(*re.findall(r"(--[\w-]+)[ ,]+([^\s,\]]+)", text))
    check_options(["iosr-fast", "serve", "my-classifier", *options])
    for name in re.findall(r"iosr_fast_(\w+?)(?:_total|_count|_bucket)?\b", text):
        assert f'"{name}"' in inspect.getsource(metrics), f"expected a metric of the server, got iosr_fast_{name}"


def check_options(words: list[str]) -> None:
    """A command line of iosr-fast has the options and values that the command takes; other commands are not checked."""
    for name in {"iosr-fast", "iosr_fast"} & {*words}:
        command, options = find_command(words[words.index(name) + 1 :])
        command.make_context(name, options)


def find_command(words: list[str]) -> tuple[Any, list[str]]:
    """The command of iosr-fast that the first words name, and the other words."""
    from iosr_fast.cli import app

    command: Any = typer.main.get_command(app)
    while isinstance(command, TyperGroup) and words and not words[0].startswith("-"):
        if "saved" in command.commands and words[0] not in command.commands:
            words = ["saved", *words]  # `iosr-fast evaluate CLASSIFIER IMAGES`
        name, *words = words
        command = command.get_command(typer.Context(command), name)
        assert command is not None, f"iosr-fast has no command {name}"
    return command, words
