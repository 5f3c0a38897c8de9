"""How a Fit is made of images and labels, and a head of embeddings and labels."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.encoders.engine_folder import check_engine_choice
from iosr_fast.encoders.opened_model import OpenedModel
from iosr_fast.exceptions import IosrFastError, LookAlikesWarning
from iosr_fast.head.class_tree import paths_of
from iosr_fast.head.descriptions import check_descriptions
from iosr_fast.head.engine_choice import OptimizeOptions
from iosr_fast.head.examples import Examples
from iosr_fast.head.fitted import Fit
from iosr_fast.head.head import Head
from iosr_fast.head.labels import Labels, check_labels, read_groups
from iosr_fast.head.multi_label import MultiLabelHead
from iosr_fast.head.predictions import AnyHead
from iosr_fast.head.support_images import SupportSettings, encode_images
from iosr_fast.images.preprocess import as_image_list
from iosr_fast.methods import METHODS, reason_against
from iosr_fast.methods.multi_label import fit_multi_label, multi_label_reason
from iosr_fast.methods.multi_label_set import MultiLabelSet
from iosr_fast.methods.tree import Path
from iosr_fast.methods.tune import AUTO, Options
from iosr_fast.methods.unknown import check_unknown_images
from iosr_fast.scoring.fields import RANGES
from iosr_fast.scoring.validation import check_number
from iosr_fast.utils.progress import progress as bar
from iosr_fast.utils.text import abbreviate

log = logging.getLogger(__name__)


def fit(
    parameters: Mapping[str, Any],
    open_clip: Callable[[Any], OpenedModel],
    images: Any,
    labels: Any,
    class_names: Any,
    unknown_images: Any,
    groups: Any,
    descriptions: Any,
    tree: Any = None,
) -> Fit:
    """As Classifier.fit; `parameters` are its get_params(). What needs no encoder is checked before it is opened:
    parameters, labels, class names, descriptions, and that each class has an image if the method needs one."""
    check_engine_choice(parameters["runtime"], parameters["precision"])
    options = Options.of(parameters)
    choose_engine = parameters["precision"] == "auto"
    names = ("views", "mirror", "templates", "seed", "exif_orientation", "margin")
    settings = SupportSettings(**{name: parameters[name] for name in names}, thumbnail=parameters["thumbnails"])
    listed = [] if images is None else as_image_list(images)
    known = check_labels(listed, labels, class_names)
    # Parts of one picture are one session, whatever sets of labels they have.
    grouped = read_groups(groups, len(listed), listed, known.ids if known.sets is None else 0 * known.ids)
    if known.sets is not None:
        check_multi_label(options, unknown_images, tree)
        if choose_engine:
            log.warning("precision='auto' compares single labels: with several labels a picture it stays fp32")
            choose_engine = False
    paths = paths_of(tree, known.names, known.numbers or ())
    texts = check_descriptions(descriptions, known.names, settings.templates)
    unknown = [] if unknown_images is None else as_image_list(unknown_images)
    check_unknown_images(len(unknown))
    _check_counts(options.config.method, known, known.ids)
    if str(parameters["pretrained"]) == "none":
        log.warning("pretrained='none': the weights are random, to measure speed, and the answers mean nothing")
    names_to_read = None if class_names is None and known.numbers is not None else known.names
    clip = open_clip((names_to_read, settings.templates, texts))
    _check_model(options.config.method, known.counts(known.ids), clip, settings.templates, texts)
    shown, skip_bad = bool(parameters["progress"]), bool(parameters["skip_bad"])
    # Later queries are single views, so that is what leave-one-out has to score.
    scored = options.searched or known.sets is not None
    settings = replace(settings, single=scored and settings.views > 1)
    text = None if clip.text is None else clip.text.embed_classes(known.names, settings.templates, texts)
    with bar("encode", len(listed) + len(unknown), shown=shown) as step:
        given = listed, settings, known.ids, known.shown, unknown, skip_bad, step
        encoder, memory = clip.encoder_for(adapted=True), parameters["memory"]
        examples, unknown_rows, errors = encode_images(encoder, *given, memory=memory)
    if grouped is not None:
        unread = [error.position for error in errors if error.position < len(listed)]
        examples = replace(examples, groups=np.delete(grouped, unread))
    if errors:
        _check_counts(options.config.method, known, examples.class_ids)
    with bar("tune", None, shown=shown and scored and bool(len(examples))):
        others = known.sets, unknown_rows, paths, known.numbers
        head = fit_head(options, known.names, text, clip.tau, examples, *others).compiled()
    settings = replace(settings, single=examples.queries is not None)
    fitted = Fit(clip, head, settings, tuple(errors), known.numbers is not None, memory=memory)
    if not choose_engine:
        return fitted
    from iosr_fast.head.optimize import optimize

    skipped = {error.position for error in errors}
    ids = head.examples.ids.tolist()
    readable = [image for i, image in enumerate([*listed, *unknown]) if i not in skipped]  # the support images first
    engines = OptimizeOptions(runtime=parameters["runtime"], progress=shown)
    return optimize(fitted, [readable[number] for number in ids], engines, head.version, readable[len(ids) :])


def warn_of_look_alikes(head: AnyHead) -> None:
    """Warn the caller of a fit where promises may break (LookAlikesWarning)."""
    if not isinstance(head, MultiLabelHead) and head.look_alike_warning:
        warnings.warn("; ".join(head.look_alike_warning), LookAlikesWarning, stacklevel=3)


def check_multi_label(options: Options, unknown_images: Any, tree: Any) -> None:
    """Raise IosrFastError for what does not go with several labels a picture: some methods, a reducer, unknown images
    and a tree."""
    if (reason := multi_label_reason(options.config.method, options.config.reducer)) is not None:
        raise IosrFastError(reason)
    if unknown_images is not None:
        raise IosrFastError("several labels a picture take no unknown_images: give them as pictures of no label")
    if tree is not None:
        raise IosrFastError("several labels a picture take no tree: a node above a class can be another label of it")


def _check_counts(method: str, labels: Labels, ids: np.ndarray) -> None:
    """Raise IosrFastError where a class has none of the images with these `ids` and the method needs one."""
    needed = method == AUTO or METHODS[method].needs_support
    if needed and (empty := [labels.names[c] for c in np.flatnonzero(labels.counts(ids) == 0)]):
        raise IosrFastError(f"{method} needs at least one image of each class, got none of {abbreviate(empty)}")


def _check_model(method: str, counts: np.ndarray, clip: OpenedModel, templates: Any, descriptions: Any) -> None:
    """Raise IosrFastError for a method that the model can't serve, with classes of `counts` (C,) images, and for texts
    of a model that reads none."""
    check_number("tau, the CLIP's logit scale,", clip.tau, *RANGES["tau"])
    if method != AUTO and (reason := reason_against(method, counts, clip.reads_text, clip.has_adapter)) is not None:
        raise IosrFastError(reason)
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


def fit_head(
    options: Options,
    names: Sequence[str],
    text: np.ndarray | None,
    tau: float,
    examples: Examples,
    label_sets: np.ndarray | None,
    unknown_images: Embeddings | None,
    paths: tuple[Path, ...] | None = None,
    numbers: Sequence[int] | None = None,
) -> AnyHead:
    """The head of support images whose class ids are positions in `names` (C), or in `label_sets` (P, C) bool; `paths`
    as of Head, `numbers` (C) become its uids."""
    if label_sets is None:
        examples = examples.sorted_by_class()
        support = examples.as_support(range(len(names)), text, tau)
        if options.tune != "none":
            support.check_memory()
        fit = options.fit(support)
        fields: dict[str, Any] = {"unknown_images": unknown_images, "paths": paths, "uids": numbers}
        if numbers is not None:
            examples = replace(examples, class_ids=np.array(numbers)[examples.class_ids])
        head = Head.first(names, text, tau, examples, fit.config, fit.reducer, **fields)
        return head.with_computed(support=support, plan=fit.plan)
    labels = label_sets[examples.class_ids]
    asked = options.config
    images = MultiLabelSet(examples.embeddings, labels, text, tau, examples.queries, examples.groups)
    setting = None if options.searched else asked.parameters
    of_sets = fit_multi_label(images, asked.method, setting, asked.key_precision, options.seconds)
    examples = replace(examples, class_ids=np.zeros(len(examples), np.int64))
    fields = {"labels": labels, "thresholds": of_sets.thresholds, "fit": of_sets}
    return MultiLabelHead.first(names, text, tau, examples, of_sets.config, **fields).with_computed(plan=of_sets.plan)
