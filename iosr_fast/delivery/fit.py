"""How a FittedClassifier is made of images and labels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from iosr_fast.delivery.engine_choice import OptimizeOptions
from iosr_fast.delivery.fitted import FittedClassifier
from iosr_fast.encoders.engine_folder import check_engine_choice
from iosr_fast.encoders.opened_model import OpenedModel
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.class_tree import paths_of
from iosr_fast.head.descriptions import check_descriptions
from iosr_fast.head.fit import check_multi_label, fit_head
from iosr_fast.head.labels import check_labels, read_groups
from iosr_fast.head.support_images import SupportSettings, encode_images
from iosr_fast.images.preprocess import as_image_list
from iosr_fast.methods.config import Config
from iosr_fast.methods.tune import asked_config, is_searched
from iosr_fast.methods.unknown import check_unknown_images
from iosr_fast.scoring.fields import RANGES
from iosr_fast.scoring.validation import check_number
from iosr_fast.utils.progress import progress as bar

log = logging.getLogger(__name__)


class FitData(NamedTuple):
    """The arguments of Classifier.fit, as they are given."""

    images: Any
    labels: Any
    class_names: Any
    unknown_images: Any
    groups: Any
    descriptions: Any
    tree: Any


def fit(parameters: Mapping[str, Any], open_clip: Callable[[Any], OpenedModel], data: FitData) -> FittedClassifier:
    """As Classifier.fit; `parameters` are its get_params(). What needs no encoder is checked before it is opened:
    parameters, labels, class names, descriptions, and that each class has an image if the method needs one."""
    images, labels, class_names, unknown_images, groups, descriptions, tree = data
    check_engine_choice(parameters["runtime"], parameters["precision"])
    asked = asked_config(**parameters)
    tuning, seconds = parameters["tune"], float(parameters["tune_seconds"])
    choose_engine = parameters["precision"] == "auto"
    names = ("templates", "exif_orientation", "margin")
    settings = SupportSettings(**{name: parameters[name] for name in names}, thumbnail=parameters["thumbnails"])
    listed = [] if images is None else as_image_list(images)
    known = check_labels(listed, labels, class_names)
    grouped = read_groups(groups, len(listed), listed, known.sessions)
    if known.sets is not None:
        check_multi_label(asked, unknown_images, tree)
        if choose_engine:
            log.warning("precision='auto' compares single labels: with several labels a picture it stays fp32")
            choose_engine = False
    paths = None if tree is None else paths_of(tree, known.names, known.numbers or ())
    texts = check_descriptions(descriptions, known.names, settings.templates)
    unknown = [] if unknown_images is None else as_image_list(unknown_images)
    check_unknown_images(len(unknown))
    _refuse(asked.reason_against(known.counts(known.ids), names=known.names))
    if str(parameters["pretrained"]) == "none":
        log.warning("pretrained='none': the weights are random, to measure speed, and the answers mean nothing")
    names_to_read = None if class_names is None and known.numbers is not None else known.names
    clip = open_clip((names_to_read, settings.templates, texts))
    _check_model(asked, known.counts(known.ids), clip, settings.templates, texts)
    shown, skip_bad = bool(parameters["progress"]), bool(parameters["skip_bad"])
    scored = is_searched(asked, tuning) or known.sets is not None
    text = None if clip.text is None else clip.text.embed_classes(known.names, settings.templates, texts)

    def fit_on(clip: OpenedModel) -> FittedClassifier:
        with bar("encode", len(listed) + len(unknown), shown=shown) as step:
            given = listed, settings, known.ids, known.shown, unknown, skip_bad, step
            encoder, memory = clip.encoder_for(adapted=True), parameters["memory"]
            examples, unknown_rows, errors = encode_images(encoder, *given, memory=memory)
        if grouped is not None:
            unread = [error.position for error in errors if error.position < len(listed)]
            examples = replace(examples, groups=np.delete(grouped, unread))
        if errors:
            _refuse(asked.reason_against(known.counts(examples.class_ids), names=known.names))
        with bar("tune", None, shown=shown and scored and bool(len(examples))):
            others = known.sets, unknown_rows, paths, known.numbers
            head = fit_head(asked, tuning, seconds, known.names, text, clip.tau, examples, *others)
        return FittedClassifier(clip, head, settings, tuple(errors), known.numbers is not None, memory=memory)

    fitted = fit_on(clip)
    skipped = {error.position for error in fitted.skipped}
    readable = [image for i, image in enumerate([*listed, *unknown]) if i not in skipped]  # the support images first
    ids = fitted.head.examples.ids.tolist()
    support = [readable[number] for number in ids]
    if choose_engine:
        from iosr_fast.delivery.optimize import optimize

        engines = OptimizeOptions(runtime=parameters["runtime"], progress=shown)
        return optimize(fitted, support, engines, fitted.head.version, readable[len(ids) :])
    by_default = parameters["precision"] is None and parameters["engine"] is None and clip.loaded is not None
    half = by_default and clip.encoder.source is not None and clip.encoder.source.manifest["precision"] != "fp32"
    if half and support and known.sets is None:  # sets have no single label to compare
        from iosr_fast.delivery.engine_judge import reason_for_fp32
        from iosr_fast.export.pretrained import in_fp32

        exact = in_fp32(clip, shown)
        if reason := reason_for_fp32(fitted, support, exact.encoder_for(fitted.head.needs_adapted)):
            log.warning("half precision is not taken: %s; the images are encoded again in fp32", reason)
            return fit_on(exact)
    return fitted


def _refuse(reason: str | None) -> None:
    """Raise IosrFastError where there is a reason."""
    if reason is not None:
        raise IosrFastError(reason)


def _check_model(asked: Config, counts: np.ndarray, clip: OpenedModel, templates: Any, descriptions: Any) -> None:
    """Raise IosrFastError for a method that the model can't serve, with classes of `counts` (C,) images, and for texts
    of a model that reads none."""
    check_number("tau, the CLIP's logit scale,", clip.tau, *RANGES["tau"])
    _refuse(asked.reason_against(counts, clip.reads_text, clip.has_adapter))
    if not clip.reads_text and (templates is not None or descriptions):
        raise IosrFastError(
            "expected no templates and no descriptions: this model has no text encoder, so classes are known by their "
            "images alone; a CLIP reads texts (`iosr-fast models`)"
        )
    if clip.reads_text and clip.text is None:
        raise IosrFastError(
            "this classifier was loaded and has no text encoder to fit with: a Classifier with the model and the "
            "pretrained weights of its CLIP has one"
        )
