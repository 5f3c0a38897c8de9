"""The command `iosr-fast`. A command's module is imported when that command is asked for, so that help is fast."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from typing import Any

import typer

from iosr_fast.cli.command import Group, command_app, new_app
from iosr_fast.utils.progress import set_quiet
from iosr_fast.utils.text import PrintableFormatter

# By section of the help: each command and its line there. NAME is the function, or the app, of its module.
COMMANDS = {
    "Classify": {
        "fit": "Fit a few-shot classifier on a folder and save it.",
        "optimize": "Change a saved classifier's engine for the fastest one here.",
        "classify": "Classify images with a saved classifier.",
        "evaluate": "Measure a saved classifier on labelled images, or compare methods.",
        "audit": "Find mistakes in a saved classifier's images.",
        "suggest": "Choose the images of a folder to label next.",
        "export": "Write a saved classifier as one ONNX file for any runtime.",
        "info": "Describe this machine, or verify and describe a saved folder.",
    },
    "Serve": {
        "serve": "Serve a saved classifier over HTTP.",
        "serve-ray": "Serve replicas of a saved classifier by Ray Serve.",
    },
    "Adapters, engines and embeddings": {
        "models": "List the CLIPs of open_clip and what is supported of each.",
        "train-adapter": "Train the adapter of a CLIP.",
        "build-engine": "Compile a CLIP and its adapter.",
        "build-plan": "Compile a saved classifier for TensorRT and Triton.",
        "embed": "Write the embeddings of a set of images.",
    },
    "Measure": {
        "benchmark": "Time a saved classifier or an engine on this machine.",
    },
}


class Commands(Group):
    """The commands of COMMANDS, imported on demand."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands: dict[str, Any] = dict.fromkeys(name for names in COMMANDS.values() for name in names)

    def get_command(self, ctx: Any, name: str) -> Any:
        if name in self.commands and self.commands[name] is None:
            stem = name.replace("-", "_")
            command = getattr(importlib.import_module(f"iosr_fast.cli.{stem}"), stem)
            one = command if isinstance(command, typer.Typer) else command_app(command)
            self.commands[name] = typer.main.get_command(one)
        return self.commands.get(name)

    def sections(self, ctx: Any) -> Mapping[str, Mapping[str, str]]:
        return COMMANDS


app = new_app(Commands, completion=True, no_args_is_help=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        from iosr_fast import __version__

        typer.echo(f"iosr-fast {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: bool = typer.Option(False, "--version", help="Print the version.", callback=_print_version, is_eager=True),
    verbose: bool = typer.Option(
        False, "--verbose", "-v", help="Log which runtimes, kernels and parameters are chosen."
    ),
    quiet: bool = typer.Option(
        False, "--quiet", "-q", help="Show results and errors alone: no notes, warnings or bars."
    ),
) -> None:
    """Few-shot image classification with CLIP.

    `iosr-fast COMMAND --help` describes a command.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(name)s: %(message)s"))
    level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, handlers=[handler])
    set_quiet(quiet)
