"""A fit: class names and support images become the first Head of a classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Encoder
from iosr_fast.encoders.opened_clip import OpenedClip
from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.head.engine_choice import EngineChoice
from iosr_fast.head.examples import Examples
from iosr_fast.head.head import Head
from iosr_fast.head.labels import SEPARATOR, check_labels, class_ids
from iosr_fast.head.method_config import MethodConfig, choose_config, is_searched
from iosr_fast.head.multi_label import MultiLabels
from iosr_fast.head.support_images import SupportViews, encode_with_unknown
from iosr_fast.images.preprocess import as_image_list
from iosr_fast.methods import METHODS
from iosr_fast.methods.multi_label import fit_multi_label, multi_label_reason
from iosr_fast.methods.multi_label_set import MultiLabelSet
from iosr_fast.methods.tuning.tune import MAX_TUNE_SECONDS, check_choice
from iosr_fast.methods.unknown import check_unknown_images
from iosr_fast.scoring.fields import RANGES
from iosr_fast.scoring.precision import Precision, check_precision
from iosr_fast.scoring.validation import check_number
from iosr_fast.utils.progress import progress as bar
from iosr_fast.utils.text import abbreviate


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted classifier: `head` and what it was computed with. `skipped` has the errors of unreadable images that
    were left out, `engine_choice` the candidates for the engine, where it was chosen. With `integer_labels`, the label
    of a class is its uid: its position in the class names of the fit, which no later change moves."""

    clip: OpenedClip
    head: Head
    views: SupportViews
    skipped: tuple[BadImageError, ...] = ()
    integer_labels: bool = False
    engine_choice: EngineChoice | None = None

    @property
    def encoder(self) -> Encoder:
        """The encoder of queries: it gives the embeddings that the method compares, and no others where it can."""
        return self.clip.encoder_for(self.head.needs_adapted)

    def labels(self, classes: np.ndarray | None = None) -> np.ndarray:
        """The labels of the classes at these positions, or of all: names (str), or uids (int64)."""
        values, dtype = (self.head.uids, np.int64) if self.integer_labels else (self.head.class_names, np.str_)
        return np.array(values if classes is None else [values[c] for c in classes], dtype)

    def class_ids(self, images: Sequence[Any], labels: Any) -> np.ndarray:
        """Each image's class by its position (labels.class_ids)."""
        head = self.head
        return class_ids(images, labels, head.class_names, head.uids if self.integer_labels else None)


@dataclass(frozen=True, eq=False)
class FitInputs:
    """What `fit` takes, checked: parameters of Classifier, the images (N), their class ids (N,) into `names` (C), and
    pictures of none of these. Where pictures may have several labels, `label_sets` (P, C) bool are those that occur,
    and `ids` say which one a picture has; otherwise None."""

    images: Sequence[Any]
    ids: np.ndarray
    names: list[str]
    unknown_images: Sequence[Any]
    integer_labels: bool
    method: str
    reducer: str | None
    tune: str | None
    tune_seconds: float
    parameters: dict[str, float]
    views: SupportViews
    key_precision: Precision
    skip_bad: bool
    progress: bool
    label_sets: np.ndarray | None = None


def check_fit(
    parameters: Mapping[str, Any], images: Any, labels: Any, class_names: Any, unknown_images: Any = None
) -> FitInputs:
    """Check everything that a fit can check without an encoder. `parameters` are Classifier.get_params().

    Raises ValueError as Classifier.fit does.
    """
    method, reducer, tune = (parameters[name] for name in ("method", "reducer", "tune"))
    key_precision = check_precision(parameters["key_precision"])
    of_images = {name: parameters[name] for name in ("views", "mirror", "templates", "seed", "exif_orientation")}
    views = SupportViews(**of_images, thumbnail=parameters["thumbnails"])
    values = {name: parameters[name] for name in ("alpha", "beta", "gamma", "ridge")}
    chosen = check_choice(method, reducer, tune, **values)
    seconds = check_number("tune_seconds", parameters["tune_seconds"], 0.0, MAX_TUNE_SECONDS)
    listed = [] if images is None else as_image_list(images)
    names, ids, label_sets, integers = check_labels(listed, labels, class_names)
    if label_sets is None:
        _check_classes(method, ids, names)
    else:
        if (reason := multi_label_reason(method, reducer)) is not None:
            raise IosrFastError(reason)
        if unknown_images is not None:
            raise IosrFastError("several labels a picture take no unknown_images: give them as pictures of no label")
        _check_counts(method, label_sets[ids].sum(0), names)
    unknown = [] if unknown_images is None else as_image_list(unknown_images)
    check_unknown_images(len(unknown))
    skip_bad, progress = bool(parameters["skip_bad"]), bool(parameters["progress"])
    return FitInputs(
        images=listed,
        ids=ids,
        names=names,
        unknown_images=unknown,
        integer_labels=integers,
        method=method,
        reducer=reducer,
        tune=tune,
        tune_seconds=seconds,
        parameters=chosen,
        views=views,
        key_precision=key_precision,
        skip_bad=skip_bad,
        progress=progress,
        label_sets=label_sets,
    )


