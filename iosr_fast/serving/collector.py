"""Uploads that need a look, kept for labelling: their files in a folder, and their answers in a CSV."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.head.head import Head
from iosr_fast.head.labels import SEPARATOR
from iosr_fast.head.predictions import predict
from iosr_fast.head.verdict import Abstention
from iosr_fast.methods.unknown import KEEP
from iosr_fast.serving.check_sample import CheckSample
from iosr_fast.serving.fairness import Shares
from iosr_fast.serving.kept_folder import CHECKS, COLLECTED, KeptFolder, picture_name, time_text
from iosr_fast.serving.limits import Limits

UNKNOWN, UNSURE, FOUND = "unknown", "needs a look", "found"
log = logging.getLogger(__name__)


class Collector:
    """Keeps uploads of which a label is not accepted by the promise `max_error`, or that belong to none of the classes.

    Files are named by the SHA-256 of their bytes, and no others are touched (KeptFolder). The table COLLECTED has
    `path`, `guess` and `probability` of the best class, `reason` ("needs a look", "unknown", or "found" of files that
    no table lists), `time` and the key of a `client`; `iosr-fast suggest` reads its CSV file. Labels come back in
    LABELS, a table of `path` and `label`. Near duplicates of support images, and of files that were kept since the
    start, are left out. At `limit` files the client with most of those without a label loses its oldest one, so that
    nobody loses one to a client that has more; if all have a label, no more are kept.

    Where pictures may have `several` labels, `guess` has all, joined by SEPARATOR, and `probability` is that of the
    most likely one; one without a label is "unknown". LABELS then has `labels` for `label` (KeptFolder.labels).

    A thread judges and writes, so that no answer waits: of 64 MiB of uploads that wait for it each client has a share
    (Shares), and others are left out. If the disk is full or LABELS can't be read, nothing is kept until that ends,
    and nothing is lost. `on_outcome` is called with "kept", "near duplicate", "left out", "check" or "failed".

    With a `check_share`, `checks` keeps a random sample of the other uploads, whose labels are accepted (CheckSample);
    `digest` is that of the classifier that promises `max_error`.

    Raises IosrFastError where another server collects into the folder or its state is damaged, and OSError where it
    can't be written.
    """

    def __init__(
        self,
        folder: Path,
        limit: int,
        max_error: float,
        on_outcome: Callable[[str], None] = lambda outcome: None,
        check_share: float | None = None,
        digest: str = "",
        several: bool = False,
    ) -> None:
        self._folder, self._limit, self._max_error = KeptFolder(folder), limit, max_error
        self._several = several
        self._on_outcome = on_outcome
        self._failures: dict[str, str] = {}  # the last ones, logged once; "" if it went well
        self._kept: list[np.ndarray] = []  # plain embeddings (D,) since the start, at most `limit`
        self._waiting, self._counting = Shares(Limits.uploads_to_judge), threading.Lock()
        self._reading: Future[None] | None = None  # of labels, the last one
        self.checks: CheckSample | None = None
        if check_share is not None:
            self.checks = CheckSample(self._folder, check_share, limit, max_error, digest, several)
        self._folder.change(COLLECTED)  # what can't be written is an error now
        self._make_room(0)
        self._thread = ThreadPoolExecutor(1, "iosr-fast-collector")
        self._context = copy_context()  # logs say which classifier it is of, as here

    def offer(self, image: Any, embeddings: Embeddings, head: Head, client: str) -> None:
        """Judge an image that was answered, if it came as bytes. Does not wait."""
        if not isinstance(image, bytes):
            return
        size = len(image)
        with self._counting:
            fits = self._waiting.fits(client, size) if client else self._waiting.used + size <= Limits.uploads_to_judge
            self._waiting.add(client, size if fits else 0)
        if fits:
            self._thread.submit(self._context.run, self._run, image, embeddings.to_numpy(), head, client)
        else:
            self._on_outcome("left out")

    def read_labels(self, head: Head) -> None:
        """Let the checks count new labels, unless they are about to. Does not wait."""
        with self._counting:
            if self._reading is None or self._reading.done():
                self._reading = self._thread.submit(self._context.run, self._count_labels, head)

    def settle(self) -> None:
        """Wait until all images that were offered are judged."""
        self._thread.submit(int).result()

    def close(self) -> None:
        """Judge what waits, and end."""
        self._thread.shutdown()
        self._folder.close()

    def _run(self, image: bytes, embeddings: Embeddings, head: Head, client: str) -> None:
        outcome = self._guarded("pictures can't be kept", self._judge, image, embeddings, head, client)
        if outcome:
            self._on_outcome(outcome)
        with self._counting:
            self._waiting.add(client, -len(image))
        self._count_labels(head)

    def _count_labels(self, head: Head) -> None:
        if self.checks is not None:
            self._guarded("labels can't be read", self.checks.read_labels, head)

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

    def _judge(self, image: bytes, embeddings: Embeddings, head: Head, client: str) -> str:
        """Keep an image with embeddings (1, D) that `head` answered, if it needs a look; what became of it, "" if
        nobody needs to look at it."""
        client = client and self._folder.keyed(client)[:16]  # tables tell clients apart, and don't name them
        # The sample is of labels that `max_error` accepts, whether or not a picture may be of an unknown class.
        prediction = predict(head, embeddings, abstention=Abstention(max_error=self._max_error))[0]
        if prediction.accepted_labels and self.checks is not None and self.checks.offer(image, prediction, client):
            return "check"
        if prediction.accepted and not head.is_multi_label and head.unknown.can_promise(KEEP):
            prediction = predict(head, embeddings, abstention=Abstention(KEEP, max_error=self._max_error))[0]
        if prediction.top and len(prediction.accepted_labels) == len(prediction.top):
            return ""
        name = picture_name(image)
        if name in self._folder.pictures() or head.near_support(embeddings.plain, self._kept)[0]:
            return "near duplicate"
        if not self._make_room(1, client):
            return "left out"
        self._folder.write(name, image)
        guess = SEPARATOR.join(label for label, _ in prediction.pairs)
        reason = UNKNOWN if prediction.label is None else UNSURE
        row = {"path": name, "guess": guess, "probability": f"{prediction.probability:.4f}", "reason": reason}
        self._folder.change(COLLECTED, [row | {"time": time_text(), "client": client}])
        self._kept = [*self._kept, embeddings.plain[0]][-self._limit :]
        return "kept"

    def _make_room(self, more: int, client: str = "") -> bool:
        """Make the table list what the folder has, and let pictures without a label go, so that `more` of the client
        fit. False if they don't."""
        files = self._folder.pictures()
        for name in self._folder.rows(CHECKS):
            files.pop(name, None)
        rows = self._folder.rows(COLLECTED)
        if found := sorted(files.keys() - rows.keys(), key=files.__getitem__):
            new = [{"path": name, "reason": FOUND, "time": time_text(files[name])} for name in found]
            self._folder.change(COLLECTED, new)
            rows = self._folder.rows(COLLECTED)
        labels = self._folder.labels(self._several)
        held, ranks = Counter({client: more}), dict[str, int]()  # each client's newest picture has rank 1
        for path, row in sorted(rows.items(), key=lambda one: one[1]["time"])[::-1]:
            if path in files and path not in labels:
                held[row["client"]] += 1
                ranks[path] = held[row["client"]]
        surplus = max(0, len(files) + more - self._limit)
        gone = sorted(reversed(ranks), key=ranks.__getitem__, reverse=True)[:surplus]  # of equal ranks the oldest
        fits = len(gone) == surplus
        gone = gone if fits else []
        missing = rows.keys() - files.keys()
        if gone or missing:
            self._folder.change(COLLECTED, gone=[*gone, *missing])
            self._folder.remove(gone)
        return fits
