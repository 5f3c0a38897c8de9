"""Changes as callers ask for them: names and ids are checked, images encoded and texts embedded, then a Change is made.

Encoding needs no lock, so that other calls go on; a Change is made under the lock of writers (store.Store).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs

from iosr_fast.delivery.engine_choice import EngineChoice, EngineGoal, OptimizeOptions
from iosr_fast.delivery.fitted import FittedClassifier
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.class_tree import Parent, check_nodes, path_below
from iosr_fast.head.descriptions import check_descriptions
from iosr_fast.head.examples import Examples
from iosr_fast.head.fit import warn_of_look_alikes
from iosr_fast.head.head import Head
from iosr_fast.head.ids import class_id, example_id
from iosr_fast.head.labels import Labels, read_groups
from iosr_fast.head.names import check_new_name
from iosr_fast.head.support_images import NONE_OF_THE_CLASSES, encode_images
from iosr_fast.images.preprocess import as_image_list
from iosr_fast.methods import METHODS
from iosr_fast.methods.config import Config
from iosr_fast.methods.support_set import blocks
from iosr_fast.methods.tune import asked_config
from iosr_fast.methods.tune import tune as search
from iosr_fast.scoring.validation import check_unit_rows
from iosr_fast.store import changes
from iosr_fast.store.changes import Change, ChangeResult
from iosr_fast.store.store import Store
from iosr_fast.utils.numbers import refuse_masked

log = logging.getLogger(__name__)

# The most by which the cosine of a picture with itself falls short of 1. Measured: 2.4e-7 by float32 sums, 4e-14 beside
# them where an engine encodes it alone and among 64, in fp32, fp16 and int8; other pictures of the demo are above 1e-3.
_SAME = 1e-6
_PRODUCTS = 1 << 22  # cosines in memory: 16 MB


class Changing:
    """The changes of a Classifier. Each is made as a whole, in its turn, or refused with nothing changed."""

    _store: Store
    progress: bool
    skip_bad: bool
    tune_seconds: float

    def add_class(
        self,
        name: str,
        images: Any = (),
        text: np.ndarray | None = None,
        descriptions: Sequence[str] | None = None,
        parent: Parent = None,
    ) -> ChangeResult:
        """A new class from a few images (none where the method is "zero-shot"). `text` (D,), L2-normalised, is its text
        embedding; None has the text encoder make it of the name and `descriptions`, as `fit` does; both are refused
        where the model reads no texts. An iterator of `images` is taken one after another, never all into memory.
        `parent` as for `move_class`. The first unreadable image is a BadImageError, and a picture that another class
        has an IosrFastError; nothing is changed then. Where pictures may have several labels, such a support image gets
        this one, too."""
        fit = self._store.fitted()
        _check_name(fit.head, name, path_below(parent, fit.head.paths))
        row = _text(fit, name, text, descriptions)
        encoded = _encode(fit, images)
        method = fit.head.config.method
        if encoded is None and METHODS[method].needs_support:
            raise IosrFastError(f"expected at least one image of {name!r}, got none: {method} compares images")

        def make(head: Head) -> Change:
            uid, path = head.next_class, path_below(parent, head.paths)
            new, known = _split(encoded, head)
            return changes.AddClass.of(uid, _numbered(new, head, [uid]), row, name=name, path=path, known=known)

        return self._store.change(fit, make)

    def add_examples(self, name_or_id: str | Collection[str], images: Any) -> ChangeResult:
        """More support images of a class, by id or name; `images` as for `add_class`. Where pictures may have several
        labels, a collection of classes, which all these pictures have; an empty one for pictures of no label."""
        fit = self._store.fitted()
        _find_classes(fit.head, name_or_id)
        encoded = _encode(fit, images)
        if encoded is None:
            raise IosrFastError(f"expected at least one image to add to {name_or_id!r}, got none")

        def make(head: Head) -> Change:
            uids = _find_classes(head, name_or_id)
            added = _numbered(encoded, head, uids)
            return changes.AddExamples.of(uids[0] if uids else None, added, others=tuple(uids[1:]))

        return self._store.change(fit, make)

    def relabel(self, example_ids: Sequence[str], name_or_id: str | Collection[str]) -> ChangeResult:
        """Other labels for support images, instead of theirs: a class by id or name, or a collection of them as for
        `add_examples`. Ids and pictures stay. Refused as `remove_examples` where a class would lose its last image."""
        listed = [example_ids] if isinstance(example_ids, str) else list(example_ids)
        fit = self._store.fitted()

        def make(head: Head) -> Change:
            change = changes.Relabel(tuple(head.find_examples(listed)), tuple(_find_classes(head, name_or_id)))
            chosen = np.isin(head.examples.ids, change.numbers)
            _check_left(head, head.examples.relabelled(chosen, change.labels).class_ids)
            return change

        return self._store.change(fit, make)

    def remove_examples(self, example_ids: Sequence[str]) -> ChangeResult:
        """Take support images out. Refused where the method needs one that would go, and for the last image of a class
        that has no text."""
        listed = [example_ids] if isinstance(example_ids, str) else list(example_ids)
        fit = self._store.fitted()

        def make(head: Head) -> Change:
            numbers = head.find_examples(listed)
            _check_left(head, head.examples.rows(~np.isin(head.examples.ids, numbers)).class_ids)
            return changes.RemoveExamples(tuple(numbers))

        return self._store.change(fit, make)

    def remove_class(self, name_or_id: str) -> ChangeResult:
        """Take a class out, by id or name, with its images; where pictures may have several labels, these stay without
        it. Refused where fewer than two would be left."""
        fit = self._store.fitted()
        return self._store.change(fit, lambda head: changes.RemoveClass(head.find_class(name_or_id)))

    def rename_class(
        self,
        name_or_id: str,
        name: str,
        text: np.ndarray | None = None,
        keep_text: bool = False,
        descriptions: Sequence[str] | None = None,
    ) -> ChangeResult:
        """Another name for a class, by id or name, and so another text embedding if classes have one (`text` and
        `descriptions` as for `add_class`; earlier descriptions are not kept), unless `keep_text`; its id stays."""
        fit = self._store.fitted()
        uid = fit.head.find_class(name_or_id)
        _check_name(fit.head, name, itself=uid)
        if keep_text and (text is not None or descriptions is not None):
            raise IosrFastError("expected keep_text, or text or descriptions for another one, got both")
        row = None if keep_text else _text(fit, name, text, descriptions)
        return self._store.change(fit, lambda head: changes.RenameClass.of(head.find_class(class_id(uid)), name, row))

    def move_class(self, name_or_id: str, parent: Parent) -> ChangeResult:
        """Another place in the tree for a class, by id or name. `parent` is a node by its name, or the path of nodes
        from the root's child down, a sequence of names, which may be new; None or () is the root. A node goes with the
        last class below it. What `max_error` promises is computed again."""
        fit = self._store.fitted()
        return self._store.change(
            fit, lambda head: changes.MoveClass(head.find_class(name_or_id), path_below(parent, head.paths))
        )

    def tune(
        self, images: Any = None, labels: Any = None, method: str | None = None, reducer: str | None = None
    ) -> Config:
        """Choose the parameters again: on labelled validation images, or by leave-one-out without any. `method` and
        `reducer` default to the fitted ones; `labels` as for `score`. Returns the choice and its `evidence`
        (`tuned_`)."""
        return self._tuned(images, labels, method, reducer)[0]

    def retune(self) -> ChangeResult:
        """`tune` on the current examples, as a change."""
        return self._tuned(None, None, None, None)[1]

    def _tuned(self, images: Any, labels: Any, method: str | None, reducer: str | None) -> tuple[Config, ChangeResult]:
        fit = self._store.fitted()
        asked_config(method or fit.head.config.method, reducer)
        if (images is None) != (labels is None):
            raise IosrFastError("expected validation images and their labels together, got one without the other")
        queries, truth = None, None
        if images is not None:
            listed = fit.listed(images)
            if not listed:
                raise IosrFastError("expected at least one validation image, got none")
            truth = fit.read_labels(listed, labels)
            encoder = fit.clip.encoder_for(adapted=True)
            queries = Embeddings.concatenate([encoder.encode(pixels) for pixels in fit.chunks(listed)])
        chosen: list[Config] = []

        def make(head: Head) -> Change:
            if queries is not None and head.uids != fit.head.uids:
                raise IosrFastError("the classes have changed while validation images were encoded: tune again")
            if queries is None and not len(head.examples):
                raise IosrFastError("expected support images or validation images to choose parameters by, got none")
            config = head.config
            name = method or config.method
            fitted_reducer = config.reducer if name == config.method else "none"
            chosen_anew = {"parameters": {}, "factor": 1.0, "evidence": None}
            asked = structs.replace(config, method=name, reducer=reducer or fitted_reducer, **chosen_anew)
            best, *_ = search(asked, head.support, queries, truth, seconds=self.tune_seconds)
            if (best.which == "adapted") != head.needs_adapted:
                log.info("%s compares %s embeddings; queries are encoded for it from now on", best.method, best.which)
                fit.clip.encoder_for(best.which == "adapted")  # opened now, so that no reader waits for it
            evidence = best.evidence and structs.replace(best.evidence, version=head.version + 1)
            chosen.append(structs.replace(best, evidence=evidence))
            return changes.Retune.of(chosen[0])

        result = self._store.change(fit, make)
        return chosen[0], result

    def calibrate_on(self, images: Any, labels: Any, groups: Any = None) -> ChangeResult:
        """Let promises rest on labelled pictures from production, instead of left-out support images: `predict_sets`,
        `max_error`, unknown="reject" and `calibration`; the scale of the probabilities is fitted to them. `labels` as
        for `score`, `groups` as for `fit`. No label changes.

        Near duplicates of support images, and pictures that look like one of their class (siblings, as of one session),
        are left out; repeated pictures, look-alikes and those of one group count as one. At least 9 have to be left.
        Where more are siblings than independent pictures show, a LookAlikesWarning says so: take them from other
        sessions than the support. They are saved and kept by changes; those of a class that is removed go. Refused
        with an open log."""
        fit = self._store.fitted()
        self._store.check_no_log()
        calibrated = calibrate(fit, images, labels, groups, bool(self.skip_bad))
        warn_of_look_alikes(calibrated.head)
        self._store.replace(calibrated, instead_of=fit)
        return ChangeResult(calibrated.head.version)

    def optimize(
        self,
        images: Any,
        labels: Sequence[Any] | np.ndarray,
        objective: EngineGoal = "latency",
        tolerance: float = 0.5,
        runtime: str = "auto",
        precision: str = "auto",
        pretrained: str | Path | None = None,
        adapter: str | Path | None = "auto",
        smaller_images: bool = False,
        unknown_images: Any = None,
    ) -> EngineChoice:
        """Choose the fastest engine that this machine can run and that keeps the accuracy; encode the examples with it.

        `images` and `labels` are those of the fit and of later changes, in any order; `unknown_images` likewise.
        Engines are built, calibrated on them, timed, and judged by the labels of left-out examples: `tolerance` is the
        accepted loss of accuracy in points (engine_choice.rejection_reason). The `objective` is "latency" (one image),
        "throughput" (a batch) or "size" (bytes). `runtime` and `precision` restrict the candidates, `smaller_images`
        adds some. Some are exported from the model in torch, which a loaded classifier has where `pretrained` (and
        `adapter`) name it. Returns the table (`engine_choice_`); `version` rises if embeddings change. Refused: an
        example or an unknown image without its picture, another model than the engine's, an open log, a change
        meanwhile."""
        options = OptimizeOptions(objective, tolerance, runtime, precision, smaller_images, bool(self.progress))
        fit = self._store.fitted()
        head = fit.head.require_single_label("optimize", "it compares single labels; build the engine that you want")
        if fit.estimator is not None:
            raise IosrFastError("a head on rows of embeddings has no engine to choose: optimize a Classifier of images")
        from iosr_fast.delivery.optimize import match_images, optimize

        self._store.check_no_log()
        engine = fit.clip.encoder.source
        if smaller_images and engine is not None and engine.manifest["dual_encoder"] is None:
            raise IosrFastError(
                "expected a CLIP whose image encoder is a vision transformer for smaller_images, got "
                f"{engine.manifest['model']}, which takes images of one size"
            )
        listed = as_image_list(images)
        unknown = [] if unknown_images is None else as_image_list(unknown_images)
        if head.unknown_images is not None and not unknown:
            raise IosrFastError(
                f"this classifier was fitted with {len(head.unknown_images)} unknown images: expected unknown_images, "
                "so that the engine that is chosen can encode them, got none"
            )
        if head.calibration_images is not None:
            raise IosrFastError(
                "this classifier has images of calibrate_on: fit again, optimize, and then calibrate_on"
            )
        loaded = fit
        if pretrained is not None:
            from iosr_fast.export.pretrained import with_loaded

            loaded = replace(fit, clip=with_loaded(fit.clip, pretrained, adapter))
        sources = match_images(fit, listed, labels, options.progress)
        optimized = optimize(loaded, sources, options, head.version + 1, unknown)
        self._store.replace(optimized, instead_of=fit)
        assert optimized.engine_choice is not None
        return optimized.engine_choice


def calibrate(fit: FittedClassifier, images: Any, labels: Any, groups: Any, skip_bad: bool) -> FittedClassifier:
    """The next version of a fit, as of Changing.calibrate_on."""
    head = fit.head
    listed = fit.listed(images)
    settings = replace(fit.settings, thumbnail=0)
    read = Labels.of(fit.read_labels(listed, labels), head.class_names)
    grouped = read_groups(groups, len(listed), listed, read.sessions)
    encoder = fit.clip.encoder_for(adapted=True)
    encoded = encode_images(encoder, listed, settings, read.ids, read.shown, skip_bad=skip_bad)
    if grouped is not None:
        grouped = np.delete(grouped, [error.position for error in encoded.errors])
    given, ids = encoded.examples.embeddings, encoded.examples.class_ids
    return replace(fit, head=head.calibrated_on(given, ids if read.sets is None else read.sets[ids], grouped))


def _find_classes(head: Head, given: str | Collection[str]) -> list[int]:
    """The uids of a class, by name or id; where pictures may have several labels, of a collection of them, rising."""
    if head.is_multi_label and isinstance(given, set | frozenset | list | tuple):
        return sorted({head.find_class(one) for one in given})
    return [head.find_class(given)]  # type: ignore[arg-type]  # which refuses others


def _check_left(head: Head, left: np.ndarray) -> None:
    """Raise IosrFastError where a class without text has no more label among those that are `left`."""
    if head.text is None and len(empty := np.setdiff1d(head.examples.class_ids, left)):
        name = head.name_of(class_id(empty[0]))
        raise IosrFastError(
            f"expected an image of {name!r} to stay: this classifier knows classes by their images alone; add "
            "others first, or take the class out (remove_class)"
        )


def _encode(fit: FittedClassifier, images: Any) -> Examples | None:
    """The images as examples without class and numbers yet; None for no images. An iterable without a length is taken
    once, image by image, and its parts of pictures make no groups."""
    lazy = isinstance(images, Iterable) and not isinstance(images, Sized)
    listed = images if lazy else fit.listed(images)
    examples = encode_images(fit.clip.encoder_for(adapted=True), iter(listed), fit.settings).examples
    groups = None if lazy else read_groups(None, len(listed), listed, [0] * len(listed))  # all are of one class
    return replace(examples, groups=groups) if len(examples) else None


def _split(encoded: Examples | None, head: Head) -> tuple[Examples | None, tuple[int, ...]]:
    """The images that are no support images yet, and the numbers of the others, where these may have several labels."""
    if encoded is None or not head.is_multi_label:
        return encoded, ()
    known = dict(_same_pictures(encoded.embeddings, head.examples.as_queries))
    new = np.setdiff1d(np.arange(len(encoded)), [*known])
    return encoded.rows(new) if len(new) else None, tuple({*head.examples.ids[[*known.values()]].tolist()})


def _numbered(encoded: Examples | None, head: Head, uids: list[int]) -> Examples | None:
    """New support images of these classes, numbered after those of the head. Raises IosrFastError for a picture that is
    a support image of others, or one of none: the same picture has the same embedding."""
    if encoded is None:
        return None
    examples = head.examples
    for new, other in _same_pictures(encoded.embeddings, examples.as_queries):
        if (owners := [class_id(uid) for uid in examples.uids_of(other)]) != [class_id(uid) for uid in uids]:
            named = " and ".join(f"{head.name_of(owner)!r} ({owner})" for owner in owners) or "no label"
            raise _second_label(new, f"{named} has as {example_id(examples.ids[other])!r}", head.is_multi_label)
    if head.unknown_images is not None:
        for new, _ in _same_pictures(encoded.embeddings, head.unknown_images):
            raise _second_label(new, f"is an unknown image, of {NONE_OF_THE_CLASSES}")
    return replace(encoded, ids=head.next_example + np.arange(len(encoded)))


def _second_label(image: int, other: str, relabel: bool = False) -> IosrFastError:
    fix = "leave it out, or take it out there first (remove_examples, or another fit)"
    if relabel:
        fix = "leave it out, or give that one all its labels (relabel)"
    return IosrFastError(f"expected one label for a picture, got image number {image}, which {other}: {fix}")


def _same_pictures(rows: Embeddings, others: Embeddings) -> Iterator[tuple[int, int]]:
    """The pairs (row, other) that are embeddings of the same picture."""
    for block in blocks(len(rows), _PRODUCTS // max(1, len(others))):
        for row, other in np.argwhere(rows.plain[block] @ others.plain.T >= 1.0 - _SAME).tolist():
            yield block.start + row, other


def _text(fit: FittedClassifier, name: str, text: np.ndarray | None, descriptions: Any) -> np.ndarray | None:
    """A class's text embedding (D,): `text`, checked, or that of its name and descriptions by the text encoder; None
    where classes have none."""
    if fit.head.text is None:
        if text is not None or descriptions is not None:
            raise IosrFastError(
                "expected no text and no descriptions, got some: this classifier knows classes by their images alone"
            )
        return None
    if text is not None:
        if descriptions is not None:
            raise IosrFastError("expected text, an embedding, or descriptions, got both")
        refuse_masked("text", text)
        row = np.ascontiguousarray(text, np.float32)
        width = fit.clip.encoder.width
        if row.shape != (width,):
            raise IosrFastError(f"expected a text embedding of shape {(width,)}, got {row.shape}")
        check_unit_rows("text", row[None])
        return row
    if fit.clip.text is None:
        raise IosrFastError(
            f"this classifier has no text encoder to embed {name!r} with: give text=, the embedding of the name"
        )
    templates = fit.settings.templates
    texts = check_descriptions(None if descriptions is None else {name: descriptions}, [name], templates)
    embedded: np.ndarray = fit.clip.text.embed_classes([name], templates, texts)[0]
    return embedded


def _check_name(head: Head, name: str, path: tuple[str, ...] = (), itself: int | None = None) -> None:
    """The name of a new class below the nodes of `path`, or another one of the class with the uid `itself`."""
    others = [other for uid, other in zip(head.uids, head.class_names, strict=True) if uid != itself]
    check_new_name(name, others)
    check_nodes([*(head.paths or ()), path], [*others, name])
