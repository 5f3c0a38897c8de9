"""A progress bar on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(verb: str, total: int | None, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar with images/s and the time left, on stderr if that is a terminal; yields a function that advances it by a
    number of images. Without a `total` it shows the elapsed time."""
    if not shown or not sys.stderr.isatty():
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
