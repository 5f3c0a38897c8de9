"""Jobs that may be interrupted: compute the missing chunks, store each one, finish the output."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from typing import Any, Protocol

from iosr_fast.utils.progress import progress


class Output(Protocol):
    """Results of a run on disk. An interrupted run resumes with the chunks that are missing."""

    def open(self) -> AbstractContextManager[Sequence[Any]]:
        """Lock the output, compare this run with the interrupted one, and yield the missing chunks."""
        ...

    def add(self, result: Any) -> None:
        """Store the result of one chunk."""

    def finish(self) -> Any:
        """Complete the output once every chunk has been added; returns the result of the run."""


def complete(
    output: Output,
    compute: Callable[[Sequence[Any], Callable[[int], None]], Generator[Any, None, None]],
    verb: str,
    count: Callable[[Sequence[Any]], int],
) -> Any:
    """Start or resume a run; returns output.finish().

    `compute` takes the missing chunks and a function to call with each number of images done; it yields a result per
    chunk. `verb` names the work in the progress bar; `count` returns the number of images in chunks.
    """
    with output.open() as missing:
        if missing:
            with progress(verb, count(missing)) as advance, closing(compute(missing, advance)) as results:
                for result in results:
                    output.add(result)
        return output.finish()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The entries in which a resumed run differs from the interrupted one, for an error message; "" if none."""
    return "; ".join(
        f"{name} (there {_shorten(before.get(name))}, now {_shorten(now.get(name))})"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    )


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
