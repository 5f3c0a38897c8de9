"""What `iosr-fast classify` does: a list of images, classified to standard output or to a file that outlives a kill."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from iosr_fast.images.decode import Decoder
from iosr_fast.images.pixels import VERSION
from iosr_fast.images.preprocess import BadImageError
from iosr_fast.pipeline.journal import Journal, open_journal
from iosr_fast.pipeline.stream import Answer, Stage, classify, stage_of
from iosr_fast.pipeline.tables import check_output, csv_cells, csv_writer, write_table
from iosr_fast.state.state_files import fingerprint
from iosr_fast.utils.progress import progress

if TYPE_CHECKING:
    from iosr_fast.encoders.encoder import Encoder
    from iosr_fast.state.state import State


@dataclass(frozen=True)
class Job:
    """Classifies `paths`, `batch` at a time, and reports the `top` classes of each. `engine` is `encoder`'s folder."""

    state: State
    encoder: Encoder
    engine: Path
    decoder: Decoder
    paths: list[str]
    batch: int
    top: int
    threads: int | None
    skip_bad: bool

    def stream(self, file: TextIO, say: Callable[[str], None]) -> int:
        """Write CSV rows as they come; how many images were left out. Raises BadImageError unless `skip_bad`."""
        writer, left_out = csv_writer(file, self.top, errors=False), 0
        with closing(self._answers(0)) as answers, progress("classify", len(self.paths), 0, not file.isatty()) as done:
            for path, answer in zip(self.paths, chain.from_iterable(_telling(answers, done)), strict=True):
                if isinstance(answer, BadImageError):
                    if not self.skip_bad:
                        raise answer
                    left_out += 1
                    say(f"left out: {answer}")
                else:
                    writer.writerow(csv_cells(path, _kept(answer), self.top, errors=False))
        return left_out

    def write(self, out: Path) -> int:
        """Write the file, or go on where a run of it was killed; how many images could not be read.

        Batches go to a journal beside `out` as they come, and that becomes `out` at the end: its bytes don't depend on
        whether a run was stopped, or how often. Raises FileExistsError where `out` is there already, ValueError where
        the journal is of other images, of another classifier or of other options, BadImageError unless `skip_bad`.
        """
        check_place(out, self.paths)
        with open_journal(_journal_of(out), self.facts()) as journal:
            if not self.skip_bad:
                self._refuse_errors(journal)
            self._complete(journal)
            unread = 0

            def rows() -> Iterator[tuple[str, Any]]:
                nonlocal unread
                for path, told in zip(self.paths, chain.from_iterable(journal.read()), strict=True):
                    unread += isinstance(told, str)
                    yield path, told

            write_table(out, rows(), self.top)
            journal.remove()
        return unread

    def facts(self) -> dict[str, Any]:
        """All that decides what the rows are. How many cores compute them is not among it: that may change the last bit
        of a probability."""
        from iosr_fast import __version__

        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(f"{path}\0{_stamp(path)}\0".encode())
        return {
            "iosr_fast": __version__,
            "classifier": fingerprint(self.state),
            "engine": self.encoder.fingerprint,
            "runtime": self.encoder.runtime,
            "decoder": self.decoder.name,
            "pixels": VERSION,
            "exif_orientation": self.decoder.exif_orientation,
            "images": f"{len(self.paths)} ({digest.hexdigest()[:16]})",
            "batch": self.batch,
            "top": self.top,
        }

    def _complete(self, journal: Journal) -> None:
        done = sum(map(len, journal.read()))
        with closing(self._answers(done)) as answers, progress("classify", len(self.paths), done) as advance:
            for answered in _telling(answers, advance):
                for answer in answered:
                    if isinstance(answer, BadImageError) and not self.skip_bad:
                        raise answer
                journal.append([_kept(answer) for answer in answered])

    def _refuse_errors(self, journal: Journal) -> None:
        for path, told in zip(self.paths, chain.from_iterable(journal.read()), strict=False):
            if isinstance(told, str):
                raise ValueError(
                    f"the run that is gone on with left unreadable images out, the first is {path}: {told}; give "
                    f"--skip-bad, or mend the image and remove {journal.path} to begin again"
                )

    def _answers(self, first: int) -> Generator[list[Answer], None, None]:
        """Of the images from number `first` on. The stage is that of all, so that going on changes no digit."""
        if first >= len(self.paths):
            return
        stage: Stage = stage_of(self.encoder, self.engine, self.decoder, len(self.paths), self.batch, self.threads)
        yield from classify(self.state, stage, self.decoder, self.paths[first:], self.batch, self.top)


def check_place(out: Path, paths: Iterable[str]) -> None:
    """What `Job.write` refuses of `out` and of file names, without a classifier."""
    check_output(out)
    for path in paths:
        if not path.isascii() and path.encode("utf-8", "replace").decode() != path:
            raise ValueError(f"expected file names in UTF-8, got {path!r}; rename it")
    if out.exists() and not _journal_of(out).exists():
        raise FileExistsError(f"{out} is there already; remove it or choose another name")


def _journal_of(out: Path) -> Path:
    return out.with_name(out.name + ".journal")


def _telling(answers: Iterator[list[Answer]], advance: Callable[[int], None]) -> Iterator[list[Answer]]:
    for answered in answers:
        yield answered
        advance(len(answered))


def _kept(answer: Answer) -> list[list[Any]] | str:
    """What is told of an image, JSON-ready."""
    if isinstance(answer, BadImageError):
        return answer.reason
    return [[one.label, one.probability] for one in answer.top]


def _stamp(path: str) -> str:
    """Changes with an image's bytes, as far as the file system tells."""
    try:
        status = os.stat(path)
    except OSError:
        return "none"
    return f"{status.st_size}-{status.st_mtime_ns}"
