"""Changes as callers ask for them: names and ids are checked, images encoded and texts embedded, then a Change is made.

Encoding needs no lock, so that other calls go on; a Change is made under the lock of writers (store.Store).
Arguments, results and errors are those of the Classifier's methods of the same names.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.descriptions import check_descriptions
from iosr_fast.head.engine_choice import EngineChoice, OptimizeOptions
from iosr_fast.head.examples import Examples
from iosr_fast.head.fitted import Fit
from iosr_fast.head.head import Head, HeadData
from iosr_fast.head.ids import class_id
from iosr_fast.head.labels import read_groups
from iosr_fast.head.names import check_new_name
from iosr_fast.head.support_images import encode_images
from iosr_fast.images.preprocess import as_image_list
from iosr_fast.methods import METHODS
from iosr_fast.methods.config import Config
from iosr_fast.methods.tune import check_options
from iosr_fast.methods.tune import tune as search
from iosr_fast.scoring.validation import check_unit_rows
from iosr_fast.store.changes import Change, ChangeResult
from iosr_fast.store.store import Store
from iosr_fast.utils.numbers import refuse_masked

log = logging.getLogger(__name__)


def add_class(store: Store, name: str, images: Any, text: np.ndarray | None, descriptions: Any) -> ChangeResult:
    fit = store.changeable("add_class")
    _check_name(fit.head, name)
    row, encoded, method = _text(fit, name, text, descriptions), _encode(fit, images), fit.head.config.method
    if encoded is None and METHODS[method].needs_support:
        raise IosrFastError(f"expected at least one image of {name!r}, got none: {method} compares images")
    return store.change(fit, lambda head: Change("add_class", head.next_class, name, row, _numbered(encoded, head)))


def add_examples(store: Store, name_or_id: str, images: Any) -> ChangeResult:
    fit = store.changeable("add_examples")
    fit.head.find_class(name_or_id)
    encoded = _encode(fit, images)
    if encoded is None:
        raise IosrFastError(f"expected at least one image to add to {name_or_id!r}, got none")

    def make(head: Head) -> Change:
        uid = head.find_class(name_or_id)
        return Change("add_examples", uid, added=_numbered(encoded, head, uid))

    return store.change(fit, make)


def remove_examples(store: Store, example_ids: Sequence[str]) -> ChangeResult:
    listed = [example_ids] if isinstance(example_ids, str) else list(example_ids)
    fit = store.changeable("remove_examples")
    return store.change(fit, lambda head: Change("remove_examples", numbers=tuple(head.find_examples(listed))))


def remove_class(store: Store, name_or_id: str) -> ChangeResult:
    fit = store.changeable("remove_class")
    return store.change(fit, lambda head: Change("remove_class", head.find_class(name_or_id)))


def rename_class(
    store: Store, name_or_id: str, name: str, text: np.ndarray | None, keep_text: bool, descriptions: Any
) -> ChangeResult:
    fit = store.changeable("rename_class")
    uid = fit.head.find_class(name_or_id)
    _check_name(fit.head, name, uid)
    if keep_text and (text is not None or descriptions is not None):
        raise IosrFastError("expected keep_text, or text or descriptions for another one, got both")
    row = None if keep_text else _text(fit, name, text, descriptions)
    return store.change(fit, lambda head: Change("rename_class", head.find_class(class_id(uid)), name, row))


def tune(
    store: Store, images: Any, labels: Any, method: str | None, reducer: str | None, seconds: float
) -> tuple[Config, ChangeResult]:
    fit = store.changeable("tune")
    check_options(method or fit.head.config.method, reducer, None)
    if (images is None) != (labels is None):
        raise IosrFastError("expected validation images and their labels together, got one without the other")
    queries, truth = None, None
    if images is not None:
        listed = as_image_list(images)
        if not listed:
            raise IosrFastError("expected at least one validation image, got none")
        truth, encoder = fit.read_labels(listed, labels), fit.clip.encoder_for(adapted=True)
        queries = Embeddings.concatenate([encoder.encode(pixels) for pixels in fit.chunks(listed)])
    chosen: list[Config] = []

    def make(head: Head) -> Change:
        if queries is not None and head.uids != fit.head.uids:
            raise IosrFastError("the classes have changed while validation images were encoded: tune again")
        if queries is None and not len(head.examples):
            raise IosrFastError("expected support images or validation images to choose parameters by, got none")
        config, name = head.config, method or head.config.method
        own = config.reducer if name == config.method else "none"
        best = search(name, head.support, queries, truth, reducer or own, seconds).config
        if (best.which == "adapted") != head.needs_adapted:
            log.info("%s compares %s embeddings; queries are encoded for it from now on", best.method, best.which)
            fit.clip.encoder_for(best.which == "adapted")  # opened now, so that no reader waits for it
        evidence = best.evidence and structs.replace(best.evidence, version=head.version + 1)
        kept = {"key_precision": config.key_precision, "look_alikes": config.look_alikes}
        chosen.append(structs.replace(best, evidence=evidence, **kept))
        return Change("retune", config=chosen[0])

    result = store.change(fit, make)
    return chosen[0], result


def calibrate_on(store: Store, images: Any, labels: Any, groups: Any, skip_bad: bool) -> ChangeResult:
    fit = store.fitted()
    head = fit.head.require_single_label("calibrate_on")
    store.check_no_log()
    listed, views = as_image_list(images), replace(fit.settings, views=1, single=False, thumbnail=0)
    sources = listed, views, fit.read_labels(listed, labels), head.class_names
    grouped = read_groups(groups, len(listed))
    found = encode_images(fit.clip.encoder_for(adapted=True), *sources, skip_bad=skip_bad)
    grouped = None if grouped is None else np.delete(grouped, [error.position for error in found.errors])
    made = head.calibrated_on(found.examples.embeddings, found.examples.class_ids, grouped)
    store.replace(replace(fit, head=made), instead_of=fit)
    return ChangeResult(made.version)


def optimize(
    store: Store,
    images: Any,
    labels: Any,
    options: OptimizeOptions,
    pretrained: str | Path | None,
    adapter: str | Path | None,
    unknown_images: Any,
) -> EngineChoice:
    fit = store.fitted()
    head = fit.head.require_single_label("optimize", "it compares single labels; build the engine that you want")
    from iosr_fast.head.optimize import match_images, optimize

    store.check_no_log()
    listed, unknown = as_image_list(images), [] if unknown_images is None else as_image_list(unknown_images)
    if head.unknown_images is not None and not unknown:
        raise IosrFastError(
            f"this classifier was fitted with {len(head.unknown_images)} unknown images: expected unknown_images, so "
            "that the engine that is chosen can encode them, got none"
        )
    if head.calibration_images is not None:
        raise IosrFastError("this classifier has images of calibrate_on: fit again, optimize, and then calibrate_on")
    loaded = fit
    if pretrained is not None:
        from iosr_fast.export.pretrained import with_loaded

        loaded = replace(fit, clip=with_loaded(fit.clip, pretrained, adapter))
    sources = match_images(fit, listed, labels, options.progress)
    optimized = optimize(loaded, sources, options, head.version + 1, unknown)
    store.replace(optimized, instead_of=fit)
    assert optimized.engine_choice is not None
    return optimized.engine_choice


def _encode(fit: Fit, images: Any) -> Examples | None:
    """The images as examples without class and numbers yet; None for no images. An iterable without a length is taken
    once, image by image."""
    lazy = isinstance(images, Iterable) and not isinstance(images, Sized)
    one_by_one = iter(images if lazy else as_image_list(images))
    examples = encode_images(fit.clip.encoder_for(adapted=True), one_by_one, fit.settings).examples
    return examples if len(examples) else None


def _numbered(encoded: Examples | None, head: Head, uid: int | None = None) -> Examples | None:
    """New support images of a class, or of the next one, numbered after those of the head."""
    if encoded is None:
        return None
    classes = np.full(len(encoded), head.next_class if uid is None else uid, np.int64)
    return replace(encoded, class_ids=classes, ids=head.next_example + np.arange(len(encoded)))


def _text(fit: Fit, name: str, given: np.ndarray | None, descriptions: Any) -> np.ndarray:
    """A class's text embedding (D,): the given one, checked, or that of its texts by the text encoder."""
    if given is not None:
        if descriptions is not None:
            raise IosrFastError("expected text, an embedding, or descriptions, got both")
        refuse_masked("text", given)
        row, width = np.ascontiguousarray(given, np.float32), fit.clip.encoder.width
        if row.shape != (width,):
            raise IosrFastError(f"expected a text embedding of shape {(width,)}, got {row.shape}")
        check_unit_rows("text", row[None])
    elif fit.clip.text is None:
        raise IosrFastError(
            f"this classifier has no text encoder to embed {name!r} with: give text=, the embedding of the name"
        )
    else:
        templates = fit.settings.templates
        texts = check_descriptions(None if descriptions is None else {name: descriptions}, [name], templates)
        row = fit.clip.text.embed_classes([name], templates, texts)[0]
    return row


def _check_name(head: HeadData, name: str, itself: int | None = None) -> None:
    check_new_name(name, [other for uid, other in zip(head.uids, head.class_names, strict=True) if uid != itself])