def fit(clip: OpenedClip, inputs: FitInputs) -> Fit:
    """Encode images and class names and compile the method.

    Raises ValueError for a method that the encoder can't serve, and as `encode_images` does.
    """
    method, parameters, names = inputs.method, inputs.parameters, inputs.names
    tau = check_number("tau, the CLIP's logit scale,", clip.tau, *RANGES["tau"])
    if method != "auto" and METHODS[method].needs_adapter and not clip.has_adapter:
        raise IosrFastError(f"{method} needs an encoder with an adapter; this one has none: use {method[:-2]!r}")
    if clip.text is None:
        raise IosrFastError(
            "this classifier was loaded and has no text encoder to fit with: a Classifier with the model and the "
            "pretrained weights of its CLIP has one"
        )
    searched = is_searched(method, inputs.tune, parameters)
    # Later queries are single views, so that is what leave-one-out has to score.
    label_sets = inputs.label_sets
    views = replace(inputs.views, single=(searched or label_sets is not None) and inputs.views.views > 1)
    embedded = clip.text.embed_classes(names, views.templates)
    encoder = clip.encoder_for(adapted=True)
    spoken = names if label_sets is None else [SEPARATOR.join(np.array(names)[row]) for row in label_sets]
    with bar("encode", len(inputs.images) + len(inputs.unknown_images), shown=inputs.progress) as step:
        examples, unknown_images, errors = encode_with_unknown(
            encoder, inputs.images, inputs.ids, inputs.unknown_images, views, inputs.skip_bad, spoken, step
        )
    if label_sets is not None:
        head = _multi_label_head(clip, inputs, embedded, tau, examples, searched)
        return Fit(
            clip, head, replace(views, single=examples.queries is not None), tuple(errors), inputs.integer_labels
        )
    if errors:
        _check_classes(method, examples.class_ids, names)
    examples = examples.rows(np.argsort(examples.class_ids, kind="stable"))
    support = examples.as_support(range(len(names)), embedded, tau)
    with bar("tune", None, shown=inputs.progress and searched and bool(len(examples))):
        config = choose_config(
            method,
            support,
            reducer=inputs.reducer,
            tune=inputs.tune,
            parameters=parameters,
            key_precision=inputs.key_precision,
            seconds=inputs.tune_seconds,
        )
    head = Head.first(names, embedded, tau, examples, config, unknown_images=unknown_images)
    views = replace(views, single=examples.queries is not None)
    return Fit(clip, head, views, tuple(errors), inputs.integer_labels)


def _multi_label_head(
    clip: OpenedClip, inputs: FitInputs, text: np.ndarray, tau: float, examples: Examples, searched: bool
) -> Head:
    """The head of pictures with several labels; the class ids of `examples` say which of the label sets each has."""
    assert inputs.label_sets is not None
    labels = inputs.label_sets[examples.class_ids]
    _check_counts(inputs.method, labels.sum(0), inputs.names)
    images = MultiLabelSet(examples.embeddings, labels, text, tau, examples.queries)
    with bar("tune", None, shown=inputs.progress):
        fitted = fit_multi_label(
            images, inputs.method, inputs.parameters, searched, inputs.key_precision, inputs.tune_seconds
        )
    config = MethodConfig(fitted.method, fitted.parameters, factor=fitted.factor, key_precision=inputs.key_precision)
    examples = replace(examples, class_ids=np.zeros(len(examples), np.int64))
    known = MultiLabels(labels, fitted.thresholds)
    return Head.first(inputs.names, text, tau, examples, config, fitted.plan, multi_label=known)


def _check_classes(method: str, ids: np.ndarray, names: Sequence[str]) -> None:
    _check_counts(method, np.bincount(ids, minlength=len(names)), names)


def _check_counts(method: str, counts: np.ndarray, names: Sequence[str]) -> None:
    """Raise ValueError where a class has no image and the method needs one."""
    if method == "auto" or METHODS[method].needs_support:
        empty = [name for name, count in zip(names, counts, strict=True) if not count]
        if empty:
            raise IosrFastError(f"{method} needs at least one image of each class, got none of {abbreviate(empty)}")
