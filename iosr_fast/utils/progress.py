"""What a running command shows beside its results: notes and a progress bar, unless `iosr-fast --quiet` is given."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from iosr_fast.exceptions import printable

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Whether this process shows results and errors alone. The command line sets it for each command."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    """Whether `set_quiet` has turned notes, warnings and bars off."""
    return _quiet


def say(line: str) -> None:
    """Print a line to stderr, `printable`, unless the process is quiet."""
    if not _quiet:
        print(printable(line), file=sys.stderr, flush=True)


@contextmanager
def progress(verb: str, total: int | None, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar with images/s and the time left, on stderr if that is a terminal; yields a function that advances it by a
    number of images. Without a `total` it shows the elapsed time."""
    if not shown or _quiet or not sys.stderr.isatty():
        yield lambda images: None
        return
    from rich import progress as rich
    from rich.console import Console
    from rich.text import Text

    class Rate(rich.ProgressColumn):
        def render(self, task: rich.Task) -> Text:
            return Text(f"{task.speed or 0:,.0f} images/s")

    counted = (rich.MofNCompleteColumn(), Rate(), rich.TimeRemainingColumn())
    columns = (rich.BarColumn(), *(counted if total is not None else (rich.TimeElapsedColumn(),)))
    with rich.Progress(
        rich.TextColumn("{task.description}"), *columns, console=Console(stderr=True), speed_estimate_period=60
    ) as bar:
        task = bar.add_task(verb, total=total)
        yield lambda images: bar.advance(task, images)
