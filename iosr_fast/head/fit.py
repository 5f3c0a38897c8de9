"""Fit: a head and the encoder that belongs to it, how they are made, and their answers to images."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings, Encoder
from iosr_fast.encoders.opened_clip import OpenedClip
from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.head import multi_label, predictions
from iosr_fast.head.engine_choice import EngineChoice
from iosr_fast.head.head import Head
from iosr_fast.head.ids import example_id
from iosr_fast.head.labels import SEPARATOR, check_labels
from iosr_fast.head.method_config import MethodChoice
from iosr_fast.head.names import check_unknown_label
from iosr_fast.head.predictions import AnyHead
from iosr_fast.head.support_images import SupportViews, encode_images
from iosr_fast.images.preprocess import as_array, as_image_list, to_pixels
from iosr_fast.methods import METHODS
from iosr_fast.methods.conformal import check_share, sets_of_labels
from iosr_fast.methods.joint import JointPrediction
from iosr_fast.methods.support_audit import SupportAudit
from iosr_fast.methods.unknown import check_unknown_images, without_rejected
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

    Methods that take images have the arguments, the result and the errors of the Classifier's method of that name. What
    a head has no answer to (MultiLabelHead), or too few support images for, is refused before an image is encoded.
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

    def labels(self, classes: np.ndarray | None = None) -> np.ndarray:
        """The labels of the classes at these positions, or of all: names (str), or uids (int64)."""
        values, dtype = (self.head.uids, np.int64) if self.integer_labels else (self.head.class_names, np.str_)
        return np.array(values if classes is None else [values[c] for c in classes], dtype)

    def read_labels(self, images: Sequence[Any], labels: Any) -> np.ndarray:
        """The classes of labelled images, as the head reads labels."""
        return self.head.read_labels(images, labels, self.integer_labels)

    def chunks(self, images: Any) -> Iterator[np.ndarray]:
        """Pixels (B, S, S, 3) of the images in their order, a few hundred at a time."""
        # A batch array stays one: pixels of the right size reach the encoder without a copy.
        array = as_array(images)
        listed = array if array is not None and array.ndim == 4 else as_image_list(images)
        for start in range(0, len(listed), _CHUNK):
            try:
                yield to_pixels(listed[start : start + _CHUNK], self.clip.encoder.geometry, self.views.exif_orientation)
            except BadImageError as error:
                raise error.moved(start) from error.__cause__

    def embeddings(self, images: Any) -> Iterator[Embeddings]:
        """The embeddings of `chunks`."""
        return map(self.encoder.encode, self.chunks(images))

    def logits(self, images: Any) -> np.ndarray:
        """(B, C) float32."""
        parts = [self.head.score(self.encoder.encode_on_device(pixels)) for pixels in self.chunks(images)]
        return np.concatenate([np.zeros((0, len(self.head.uids)), np.float32), *parts])

    def predict_or_reject(self, images: Any, keep: float, unknown_label: str | None) -> np.ndarray:
        """The labels (B,) of images, `unknown_label` for pictures of none of the classes."""
        head = self.head.one_label("predict(unknown='reject')", "a picture of none of the classes gets no label")
        check_unknown_label(unknown_label, self.labels())
        head.unknown.threshold(keep)
        classes, rejected = [np.zeros(0, np.int64)], [np.zeros(0, bool)]
        for queries in self.embeddings(images):
            classes.append(head.score(queries).argmax(1))
            rejected.append(head.unknown.rejects(queries, keep))
        return without_rejected(self.labels(np.concatenate(classes)), np.concatenate(rejected), unknown_label)

    def predict_jointly(self, images: Any) -> JointPrediction:
        head = self.head.one_label("predict_jointly")
        queries = Embeddings.concatenate([*self.embeddings(images)] or [head.examples.embeddings[:0]])
        return predictions.predict_jointly(head, queries, self.labels())

    def explain(self, images: Any, top: int, nearest: int, keep: float | None) -> list[predictions.Prediction]:
        head = self.head.one_label("explain", "predict_proba gives the probability of each class")
        if keep is not None:
            head.unknown.threshold(keep)
        rows = (self.encoder.encode_on_device(pixels) for pixels in self.chunks(images))
        return [one for chunk in rows for one in predictions.predict(head, chunk, top, nearest, keep)]

    def unknown_score(self, images: Any) -> np.ndarray:
        unknown = self.head.one_label("unknown_score").unknown
        return np.concatenate([np.zeros(0), *map(unknown.score, self.embeddings(images))])

    def predict_sets(self, images: Any, coverage: float, per_class: bool) -> list[np.ndarray]:
        head = self.head.one_label("predict_sets")
        share, labels = check_share("coverage", coverage), self.labels()
        left_out, classes = head.left_out_labels, labels if per_class else None
        left_out.thresholds(share, classes)
        sets: list[np.ndarray] = []
        for logits in map(head.score, self.embeddings(images)):
            sets += sets_of_labels(labels, logits, left_out.sets(logits, share, classes))
        return sets

    def audit(self) -> SupportAudit:
        head = self.head.one_label("audit")
        return head.audit(np.array([example_id(number) for number in head.examples.ids], str), self.labels())


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
        examples, unknown_images, errors = encode_images(encoder, inputs.images, views, inputs.ids, shown, *others)
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
