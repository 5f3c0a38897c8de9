"""Common parts of all command lines: plain help, one line for an error, exit code 2."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO, cast

import typer
from typer.core import TyperCommand, TyperGroup

from iosr_fast.exceptions import IosrFastError, printable
from iosr_fast.sealed.outputs import check_new_file
from iosr_fast.utils.progress import is_quiet


def say(*lines: str, err: bool = False) -> None:
    """Print each line, made `printable`: no name of a file or class steers the terminal or looks like a line."""
    for line in lines:
        typer.echo(printable(line), err=err)


def note(*lines: str, err: bool = True) -> None:
    """`say` what a command did, beside its results: left out with --quiet."""
    if not is_quiet():
        say(*lines, err=err)


def output(file: TextIO) -> TextIO:
    """Where a command writes a table: a file or pipe gets every byte, a terminal `printable` text."""
    return cast(TextIO, _Terminal(file)) if file.isatty() else file


class _Terminal:
    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        self._file.write(printable(text, keep="\n"))
        return len(text)

    def flush(self) -> None:
        self._file.flush()

    def isatty(self) -> bool:
        return True


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print bad input, file errors and missing packages as one line on stderr and exit with code 2.

    Wrap imports of optional packages at the top of a tool in it.
    """
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):  # typer ends quietly: after --help, or when `| head` closes
        raise
    except (ValueError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        say(f"iosr-fast: {error}", err=True)
        raise SystemExit(2) from error
    except Exception as error:
        if isinstance(getattr(error, "message", None), str):  # typer's, which it prints itself
            error.message = printable(error.message, keep="\n")  # type: ignore[attr-defined]
        raise


@contextmanager
def stop_message(message: str) -> Iterator[None]:
    """On Ctrl-C print the message and exit with code 130."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"iosr-fast: {message}", err=True)
        raise SystemExit(130) from None


class Group(TyperGroup):
    """Lists commands in sections (typer's rich_help_panel), each with the full first paragraph of its help."""

    make_context = one_line_errors()(TyperGroup.make_context)
    invoke = one_line_errors()(TyperGroup.invoke)

    def sections(self, ctx: Any) -> Mapping[str, Mapping[str, str]]:
        """For each section its commands and their lines in the help."""
        sections: dict[str, dict[str, str]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            section = sections.setdefault(command.rich_help_panel or "Commands", {})
            section[name] = command.get_short_help_str(limit=1000)
        return sections

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for title, commands in self.sections(ctx).items():
            with formatter.section(title):
                formatter.write_dl(list(commands.items()))


class Command(TyperCommand):
    """Lists its options in sections (typer's rich_help_panel)."""

    make_context = one_line_errors()(TyperCommand.make_context)
    invoke = one_line_errors()(TyperCommand.invoke)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for one in self.get_params(ctx):
            title = getattr(one, "rich_help_panel", None) or f"{one.param_type_name.title()}s"
            if (line := one.get_help_record(ctx)) is not None:
                sections.setdefault(title, []).append(line)
        for title, lines in sections.items():
            if lines:
                with formatter.section(title):
                    formatter.write_dl(lines)


class ListCommand(Command):
    """A command whose repeatable options take several words: `--shots 1 2` is `--shots 1 --shots 2`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeatable = {name for option in self.params if option.multiple for name in option.opts}
        expanded: list[str] = []
        option = ""
        for before, word in pairwise(["", *args]):
            if word.startswith("-"):
                option = word if word in repeatable else ""
            expanded += [option, word] if option not in ("", word, before) else [word]
        return super().parse_args(ctx, expanded)


_SETTINGS: dict[str, Any] = {"context_settings": {"help_option_names": ["-h", "--help"]}}


def new_app(group: type[Group] = Group, completion: bool = False, **options: Any) -> typer.Typer:
    """An app whose help shows `[...]` as written, which rich would interpret as markup."""
    options |= {"pretty_exceptions_enable": False, "rich_markup_mode": None, **_SETTINGS}
    return typer.Typer(cls=group, add_completion=completion, **options)


def command_app(main: Callable[..., None], command: type[Command] = Command) -> typer.Typer:
    """The app of a tool with one command."""
    app = new_app()
    app.command(cls=command, **_SETTINGS)(main)
    return app


def run(main: Callable[..., None]) -> None:
    """Run a tool with one command."""
    command_app(main)()


def write_new(path: Path, text: str) -> None:
    """Write a file, whole or not at all, and say so on stderr."""
    from iosr_fast.sealed.files import new_file

    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")  # csv writes its own line ends
    note(f"wrote {path}")


def write_figures(path: Path, figures: Mapping[str, Any]) -> None:
    """`write_new` of JSON, which says that iosr_fast wrote it (sealed.outputs)."""
    from iosr_fast import __version__

    write_new(path, json.dumps({"iosr_fast": __version__, **figures}, indent=1, ensure_ascii=False) + "\n")


def _written(*suffixes: str) -> Callable[[Path | None], Path | None]:
    """Callback of options that name a file to write with one of these suffixes: checks the path before any work."""

    def check(path: Path | None) -> Path | None:
        try:
            if path is not None:
                check_new_file(path, suffixes)
        except (OSError, IosrFastError) as error:
            raise typer.BadParameter(str(error)) from error
        return path

    return check


new_file, new_csv = _written(), _written(".csv")
new_page = _written(".html", ".htm")  # tells it from pictures and tables
