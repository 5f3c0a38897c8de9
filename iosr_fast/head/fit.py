"""A fit: class names and support images become the first Head of a classifier."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from iosr_fast.encoders.opened_clip import OpenedClip
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head import multi_label
from iosr_fast.head.fitted import Fit
from iosr_fast.head.head import Head
from iosr_fast.head.labels import SEPARATOR, check_labels
from iosr_fast.head.method_config import MethodChoice
from iosr_fast.head.multi_label_predictions import AnyHead
from iosr_fast.head.support_images import SupportViews, encode_images
from iosr_fast.images.preprocess import as_image_list
from iosr_fast.methods import METHODS
from iosr_fast.methods.unknown import check_unknown_images
from iosr_fast.scoring.fields import RANGES
from iosr_fast.scoring.validation import check_number
from iosr_fast.utils.progress import progress as bar
from iosr_fast.utils.text import abbreviate

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FitInputs:
    """What `fit` takes, checked: the images (N), their class ids (N,) into `names` (C), pictures of none of these, and
    how to encode and fit them. Where pictures may have several labels, `label_sets` (P, C) bool are those that occur,
    and `ids` say which one a picture has; otherwise None. `choose_engine` asks for the fastest engine."""

    images: Sequence[Any]
    ids: np.ndarray
    names: list[str]
    unknown_images: Sequence[Any]
    integer_labels: bool
    choice: MethodChoice
    views: SupportViews
    skip_bad: bool
    progress: bool
    choose_engine: bool
    label_sets: np.ndarray | None = None

    def check_counts(self, ids: np.ndarray) -> None:
        """Raise IosrFastError where a class has none of the images with these `ids` and the method needs one."""
        method = self.choice.method
        if method != "auto" and not METHODS[method].needs_support:
            return
        sets = self.label_sets
        counts = np.bincount(ids, minlength=len(self.names)) if sets is None else sets[ids].sum(0)
        if empty := [name for name, count in zip(self.names, counts, strict=True) if not count]:
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
    names, ids, label_sets, integers = check_labels(listed, labels, class_names)
    if label_sets is not None:
        multi_label.check_several(choice, unknown_images)
        if choose_engine:
            log.warning("precision='auto' compares single labels: with several labels a picture it stays fp32")
    unknown = [] if unknown_images is None else as_image_list(unknown_images)
    check_unknown_images(len(unknown))
    skip_bad, progress = bool(parameters["skip_bad"]), bool(parameters["progress"])
    options = choice, views, skip_bad, progress, choose_engine and label_sets is None
    inputs = FitInputs(listed, ids, names, unknown, integers, *options, label_sets)
    inputs.check_counts(ids)
    return inputs


def fit(clip: OpenedClip, inputs: FitInputs) -> Fit:
    """Encode images and class names and compile the method.

    Raises ValueError for a method that the encoder can't serve, and as `encode_images` does.
    """
    choice, names, label_sets = inputs.choice, inputs.names, inputs.label_sets
    method = choice.method
    tau = check_number("tau, the CLIP's logit scale,", clip.tau, *RANGES["tau"])
    if method != "auto" and METHODS[method].needs_adapter and not clip.has_adapter:
        raise IosrFastError(f"{method} needs an encoder with an adapter; this one has none: use {method[:-2]!r}")
    if clip.text is None:
        raise IosrFastError(
            "this classifier was loaded and has no text encoder to fit with: a Classifier with the model and the "
            "pretrained weights of its CLIP has one"
        )
    # Later queries are single views, so that is what leave-one-out has to score.
    scored = choice.searched or label_sets is not None
    views = replace(inputs.views, single=scored and inputs.views.views > 1)
    text = clip.text.embed_classes(names, views.templates)
    encoder = clip.encoder_for(adapted=True)
    shown = names if label_sets is None else [SEPARATOR.join(np.array(names)[row]) for row in label_sets]
    with bar("encode", len(inputs.images) + len(inputs.unknown_images), shown=inputs.progress) as step:
        others = inputs.unknown_images, inputs.skip_bad, step
        examples, unknown_images, errors = encode_images(encoder, inputs.images, inputs.ids, views, shown, *others)
    if errors:
        inputs.check_counts(examples.class_ids)
    head: AnyHead
    with bar("tune", None, shown=inputs.progress and scored and bool(len(examples))):
        if label_sets is None:
            examples = examples.sorted_by_class()
            config = choice.config(examples.as_support(range(len(names)), text, tau))
            head = Head.first(names, text, tau, examples, config, unknown_images=unknown_images)
        else:
            head, _ = multi_label.fit_head(names, text, tau, examples, label_sets[examples.class_ids], choice)
    views = replace(views, single=examples.queries is not None)
    return Fit(clip, head.compiled(), views, tuple(errors), inputs.integer_labels)
