"""The work of `iosr-fast classify`: a list of images, classified to standard output or, resumably, to a file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.files.journal import Journal, open_journal
from iosr_fast.files.reader import Reader
from iosr_fast.files.resume import complete
from iosr_fast.files.stream import Answer, classify
from iosr_fast.files.tables import Result, Row, check_output, csv_cells, csv_writer, write_table
from iosr_fast.head.predictions import AnyHead, LabelSet, Prediction
from iosr_fast.head.rejecting import Rejecting
from iosr_fast.images.pixels import VERSION
from iosr_fast.store.head_files import fingerprint
from iosr_fast.utils.outputs import check_utf8
from iosr_fast.utils.progress import progress


class Counts(NamedTuple):
    """How many images were unreadable, and how many belong to none of the classes."""

    unread: int
    rejected: int


@dataclass(frozen=True)
class Job:
    """Classifies `paths`, and reports the `top` classes of each, or with SEVERAL those that it has. `rejecting` was
    checked with `head`."""

    head: AnyHead
    reader: Reader
    paths: list[str]
    top: int
    rejecting: Rejecting | None = None

    @property
    def unknown_label(self) -> str | None:
        return None if self.rejecting is None else self.rejecting.label

    def stream(self, file: TextIO) -> Counts:
        """Write CSV rows one by one. Raises BadImageError for an unreadable image unless skip_bad."""
        writer, unread, rejected = csv_writer(file, self.top, self.unknown_label), 0, 0
        bar = progress("classify", len(self.paths), not file.isatty())
        with bar as advance, closing(self.answers(0, advance)) as answers:
            for path, answer in zip(self.paths, chain.from_iterable(answers), strict=True):
                unread += isinstance(answer, BadImageError)
                result = answer.reason if isinstance(answer, BadImageError) else _result(answer)
                rejected += isinstance(result, Result) and result.rejected
                writer.writerow(csv_cells(path, result, self.top, self.unknown_label))
        return Counts(unread, rejected)

    def write(self, out: Path) -> Counts:
        """Write the file, or resume an interrupted run.

        Batches go to a journal beside `out`, and from there to `out` at the end, so its bytes don't depend on
        interruptions. Raises FileExistsError if `out` exists, ValueError for a journal of other images, another
        classifier or other options, BadImageError for an unreadable image unless `skip_bad`.
        """
        check_place(out, self.paths)

        def compute(missing: Sequence[str], advance: Callable[[int], None]) -> Generator[list[Answer], None, None]:
            return self.answers(len(self.paths) - len(missing), advance)

        counts: Counts = complete(_JournaledTable(self, out), compute, "classify", len)
        return counts

    def facts(self) -> dict[str, Any]:
        """Everything that determines the rows, except the number of cores, which may change the last bit of a
        probability."""
        from iosr_fast import __version__

        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(f"{path}\0{_stamp(path)}\0".encode())
        return {
            "iosr_fast": __version__,
            "classifier": fingerprint(self.head),
            "engine": self.reader.encoder.fingerprint,
            "runtime": self.reader.encoder.runtime,
            "decoder": self.reader.decoder.name,
            "pixels": VERSION,
            "exif_orientation": self.reader.decoder.exif_orientation,
            "images": f"{len(self.paths)} ({digest.hexdigest()[:16]})",
            "batch": self.reader.batch,
            "top": self.top,
            **({} if self.rejecting is None else {"unknown": asdict(self.rejecting)}),
        }

    def answers(self, first: int, advance: Callable[[int], None]) -> Generator[list[Answer], None, None]:
        """Batches of answers to the images from position `first` on. Raises BadImageError unless `skip_bad`."""
        # The stage is chosen for all images, so that resuming changes no digit.
        reader, stage = self.reader, self.reader.stage(len(self.paths))
        paths, keep = self.paths[first:], None if self.rejecting is None else self.rejecting.keep
        with closing(classify(self.head, stage, reader.decoder, paths, reader.batch, self.top, keep)) as batches:
            for batch in batches:
                for answer in batch:
                    if isinstance(answer, BadImageError) and not reader.skip_bad:
                        raise answer
                yield batch
                advance(len(batch))


class _JournaledTable:
    """Output of `complete`: a table whose rows are kept in a journal until all exist."""

    _journal: Journal

    def __init__(self, job: Job, out: Path) -> None:
        self._job, self._out = job, out

    @contextmanager
    def open(self) -> Iterator[Sequence[str]]:
        with open_journal(journal_path(self._out), self._job.facts()) as self._journal:
            if not self._job.reader.skip_bad:
                self._refuse_errors()
            yield self._job.paths[sum(map(len, self._journal.read())) :]

    def add(self, result: list[Answer]) -> None:
        self._journal.append([one.reason if isinstance(one, BadImageError) else _result(one) for one in result])

    def finish(self) -> Counts:
        unread = rejected = 0

        def rows() -> Iterator[Row]:
            nonlocal unread, rejected
            for path, held in zip(self._job.paths, chain.from_iterable(self._journal.read()), strict=True):
                result = held if isinstance(held, str) else Result(*held)
                unread += isinstance(result, str)
                rejected += isinstance(result, Result) and result.rejected
                yield path, result

        write_table(self._out, rows(), self._job.top, self._job.unknown_label)
        self._journal.remove()
        return Counts(unread, rejected)

    def _refuse_errors(self) -> None:
        for path, result in zip(self._job.paths, chain.from_iterable(self._journal.read()), strict=False):
            if isinstance(result, str):
                raise IosrFastError(
                    f"the interrupted run skipped unreadable images, the first is {path}: {result}; pass --skip-bad, "
                    f"or repair the image and remove {self._journal.path} to start again"
                )


def check_place(out: Path, paths: Iterable[str]) -> None:
    """Raise the errors of `Job.write` about `out` and file names, without a classifier."""
    check_output(out)
    check_utf8(paths)
    if out.exists() and not journal_path(out).exists():
        raise FileExistsError(f"{out} exists already; remove it or choose another name")


def journal_path(out: Path) -> Path:
    return out.with_name(out.name + ".journal")


def _result(answer: Prediction | LabelSet) -> Result:
    """What is reported of an image, of JSON values."""
    classes, unknown = [list(pair) for pair in answer.pairs], answer.unknown
    return Result(classes) if unknown is None else Result(classes, unknown.score, unknown.rejected)


def _stamp(path: str) -> str:
    """Size and time of change of an image's file, which change with its bytes; "none" without a file."""
    try:
        status = os.stat(path)
    except OSError:
        return "none"
    return f"{status.st_size}-{status.st_mtime_ns}"
