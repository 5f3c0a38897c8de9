"""Changing a classifier while others use it: a change makes a new State, and readers go on with the one they hold."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Encoder
from iosr_fast.images.preprocess import as_image_list
from iosr_fast.methods import METHODS
from iosr_fast.scoring.validation import check_unit_rows
from iosr_fast.state.audit import open_log
from iosr_fast.state.changes import Change, ChangeResult
from iosr_fast.state.examples import Examples
from iosr_fast.state.ids import class_id, example_id
from iosr_fast.state.labels import as_seen, leave_out_bad, name_fault
from iosr_fast.state.log_writer import AuditLog
from iosr_fast.state.state import ClassInfo, State
from iosr_fast.state.support_images import SupportViews


class LiveUpdates(ABC):
    """The part of Classifier that takes classes and examples in and out.

    Who classifies never waits for a change, and is answered by one state or the other, whole. Changes wait for one
    another; images are encoded and texts embedded before that, beside whatever else goes on. With an audit log
    (`open_log`) a change is on the disk before anybody sees it.

    For "tip-adapter", "tip-adapter++" and "zero-shot" a change costs what it adds, not what the cache holds; for "gda"
    it costs an inverse, whatever the cache holds. "ape", "tip-x" and "proker" weigh all images against one another:
    they are fit again on the embeddings that are kept. Method, parameters and reducer stay until
    `retune`.
    """

    encoder: Encoder
    _state: State
    _views: SupportViews
    _log: AuditLog | None
    _changing: threading.Lock

    @abstractmethod
    def snapshot(self) -> State:
        """What is classified with now: hold on to it and nothing changes. Raises ValueError before a fit."""

    @abstractmethod
    def _text_of(self, name: str) -> np.ndarray:
        """A class name's text embedding (D,). Raises ValueError where there is no text encoder."""

    @property
    def version(self) -> int:
        """Rises by one with every change."""
        return self.snapshot().version

    def classes(self) -> list[ClassInfo]:
        """The classes in their order, each with its id and the number of its examples."""
        return self.snapshot().classes()

    def examples(self, given: str) -> list[str]:
        """The ids of a class's examples. Raises ValueError where there is no such class."""
        state = self.snapshot()
        return [example_id(number) for number in state.examples_of(state.find_class(given))]

    def picture(self, given: str) -> bytes | None:
        """An example's thumbnail, WebP; None where none was kept. Raises ValueError for an unknown id."""
        state = self.snapshot()
        (number,) = state.find_examples([given])
        for part in state.segments:
            at = np.flatnonzero(part.ids == number)
            if len(at):
                return part.pictures[int(at[0])]
        raise AssertionError(given)

    def add_class(self, name: str, images: Any = (), text: np.ndarray | None = None) -> ChangeResult:
        """A new class from a few images (none where the method is "zero-shot").

        `text` (D,), L2-normalised, is the embedding of its name; None has the text encoder make it. Raises ValueError
        for a name that is taken or empty, without images, for unreadable ones, or without a text encoder.
        """
        state = self.snapshot()
        self._check_name(state, name)
        listed = as_image_list(images)
        if not listed and METHODS[state.config.method].needs_support:
            raise ValueError(
                f"expected at least one image of {name!r}, got none: {state.config.method} compares images"
            )
        encoded = self._encode(listed)
        row = self._check_text(state, text) if text is not None else self._text_of(name)
        with self._changing:
            state = self.snapshot()
            self._check_name(state, name)
            added = _numbered(encoded, state.next_class, state.next_example) if encoded is not None else None
            return self._make(Change("add_class", state.next_class, name=name, text=row, added=added))

    def add_examples(self, given: str, images: Any) -> ChangeResult:
        """More support images of a class, by id or name. ValueError for an unknown class or unreadable images."""
        self.snapshot().find_class(given)
        encoded = self._encode(as_image_list(images))
        if encoded is None:
            raise ValueError(f"expected at least one image to add to {given!r}, got none")
        with self._changing:
            state = self.snapshot()
            uid = state.find_class(given)
            return self._make(Change("add_examples", uid, added=_numbered(encoded, uid, state.next_example)))

    def remove_examples(self, example_ids: Sequence[str]) -> ChangeResult:
        """Take support images out. Raises ValueError for an unknown id, or where the method needs one that would go."""
        listed = [example_ids] if isinstance(example_ids, str) else list(example_ids)
        with self._changing:
            numbers = self.snapshot().find_examples(listed)
            return self._make(Change("remove_examples", numbers=tuple(numbers)))

    def remove_class(self, given: str) -> ChangeResult:
        """Take a class out, by id or name, with its images. Raises ValueError where fewer than two would be left."""
        with self._changing:
            state = self.snapshot()
            uid = state.find_class(given)
            if len(state.uids) <= 2:
                raise ValueError(f"expected at least two classes to tell apart: {given!r} can't be removed")
            return self._make(Change("remove_class", uid))

    def rename_class(
        self, given: str, name: str, text: np.ndarray | None = None, keep_text: bool = False
    ) -> ChangeResult:
        """Another name for a class, by id or name, and so another text embedding; its id stays.

        `text` as for `add_class`; `keep_text` changes what is shown and nothing else. Raises ValueError for an unknown
        class, a name that is taken or empty, or without a text encoder.
        """
        state = self.snapshot()
        uid = state.find_class(given)
        self._check_name(state, name, uid)
        if keep_text and text is not None:
            raise ValueError("expected text or keep_text, got both")
        row = None if keep_text else self._check_text(state, text) if text is not None else self._text_of(name)
        with self._changing:
            state = self.snapshot()
            uid = state.find_class(class_id(uid))
            self._check_name(state, name, uid)
            return self._make(Change("rename_class", uid, name=name, text=row))

    def open_log(self, path: str | Path, recover: bool = False) -> None:
        """Log every change from now on, after making those that the log has already: `load`, then `open_log`.

        Raises ValueError for a log of another classifier or a damaged one, or where one is open. `recover` opens one
        that lost changes: a warning says which, and the files as they were are kept beside it (audit.open_log).
        """
        with self._changing:
            if self._log is not None:
                raise ValueError(f"expected no log to be open, got {self._log.path}; close_log closes it")
            self._log, self._state = open_log(path, self.snapshot(), recover)

    def close_log(self) -> None:
        """Close the log; later changes are not written."""
        with self._changing:
            if self._log is not None:
                log, self._log = self._log, None
                log.close(self._state)

    @property
    def log_failure(self) -> str:
        """Why the last change could not be written to the log, and so was not made; "" where it could."""
        log = self._log
        return "" if log is None else log.failure

    def _make(self, update: Change) -> ChangeResult:
        """Under the lock: the change on the state, into the log, and then, in one step, to everybody.

        Raises LogWriteError where it can't be written; then, as with any interrupt, it was not made.
        """
        if self._log is None:
            self._state = state = update.apply(self._state)
        else:
            self._state = self._log.compact(self._state)
            state = update.apply(self._state)
            try:
                self._log.append(update, self._state, state)
                self._state = state
            except BaseException:
                self._log.try_to_settle(self._state)
                raise
        ids = tuple(example_id(number) for number in update.example_numbers)
        return ChangeResult(state.version, class_id(update.uid) if update.uid >= 0 else "", ids)

    def _encode(self, listed: Sequence[Any]) -> Examples | None:
        """The images as examples without numbers yet; None where there are none."""
        if not listed:
            return None
        leave_out_bad(listed, np.zeros(len(listed), np.int64), skip_bad=False)
        embeddings, queries = self._views.encode_later(self.encoder, listed)
        nobody = np.full(len(listed), -1, np.int64)
        return Examples(embeddings, nobody, nobody, self._views.thumbnails(listed), queries)

    @staticmethod
    def _check_name(state: State, name: str, itself: int | None = None) -> None:
        fault = name_fault(name) if isinstance(name, str) else "which is no text"
        if fault:
            raise ValueError(f"expected a class name, got {name!r}, {fault}")
        seen = as_seen(name)
        taken = [uid for uid, other in zip(state.uids, state.class_names, strict=True) if as_seen(other) == seen]
        if taken and taken != [itself]:
            raise ValueError(f"expected class names to differ, got {name!r}, which is class {class_id(taken[0])}")

    @staticmethod
    def _check_text(state: State, text: np.ndarray) -> np.ndarray:
        row = np.ascontiguousarray(text, np.float32)
        if row.shape != state.text.shape[1:]:
            raise ValueError(f"expected a text embedding of shape {state.text.shape[1:]}, got {row.shape}")
        check_unit_rows("text", row[None])
        return row


def _numbered(encoded: Examples, uid: int, first: int) -> Examples:
    numbers = np.arange(first, first + len(encoded))
    class_ids = np.full(len(encoded), uid, np.int64)
    return Examples(encoded.embeddings, class_ids, numbers, encoded.pictures, encoded.queries)
