"""Fit: a head and the encoder that belongs to it, how they are made, and their answers to images."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings, Encoder
from iosr_fast.encoders.opened_clip import OpenedClip
from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.head import multi_label
from iosr_fast.head.answers import Answers
from iosr_fast.head.engine_choice import EngineChoice
from iosr_fast.head.examples import Examples
from iosr_fast.head.head import Head
from iosr_fast.head.labels import Labels, check_labels
from iosr_fast.head.method_config import MethodChoice
from iosr_fast.head.predictions import AnyHead
from iosr_fast.head.support_images import SupportViews, encode_images
from iosr_fast.images.preprocess import as_array, as_image_list, to_pixels
from iosr_fast.methods import METHODS
from iosr_fast.methods.tune import AUTO
from iosr_fast.methods.unknown import check_unknown_images
from iosr_fast.scoring.fields import RANGES
from iosr_fast.scoring.validation import check_number
from iosr_fast.utils.progress import progress as bar
from iosr_fast.utils.text import abbreviate

_CHUNK = 256  # images whose pixels are in memory
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted classifier: `head` and what it was computed with. Immutable.

    `skipped` has the errors of unreadable images that were left out, `engine_choice` the candidates for the engine,
    where it was chosen. With `integer_labels`, the label of a class is its uid: its position in the class names of the
    fit, which no later change moves.
    """

    clip: OpenedClip
    head: AnyHead
    views: SupportViews
    skipped: tuple[BadImageError, ...] = ()
    integer_labels: bool = False
    engine_choice: EngineChoice | None = None

    @property
    def encoder(self) -> Encoder:
        """The encoder of queries: it gives the embeddings that the method compares, and no others where it can."""
        return self.clip.encoder_for(self.head.needs_adapted)

    @cached_property
    def answers(self) -> Answers:
        """The answers of the head; the labels of its classes are their names, or their uids (int64)."""
        head = self.head
        return Answers(head, np.array(head.uids, np.int64) if self.integer_labels else np.array(head.class_names, str))

    def read_labels(self, images: Sequence[Any], labels: Any) -> np.ndarray:
        """The classes of labelled images, as the head reads labels."""
        return self.head.read_labels(images, labels, self.integer_labels)

    def queries(self, images: Any) -> Iterator[Embeddings]:
        """The embeddings of images in their order, a few hundred at a time, each encoded when it is taken."""
        return map(self.encoder.encode_on_device, self.chunks(images))

    def chunks(self, images: Any) -> Iterator[np.ndarray]:
        """Pixels (B, S, S, 3) of images in their order, a few hundred at a time."""
        # A batch array stays one: pixels of the right size reach the encoder without a copy.
        array = as_array(images)
        listed = array if array is not None and array.ndim == 4 else as_image_list(images)
        for start in range(0, len(listed), _CHUNK):
            try:
                yield to_pixels(listed[start : start + _CHUNK], self.clip.encoder.geometry, self.views.exif_orientation)
            except BadImageError as error:
                raise error.moved(start) from error.__cause__


@dataclass(frozen=True, eq=False)
class FitInputs:
    """What `fit` takes, checked: the images (N), their labels, pictures of none of the classes, and how to encode and
    fit them. `choose_engine` asks for the fastest engine."""

    images: Sequence[Any]
    labels: Labels
    unknown_images: Sequence[Any]
    choice: MethodChoice
    views: SupportViews
    skip_bad: bool
    progress: bool
    choose_engine: bool

    def check_counts(self, ids: np.ndarray) -> None:
        """Raise IosrFastError where a class has none of the images with these `ids` and the method needs one."""
        method, counts = self.choice.method, self.labels.counts(ids)
        needed = method == AUTO or METHODS[method].needs_support
        if needed and (empty := [self.labels.names[c] for c in np.flatnonzero(counts == 0)]):
            raise IosrFastError(f"{method} needs at least one image of each class, got none of {abbreviate(empty)}")


