"""What a training measured, step by step and epoch by epoch: CSV files that survive kills, and TensorBoard."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from iosr_fast.utils.files import new_file
from iosr_fast.utils.require import require

logger = logging.getLogger(__name__)


class TrainingLog:
    """Writes `folder/steps.csv`, `folder/epochs.csv` and, beside them, TensorBoard's event files.

    `resume_step` is the step of the checkpoint that training goes on from, 0 for a fresh one. Lines after it are
    removed first, for their steps will be taken again; so an interrupted and resumed training ends with the lines of an
    uninterrupted one. For that, write a step's line before its checkpoint, and `flush` between the two. A fresh
    training moves an earlier one's files in the same folder aside, to `steps.previous.csv` and `epochs.previous.csv`.

    `tensorboard`: True asks for it (ImportError where it is not installed), None takes it where it is, False leaves it
    out. One process makes a log; of several in one training the first should.

    Raises ValueError for a negative `resume_step` or a CSV that holds other things than this class writes.
    """

    def __init__(self, folder: Path, resume_step: int, tensorboard: bool | None = None) -> None:
        if resume_step < 0:
            raise ValueError(f"expected a resume_step of at least 0, got {resume_step}")
        writer = _summary_writer(tensorboard)
        folder.mkdir(parents=True, exist_ok=True)
        self._steps, self._epochs = _Csv(folder / "steps.csv"), _Csv(folder / "epochs.csv")
        for file in (self._steps, self._epochs):  # both have been read by now, so that a bad one stops all
            file.open(resume_step)
        # TensorBoard then forgets what an interrupted run logged of the steps that are taken again.
        self._writer = None if writer is None else writer(str(folder), purge_step=resume_step + 1)

    def step(self, step: int, epoch: int, **values: float) -> None:
        """One line of steps.csv, and the scalars `train/<name>`. The first call decides on the columns.

        Raises ValueError for other columns than the file's, a step that is not after the last, or after `close`.
        """
        self._steps.append(step, epoch, values)
        self._add("train", step, values)

    def epoch(self, step: int, epoch: int, **values: float) -> None:
        """One line of epochs.csv, at the last step of the epoch, and the scalars `held-out/<name>`; then `flush`."""
        self._epochs.append(step, epoch, values)
        self._add("held-out", step, values)
        self.flush()

    def flush(self) -> None:
        """Have all so far on the disk, whatever fails then. Lines survive a killed process without it."""
        self._steps.sync()
        self._epochs.sync()
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Twice does no harm."""
        self._steps.close()
        self._epochs.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _add(self, group: str, step: int, values: Mapping[str, float]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{group}/{name}", float(value), step)


def _summary_writer(wanted: bool | None) -> Any:
    """TensorBoard's SummaryWriter class, or None where it is not wanted or not there."""
    if wanted is False:
        return None
    try:
        require("tensorboard", "train")
        return require("torch.utils.tensorboard", "train").SummaryWriter
    except ImportError as error:
        if wanted:
            raise
        logger.warning("training is logged to CSV files only: %s", error)
        return None


class _Csv:
    """A CSV file to which whole lines are appended: step, epoch, then the columns that the first line brought."""

    def __init__(self, path: Path) -> None:
        """Reads and checks what is there; `open` changes it."""
        self.path = path
        self.file: BinaryIO | None = None
        self.content = path.read_bytes() if path.exists() else b""
        whole = self.content.split(b"\n")[:-1]  # what follows the last line end was torn by a kill, or is empty
        self.header = whole[0] if whole else b""
        if whole and self.header.split(b",")[:2] != [b"step", b"epoch"]:
            raise self._damaged(1, self.header)
        self.last = 0
        self.rows: dict[int, bytes] = {}
        for number, line in enumerate(whole[1:], 2):
            self.last = self._step_of(line, number)
            self.rows[self.last] = line

    def open(self, resume_step: int) -> None:
        """Cut the file to the lines up to `resume_step`, all at once, and go on from there."""
        content = self.content
        if resume_step == 0 and self.rows:
            aside = self.path.with_suffix(".previous.csv")
            logger.warning("%s is of an earlier training and moves to %s", self.path, aside.name)
            os.replace(self.path, aside)
            content = b""
        kept = {step: line for step, line in self.rows.items() if step <= resume_step}
        self.last = max(kept, default=0)
        self.header = self.header if resume_step else b""
        whole = b"".join(line + b"\n" for line in (self.header, *kept.values()) if line)
        if whole != content:
            logger.info(
                "%s goes on after step %d: %d later lines are removed", self.path, self.last, len(self.rows) - len(kept)
            )
            with new_file(self.path) as temporary:
                temporary.write_bytes(whole)
        self.rows, self.content = {}, b""
        self.file = self.path.open("ab", buffering=0)

    def append(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        if self.file is None:
            raise ValueError(f"{self.path} is closed; open a new TrainingLog")
        if step <= self.last:
            raise ValueError(f"expected a step after {self.last}, the last in {self.path}, got {step}")
        for name in values:
            if not name or set(name) & set(',"\r\n'):
                raise ValueError(f"expected names of values without commas, quotes and line ends, got {name!r}")
        header = self.header or ",".join(["step", "epoch", *values]).encode()
        names = header.decode().split(",")[2:]
        if set(names) != set(values):
            raise ValueError(
                f"expected the values {names}, the columns of {self.path}, got {list(values)}; log the same at each "
                "line, or move the file away"
            )
        line = ",".join([str(int(step)), str(int(epoch)), *(repr(float(values[name])) for name in names)]).encode()
        self._write(self.file, line + b"\n" if self.header else header + b"\n" + line + b"\n")
        self.header, self.last = header, step

    def sync(self) -> None:
        if self.file is not None:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.file is not None:
            self.sync()
            self.file.close()
            self.file = None

    def _write(self, file: BinaryIO, line: bytes) -> None:
        """All of it in one write, or OSError and nothing of it."""
        before = os.fstat(file.fileno()).st_size
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, f"{self.path} takes no more bytes; free some of the disk and resume")
        except OSError:
            file.truncate(before)
            raise

    def _step_of(self, line: bytes, number: int) -> int:
        fields = line.split(b",")
        try:
            step, values = int(fields[0]), [float(field) for field in fields[1:]]
        except ValueError as error:
            raise self._damaged(number, line) from error
        if 1 + len(values) != len(self.header.split(b",")) or step <= self.last:
            raise self._damaged(number, line)
        return step

    def _damaged(self, number: int, line: bytes) -> ValueError:
        return ValueError(
            f"expected {self.path} to be a training's log (step, epoch and numbers, the step growing), got in line "
            f"{number}: {line[:80]!r}; move the file away, or log into another folder"
        )
