"""Changing a classifier in use: a change makes a new Head; readers keep the one that they hold."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.head.examples import Examples
from iosr_fast.head.fit import Fit
from iosr_fast.head.fitted import FittedAttributes
from iosr_fast.head.head import Head
from iosr_fast.head.ids import class_id, example_id
from iosr_fast.head.method_config import MethodConfig
from iosr_fast.head.names import check_new_name
from iosr_fast.head.support_images import encode_images
from iosr_fast.images.preprocess import as_array, as_image_list, to_pixels
from iosr_fast.methods import METHODS
from iosr_fast.methods.tuning.tune import check_choice
from iosr_fast.methods.tuning.tune import tune as search
from iosr_fast.methods.tuning.tuned import Tuned
from iosr_fast.scoring.validation import check_unit_rows
from iosr_fast.store.audit import open_log
from iosr_fast.store.changes import Change, ChangeResult
from iosr_fast.store.log_writer import AuditLog
from iosr_fast.utils.numbers import refuse_masked

_CHUNK = 256
log = logging.getLogger(__name__)


class LiveUpdates(FittedAttributes):
    """The part of Classifier that changes the Head.

    Readers never block; each call sees exactly one version. Changes wait for one another; images are encoded and texts
    embedded before that, while other calls run. With an audit log (`open_log`) a change is on the disk before any
    reader sees it.

    For "tip-adapter", "tip-adapter++" and "zero-shot" the cost of a change depends on the images that it adds, not on
    the size of the cache; for "gda" it is a matrix inverse. the others weigh all images against one another
    and are fitted again on the stored embeddings. Method, parameters and reducer stay until `retune`.

    >>> from iosr_fast import Classifier
    >>> from iosr_fast.clip.demo.pictures import load_pictures
    >>> pictures = load_pictures("held-out", min_styles=5)
    >>> images, labels = pictures.images[:18], [pictures.names[c] for c in pictures.concepts[:18]]
    >>> classifier = Classifier("demo", method="tip-adapter++", alpha=100, beta=20).fit(images, labels)
    >>> change = classifier.add_class("night", [images[0] // 9])
    >>> change.version, classifier.predict(images[0] // 9).tolist()
    (2, ['night'])
    >>> classifier.remove_class("night").version
    3
    """

    tune_seconds: float

    def __init__(self) -> None:
        self._log: AuditLog | None = None
        self._changing = threading.Lock()

    def add_class(self, name: str, images: Any = (), text: np.ndarray | None = None) -> ChangeResult:
        """A new class from a few images (none where the method is "zero-shot").

        `text` (D,), L2-normalised, is the embedding of its name; None has the text encoder make it. Raises ValueError
        for a name that is taken or empty, without images, for unreadable ones, or without a text encoder.
        """
        fit = self._changeable("add_class")
        head = fit.head
        self._check_name(head, name)
        listed = as_image_list(images)
        if not listed and METHODS[head.config.method].needs_support:
            raise IosrFastError(
                f"expected at least one image of {name!r}, got none: {head.config.method} compares images"
            )
        encoded = self._encode(fit, listed)
        row = self._check_text(head, text) if text is not None else self._text_of(fit, name)
        with self._changing:
            before, head = head, self._same_fit(fit).head
            if head is not before:
                self._check_name(head, name)
            added = _numbered(encoded, head.next_class, head.next_example) if encoded is not None else None
            return self._make(Change("add_class", head.next_class, name=name, text=row, added=added))

    def add_examples(self, name_or_id: str, images: Any) -> ChangeResult:
        """More support images of a class, by id or name. ValueError for an unknown class or unreadable images."""
        fit = self._changeable("add_examples")
        fit.head.find_class(name_or_id)
        encoded = self._encode(fit, as_image_list(images))
        if encoded is None:
            raise IosrFastError(f"expected at least one image to add to {name_or_id!r}, got none")
        with self._changing:
            head = self._same_fit(fit).head
            uid = head.find_class(name_or_id)
            return self._make(Change("add_examples", uid, added=_numbered(encoded, uid, head.next_example)))

    def remove_examples(self, example_ids: Sequence[str]) -> ChangeResult:
        """Take support images out. Raises ValueError for an unknown id, or where the method needs one that would go."""
        self._changeable("remove_examples")
        listed = [example_ids] if isinstance(example_ids, str) else list(example_ids)
        with self._changing:
            numbers = self.snapshot().find_examples(listed)
            return self._make(Change("remove_examples", numbers=tuple(numbers)))

    def remove_class(self, name_or_id: str) -> ChangeResult:
        """Take a class out, by id or name, with its images. Raises ValueError where fewer than two would be left."""
        self._changeable("remove_class")
        with self._changing:
            head = self.snapshot()
            uid = head.find_class(name_or_id)
            if len(head.uids) <= 2:
                raise IosrFastError(f"expected at least two classes to tell apart: {name_or_id!r} can't be removed")
            return self._make(Change("remove_class", uid))

    def rename_class(
        self, name_or_id: str, name: str, text: np.ndarray | None = None, keep_text: bool = False
    ) -> ChangeResult:
        """Another name for a class, by id or name, and so another text embedding; its id stays.

        `text` as for `add_class`; `keep_text` changes what is shown and nothing else. Raises ValueError for an unknown
        class, a name that is taken or empty, or without a text encoder.
        """
        fit = self._changeable("rename_class")
        head = fit.head
        uid = head.find_class(name_or_id)
        self._check_name(head, name, uid)
        if keep_text and text is not None:
            raise IosrFastError("expected text or keep_text, got both")
        row = None if keep_text else self._check_text(head, text) if text is not None else self._text_of(fit, name)
        with self._changing:
            before, head = head, self._same_fit(fit).head
            uid = head.find_class(class_id(uid))
            if head is not before:
                self._check_name(head, name, uid)
            return self._make(Change("rename_class", uid, name=name, text=row))

    def tune(
        self,
        images: Any = None,
        labels: Sequence[Any] | np.ndarray | None = None,
        method: str | None = None,
        reducer: str | None = None,
    ) -> Tuned:
        """Choose the parameters again: on labelled validation images, or by leave-one-out without any.

        `method` defaults to the fitted one; "auto" as at a fit. `labels` as for `score`. Returns the choice and
        its reasons (also `tuned_`). Raises ValueError as `fit` and `score` do, before anything is encoded.
        """
        fit = self._changeable("tune")
        head = fit.head
        method = head.config.method if method is None else method
        check_choice(method, reducer, None)
        if (images is None) != (labels is None):
            raise IosrFastError("expected validation images and their labels together, got one without the other")
        queries, ids = None, None
        if images is not None:
            listed = as_image_list(images)
            if not listed:
                raise IosrFastError("expected at least one validation image, got none")
            ids = fit.class_ids(listed, labels)
            encoder = fit.clip.encoder_for(adapted=True)
            queries = Embeddings.concatenate([encoder.encode(pixels) for pixels in self._chunks(fit, listed)])
        if reducer is None and method == head.config.method:
            reducer = head.config.reducer_name
        with self._changing:
            if self._same_fit(fit).head.uids != head.uids:
                raise IosrFastError("the classes have changed while validation images were encoded: tune again")
            tuned, _ = self._search(method, reducer, queries, ids)
        return tuned

    def retune(self) -> ChangeResult:
        """Choose the parameters of the method again, by leave-one-out on the current examples (`tune`)."""
        self._changeable("retune")
        with self._changing:
            config = self.snapshot().config
            return self._search(config.method, config.reducer_name)[1]

    def open_log(self, path: str | Path, recover: bool = False) -> None:
        """Log every change from now on, after making those that the log has already: `load`, then `open_log`.

        Raises ValueError for a log of another classifier or a damaged one, or where one is open. `recover` opens one
        that lost changes: a warning says which, and the files as they were are kept beside it (audit.open_log).
        """
        self._changeable("open_log")
        with self._changing:
            if self._log is not None:
                raise IosrFastError(f"expected no log to be open, got {self._log.path}; close_log closes it")
            fit = self._fitted()
            log, head = open_log(path, fit.head, recover)
            self._log, self._fit = log, replace(fit, head=head)

    def close_log(self) -> None:
        """Close the log; later changes are not written."""
        with self._changing:
            if self._log is not None:
                log, self._log = self._log, None
                log.close(self.snapshot())

    @property
    def log_failure(self) -> str:
        """Why the last change could not be written to the log, and so was not made; "" where it could."""
        log = self._log
        return "" if log is None else log.failure

    def _changeable(self, call: str) -> Fit:
        """The fit. Raises IosrFastError after a fit with several labels a picture, which takes no changes."""
        fit = self._fitted()
        fit.head.one_label(call, "fit again with all pictures and their labels")
        return fit

    def _search(
        self, method: str, reducer: str | None, queries: Embeddings | None = None, ids: np.ndarray | None = None
    ) -> tuple[Tuned, ChangeResult]:
        """Under the lock: search the parameters and change to them."""
        head = self.snapshot()
        tuned = search(method, head.support, queries, ids, reducer or "none", self.tune_seconds)
        chosen = METHODS[tuned.method]
        if (chosen.which == "adapted") != head.needs_adapted:
            log.info("%s compares %s embeddings; queries are encoded for it from now on", tuned.method, chosen.which)
            self._fitted().clip.encoder_for(chosen.which == "adapted")  # opened now, so that no reader waits for it
        tuned = replace(tuned, version=head.version + 1)
        return tuned, self._make(Change("retune", config=MethodConfig.of(tuned, head.config.key_precision)))

    def _make(self, change: Change) -> ChangeResult:
        """Under the lock: apply the change to the head, log it, and then publish it in one step.

        Raises LogWriteError where it can't be logged; then, as with any interrupt, the change was not made.
        """
        fit = self._fitted()
        if self._log is None:
            head = change.apply(fit.head)
            self._fit = replace(fit, head=head)
        else:
            self._fit = fit = replace(fit, head=self._log.compact(fit.head))
            head = change.apply(fit.head)
            try:
                self._log.append(change, fit.head, head)
                self._fit = replace(fit, head=head)
            except BaseException:
                self._log.try_to_settle(self._fit.head)
                raise
        ids = tuple(example_id(number) for number in change.example_numbers)
        return ChangeResult(head.version, class_id(change.uid) if change.uid >= 0 else "", ids)

    def _replace(self, fit: Fit) -> None:
        """Take over the result of a fit, or a bundle."""
        with self._changing:
            self._check_no_log()
            self._fit = fit

    def _check_no_log(self) -> None:
        if self._log is not None:
            raise IosrFastError(
                f"expected no audit log to be open, got {self._log.path}: it has no line for a fit or another engine"
            )

    def _same_fit(self, fit: Fit) -> Fit:
        """Under the lock: the current version of `fit`, with whose encoder something was encoded outside the lock."""
        current = self._fitted()
        if (current.clip, current.views) != (fit.clip, fit.views):
            raise IosrFastError("the classifier was fitted again while images or texts were encoded: repeat the change")
        return current

    @staticmethod
    def _chunks(fit: Fit, images: Any) -> Iterator[np.ndarray]:
        """Pixels (B, S, S, 3) of the images in their order, a few hundred at a time."""
        # A batch array stays one: pixels of the right size reach the encoder without a copy.
        array = as_array(images)
        listed = array if array is not None and array.ndim == 4 else as_image_list(images)
        for start in range(0, len(listed), _CHUNK):
            try:
                yield to_pixels(listed[start : start + _CHUNK], fit.clip.encoder.geometry, fit.views.exif_orientation)
            except BadImageError as error:
                raise error.moved(start) from error.__cause__

    @staticmethod
    def _encode(fit: Fit, images: Sequence[Any]) -> Examples | None:
        """The images as examples without class and numbers yet; None for no images."""
        if not images:
            return None
        return encode_images(fit.clip.encoder_for(adapted=True), images, np.full(len(images), -1), fit.views)[0]

    @staticmethod
    def _text_of(fit: Fit, name: str) -> np.ndarray:
        """A class name's text embedding (D,). Raises ValueError without a text encoder."""
        if fit.clip.text is None:
            raise IosrFastError(
                f"this classifier has no text encoder to embed {name!r} with: give text=, the embedding of the name"
            )
        row: np.ndarray = fit.clip.text.embed_classes([name], fit.views.templates)[0]
        return row

    @staticmethod
    def _check_name(head: Head, name: str, itself: int | None = None) -> None:
        check_new_name(name, [other for uid, other in zip(head.uids, head.class_names, strict=True) if uid != itself])

    @staticmethod
    def _check_text(head: Head, text: np.ndarray) -> np.ndarray:
        refuse_masked("text", text)
        row = np.ascontiguousarray(text, np.float32)
        if row.shape != head.text.shape[1:]:
            raise IosrFastError(f"expected a text embedding of shape {head.text.shape[1:]}, got {row.shape}")
        check_unit_rows("text", row[None])
        return row


def _numbered(encoded: Examples, uid: int, first: int) -> Examples:
    numbers = np.arange(first, first + len(encoded))
    return replace(encoded, class_ids=np.full(len(encoded), uid, np.int64), ids=numbers)
