"""Uploads that need a look, kept for labelling: their files in a folder, and their answers in a CSV."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.head.abstention import Abstention
from iosr_fast.head.head import Head
from iosr_fast.head.predictions import Prediction, predict
from iosr_fast.methods.folds import near_support
from iosr_fast.methods.unknown import KEEP
from iosr_fast.serving.batching.decoder import grey_png
from iosr_fast.serving.check_sample import CheckSample, Promise
from iosr_fast.serving.kept_folder import KeptFolder, is_picture_name, picture_name
from iosr_fast.utils.csv_text import check_columns, escaped, line_writer

TABLE = "collected.csv"
COLUMNS = ("path", "label", "guess", "probability", "reason", "time")
_WAITING = 64 << 20  # bytes of uploads that wait to be judged
log = logging.getLogger(__name__)


class Collector:
    """Keeps uploads whose label is not accepted by the promise `max_error`, or that belong to none of the classes.

    Files are named by the SHA-256 of their bytes, and no others are touched (KeptFolder). The table TABLE has `path`,
    an empty `label` to fill in, `guess` and `probability` of the best class, `reason` ("needs a look" or "unknown") and
    `time`; `iosr-fast fit` and `suggest` read it. Labels that somebody fills in while the server runs stay, and so do
    rows with other paths. Near duplicates of support images, and of files that were kept since the start, are left out.
    At `limit` files the oldest one without a label goes; if all have one, no more are kept.

    A thread judges and writes, so that no answer waits: while 64 MiB of uploads wait for it, others are left out. If
    the disk is full or the table can't be read, nothing is kept until that ends, and nothing is lost. `on_outcome` is
    called with "kept", "near duplicate", "left out", "check" or "failed".

    With a `check_share`, `checks` keeps a random sample of the other uploads, whose labels are accepted (CheckSample);
    `digest` is that of the classifier that promises `max_error`.

    Raises IosrFastError where another server collects into the folder, and OSError where it can't be written.
    """

    def __init__(
        self,
        folder: Path,
        limit: int,
        max_error: float,
        on_outcome: Callable[[str], None] = lambda outcome: None,
        check_share: float | None = None,
        digest: str = "",
    ) -> None:
        self._folder, self._table = KeptFolder(folder), folder / TABLE
        self._limit, self._max_error = limit, max_error
        self._on_outcome, self._probe = on_outcome, grey_png()
        self._failures: dict[str, str] = {}  # the last ones, logged once; "" if it went well
        self._kept: list[np.ndarray] = []  # plain embeddings (D,) since the start, at most `limit`
        self._bytes, self._counting = 0, threading.Lock()
        self._write(self._rows())  # what can't be read or written is an error now
        self.checks: CheckSample | None = None
        if check_share is not None:
            self.checks = CheckSample(self._folder, check_share, limit, Promise(max_error, digest), TABLE)
        self._thread = ThreadPoolExecutor(1, "iosr-fast-collector")

    def offer(self, image: Any, embeddings: Embeddings, head: Head) -> None:
        """Judge an image that was answered, if it came as bytes. Does not wait."""
        if not isinstance(image, bytes) or image == self._probe:
            return
        with self._counting:
            fits = self._bytes + len(image) <= _WAITING
            self._bytes += len(image) if fits else 0
        if fits:
            self._thread.submit(self._run, image, embeddings.to_numpy(), head)
        else:
            self._on_outcome("left out")

    def read_labels(self) -> None:
        """Let the checks count new labels. Does not wait."""
        self._thread.submit(self._count_labels)

    def settle(self) -> None:
        """Wait until all images that were offered are judged."""
        self._thread.submit(int).result()

    def close(self) -> None:
        """Judge what waits, and end."""
        self._thread.shutdown()
        self._folder.close()

    def _run(self, image: bytes, embeddings: Embeddings, head: Head) -> None:
        outcome = self._guarded("pictures can't be kept", self._judge, image, embeddings, head)
        if outcome:
            self._on_outcome(outcome)
        with self._counting:
            self._bytes -= len(image)
        self._count_labels()

    def _count_labels(self) -> None:
        if self.checks is not None:
            self._guarded("labels can't be read", self.checks.read_labels)

    def _guarded(self, what: str, act: Callable[..., str | None], *values: Any) -> str | None:
        """What `act` returns; "failed" if it raises, logged as `what`: serving goes on, whatever it is."""
        before = self._failures.get(what)
        try:
            outcome, self._failures[what] = act(*values), ""
        except Exception as error:
            outcome, self._failures[what] = "failed", str(error)
            if str(error) != before:
                log.error("%s: %s", what, error)
        return outcome

    def _judge(self, image: bytes, embeddings: Embeddings, head: Head) -> str:
        """Keep an image with embeddings (1, D) that `head` answered, if it needs a look; what became of it, "" if
        nobody needs to look at it."""
        # Whether a picture is of an unknown class takes the longer fit: first whether its label is accepted.
        prediction = predict(head, embeddings, abstention=Abstention(max_error=self._max_error))[0]
        if prediction.accepted and self.checks is not None and self.checks.offer(image, prediction):
            return "check"
        if prediction.accepted and head.unknown.can_promise(KEEP):
            prediction = predict(head, embeddings, abstention=Abstention(KEEP, max_error=self._max_error))[0]
        if prediction.accepted:
            return ""
        if near_support(head.support, embeddings.plain, self._kept)[0]:
            return "near duplicate"
        return "kept" if self._keep(image, prediction, embeddings.plain[0]) else "left out"

    def _keep(self, image: bytes, prediction: Prediction, plain: np.ndarray) -> bool:
        name, rows = picture_name(image), self._rows()
        labelled = {row["path"] for row in rows if row["label"]}
        if name in labelled:
            return False
        kept = dict.fromkeys(row["path"] for row in rows if self._folder.has(row["path"]) and row["path"] != name)
        gone = [path for path in kept if path not in labelled][: max(0, len(kept) + 1 - self._limit)]
        if len(kept) - len(gone) >= self._limit:
            return False
        self._folder.write(name, image)
        best, time = prediction.top[0], datetime.now(UTC).isoformat(timespec="seconds")
        reason = "unknown" if prediction.label is None else "needs a look"
        values = name, "", best.label, f"{best.probability:.4f}", reason, time
        left = [row for row in rows if row["path"] not in (name, *gone)]
        self._write([*left, dict(zip(COLUMNS, values, strict=True))])
        for path in gone:
            if self.checks is None or path not in self.checks:
                self._folder.remove(path)
        self._kept = [*self._kept, plain][-self._limit :]
        return True

    def _rows(self) -> list[dict[str, str]]:
        """The rows of the table, the oldest first, without those of pictures that are gone. Rows that somebody added,
        with other paths, stay as they are."""
        columns, rows = self._folder.read_rows(TABLE)
        if columns:
            check_columns(columns, self._table, ("path", "label"), ", or remove the table")
        return [row for row in rows if self._folder.has(row["path"]) or not is_picture_name(row["path"])]

    def _write(self, rows: list[dict[str, str]]) -> None:
        columns = list(dict.fromkeys([*(rows[0] if rows else ()), *COLUMNS]))  # those that somebody added stay
        text = StringIO()
        line_writer(text).writerows([columns, *([escaped(row.get(name, "")) for name in columns] for row in rows)])
        self._folder.write(TABLE, text.getvalue().encode())
