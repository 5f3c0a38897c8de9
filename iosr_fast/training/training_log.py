"""The measurements of a training by step and by epoch, in CSV files that survive kills and in TensorBoard."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from iosr_fast.exceptions import DamagedFileError, IosrFastError
from iosr_fast.utils.files import new_file
from iosr_fast.utils.require import require

logger = logging.getLogger(__name__)


class TrainingLog:
    """Writes `folder/steps.csv`, `folder/epochs.csv` and, with `tensorboard`, TensorBoard's event files beside them.

    `resume_step` is the step of the checkpoint that training resumes from, 0 for a new one. Later lines are removed
    first, because their steps are repeated; so an interrupted and resumed training ends with the lines of an
    uninterrupted one. For that, write a step's line before its checkpoint, and `flush` between the two. A new training
    renames an earlier one's files in the same folder to `steps.previous.csv` and `epochs.previous.csv`. If several
    processes train, only the first should create a log.

    Raises ValueError for a CSV that this class did not write, ImportError if TensorBoard is not installed.
    """

    def __init__(self, folder: Path, resume_step: int, tensorboard: bool = False) -> None:
        writer: Any = None
        if tensorboard:
            require("tensorboard", "train")
            writer = require("torch.utils.tensorboard", "train").SummaryWriter
        folder.mkdir(parents=True, exist_ok=True)
        self._steps, self._epochs = _Csv(folder / "steps.csv"), _Csv(folder / "epochs.csv")
        for file in (self._steps, self._epochs):  # both were checked first, so a damaged one changes nothing
            file.open(resume_step)
        # TensorBoard discards the steps of an interrupted run that are repeated.
        self._writer = writer and writer(str(folder), purge_step=resume_step + 1)

    def step(self, step: int, epoch: int, **values: float) -> None:
        """One line of steps.csv, and the scalars `train/<name>`. The first call sets the columns.

        Raises ValueError for other columns than the file's.
        """
        self._steps.append(step, epoch, values)
        self._add("train", step, values)

    def epoch(self, step: int, epoch: int, **values: float) -> None:
        """One line of epochs.csv, at the last step of the epoch, and the scalars `held-out/<name>`; then `flush`."""
        self._epochs.append(step, epoch, values)
        self._add("held-out", step, values)
        self.flush()

    def flush(self) -> None:
        """Write everything to the disk, in case the machine fails. Lines survive a killed process without it."""
        self._steps.sync()
        self._epochs.sync()
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Safe to call twice."""
        self._steps.close()
        self._epochs.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add(self, group: str, step: int, values: Mapping[str, float]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{group}/{name}", float(value), step)


class _Csv:
    """A CSV file to which whole lines are appended: step, epoch, then the columns of the first line."""

    def __init__(self, path: Path) -> None:
        """Read and check the file; only `open` changes it."""
        self.path = path
        self.file: BinaryIO | None = None
        self.content = path.read_bytes() if path.exists() else b""
        lines = self.content.split(b"\n")[:-1]  # the rest is empty, or a line that a kill truncated
        self.header = lines[0] if lines else b""
        if lines and self.header.split(b",")[:2] != [b"step", b"epoch"]:
            raise self._damaged(1, self.header)
        last = 0.0
        self.rows: dict[int, bytes] = {}
        for number, line in enumerate(lines[1:], 2):
            try:
                step, *values = (float(cell) for cell in line.split(b","))
            except ValueError as error:
                raise self._damaged(number, line) from error
            if 1 + len(values) != len(self.header.split(b",")) or step <= last:
                raise self._damaged(number, line)
            last = step
            self.rows[int(step)] = line

    def open(self, resume_step: int) -> None:
        """Cut the file atomically to the lines up to `resume_step`, and append from there."""
        if resume_step == 0:
            if self.rows:
                aside = self.path.with_suffix(".previous.csv")
                logger.warning("%s is of an earlier training and is renamed to %s", self.path, aside.name)
                os.replace(self.path, aside)
                self.content = b""
            self.header = b""
        rows = {step: line for step, line in self.rows.items() if step <= resume_step}
        content = b"".join(line + b"\n" for line in (self.header, *rows.values()) if line)
        if content != self.content:
            logger.info("%s continues after step %d; later lines are removed", self.path, max(rows, default=0))
            with new_file(self.path) as temporary:
                temporary.write_bytes(content)
        self.rows, self.content = {}, b""
        self.file = self.path.open("ab", buffering=0)

    def append(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        assert self.file is not None
        header = self.header or ",".join(["step", "epoch", *values]).encode()
        names = header.decode().split(",")[2:]
        if set(names) != set(values):
            raise IosrFastError(
                f"expected the values {names}, the columns of {self.path}, got {list(values)}; log the same values in "
                "each line, or move the file away"
            )
        line = ",".join([str(int(step)), str(int(epoch)), *(repr(float(values[name])) for name in names)]).encode()
        self._write(self.file, line + b"\n" if self.header else header + b"\n" + line + b"\n")
        self.header = header

    def sync(self) -> None:
        if self.file is not None:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.file is not None:
            self.sync()
            self.file.close()
            self.file = None

    def _write(self, file: BinaryIO, line: bytes) -> None:
        """Write the line in one call, or raise OSError and write nothing."""
        before = os.fstat(file.fileno()).st_size
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, f"{self.path} can't be written completely; free disk space and resume")
        except OSError:
            file.truncate(before)
            raise

    def _damaged(self, number: int, line: bytes) -> DamagedFileError:
        return DamagedFileError(
            f"expected {self.path} to be a training's log (step, epoch and numbers, with rising steps), got in line "
            f"{number}: {line[:80]!r}; move the file away, or log into another folder"
        )