def check_fit(
    parameters: Mapping[str, Any], images: Any, labels: Any, class_names: Any, unknown_images: Any = None
) -> FitInputs:
    """Check everything that a fit can check without an encoder. `parameters` are Classifier.get_params().

    Raises IosrFastError for a parameter out of range, parameters given where they are to be chosen, fewer than two
    classes, class names that are none or look alike, missing labels or labels without a name, and classes without an
    image that need one.
    """
    choice, choose_engine = MethodChoice.of(parameters), parameters["precision"] == "auto"
    of_images = {name: parameters[name] for name in ("views", "mirror", "templates", "seed", "exif_orientation")}
    views = SupportViews(**of_images, thumbnail=parameters["thumbnails"])
    listed = [] if images is None else as_image_list(images)
    checked = check_labels(listed, labels, class_names)
    if checked.sets is not None:
        choice.check_several(unknown_images)
        if choose_engine:
            log.warning("precision='auto' compares single labels: with several labels a picture it stays fp32")
            choose_engine = False
    unknown = [] if unknown_images is None else as_image_list(unknown_images)
    check_unknown_images(len(unknown))
    options = bool(parameters["skip_bad"]), bool(parameters["progress"]), choose_engine
    inputs = FitInputs(listed, checked, unknown, choice, views, *options)
    inputs.check_counts(checked.ids)
    return inputs


def fit(clip: OpenedClip, inputs: FitInputs) -> Fit:
    """Encode images and class names and compile the method.

    Raises ValueError for a method that the encoder can't serve, and as `encode_images` does.
    """
    choice, labels, method = inputs.choice, inputs.labels, inputs.choice.method
    tau = check_number("tau, the CLIP's logit scale,", clip.tau, *RANGES["tau"])
    if method != AUTO and METHODS[method].needs_adapter and not clip.has_adapter:
        raise IosrFastError(f"{method} needs an encoder with an adapter; this one has none: use {method[:-2]!r}")
    if clip.text is None:
        raise IosrFastError(
            "this classifier was loaded and has no text encoder to fit with: a Classifier with the model and the "
            "pretrained weights of its CLIP has one"
        )
    # Later queries are single views, so that is what leave-one-out has to score.
    scored = choice.searched or labels.sets is not None
    views = replace(inputs.views, single=scored and inputs.views.views > 1)
    text = clip.text.embed_classes(labels.names, views.templates)
    encoder = clip.encoder_for(adapted=True)
    with bar("encode", len(inputs.images) + len(inputs.unknown_images), shown=inputs.progress) as step:
        given = inputs.images, views, labels.ids, labels.shown, inputs.unknown_images, inputs.skip_bad, step
        examples, unknown_images, errors = encode_images(encoder, *given)
    if errors:
        inputs.check_counts(examples.class_ids)
    with bar("tune", None, shown=inputs.progress and scored and bool(len(examples))):
        head = fit_head(choice, labels.names, text, tau, examples, labels.sets, unknown_images).compiled()
    views = replace(views, single=examples.queries is not None)
    return Fit(clip, head, views, tuple(errors), labels.are_integers)


def fit_head(
    choice: MethodChoice,
    names: Sequence[str],
    text: np.ndarray | None,
    tau: float,
    examples: Examples,
    label_sets: np.ndarray | None,
    unknown_images: Embeddings | None,
) -> AnyHead:
    """The head of support images whose class ids are positions in `names` (C), or where `label_sets` (P, C) bool are
    given, positions in these. Raises what MethodChoice.config and methods.multi_label.fit_multi_label raise."""
    if label_sets is not None:
        return multi_label.fit_head(choice, names, text, tau, examples, label_sets[examples.class_ids])
    examples = examples.sorted_by_class()
    config = choice.config(examples.as_support(range(len(names)), text, tau))
    return Head.first(names, text, tau, examples, config, unknown_images=unknown_images)
