"""The command `iosr-fast fit`."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from iosr_fast.cli import options as shared
from iosr_fast.cli.command import note, stop_message
from iosr_fast.cli.options import Adapter, Margin, Nested, Pretrained, Root, Runtime, SkipBad, argument, option
from iosr_fast.exceptions import BadImageError, IosrFastError, LookAlikesWarning
from iosr_fast.sealed.folders import check_new_folder
from iosr_fast.utils.progress import progress

if TYPE_CHECKING:
    from iosr_fast.classifier import Classifier

log = logging.getLogger(__name__)


def fit(
    folder: Annotated[list[Path], argument("FOLDER ...", "Folders of class folders, .csv or detector files.")],
    out: Annotated[Path, option("Folder to write the classifier to.")],
    model: Annotated[str | None, option("A model (iosr-fast models) [default: photographs].")] = None,
    pretrained: Pretrained = None,
    adapter: Adapter = "auto",
    method: Annotated[str, option("A method of `iosr-fast info`, or auto: the best on FOLDER.")] = "auto",
    alpha: Annotated[float | None, option("Weight of the images [default: chosen by leave-one-out].")] = None,
    beta: Annotated[float | None, option("Sharpness of the similarity to images [default: likewise].")] = None,
    gamma: Annotated[float | None, option("Third parameter of tip-x, timo and ape [default: likewise].")] = None,
    ridge: Annotated[float | None, option("Regularisation of proker [default: likewise].")] = None,
    reducer: Annotated[str | None, option("none, centre, pca or pca:RANK, for a named method [default: none].")] = None,
    tune: Annotated[str | None, option("loo: choose parameters by leave-one-out, or none [default: loo].")] = None,
    tune_seconds: Annotated[float, option("Budget of the search of auto and stack on one core, in seconds.")] = 20.0,
    template: Annotated[list[str] | None, option("Prompt with {}, or none. Repeatable [default: the CLIP's].")] = None,
    descriptions: Annotated[Path | None, option("More texts of classes: JSON of lists, or CSV of class, text.")] = None,
    tree: Annotated[Path | None, option("CSV of class, parent: with --max-error a node may be the answer.")] = None,
    nested: Nested = False,
    label_column: shared.LabelColumn = None,
    keywords: shared.Keywords = None,
    similar_names: Annotated[bool, option("Names that are a letter apart are meant.", "--similar-names")] = False,
    margin: Margin = 0.0,
    unknown_images: Annotated[Path | None, option("Folder of pictures of none of the classes.")] = None,
    calibrate_on: Annotated[
        Path | None, option("Labelled pictures from production, as FOLDER, on which promises rest (predict_sets, ...).")
    ] = None,
    root: Root = None,
    runtime: Runtime = "auto",
    precision: Annotated[
        str, option("fp32, bf16 (openvino), fp16 (GPUs), or auto: the fastest accurate one.")
    ] = "auto",
    skip_bad: SkipBad = False,
    look_alikes: Annotated[
        bool, option("Leave pictures of a class that look alike out together; not where all were drawn independently.")
    ] = True,
    key_precision: Annotated[
        str | None, option("Precision of the keys: fp32, fp16, bf16 or int8 [default: by the machine].")
    ] = None,
    overwrite: Annotated[bool, option("Replace the classifier in --out.", "--overwrite")] = False,
) -> None:
    """Fit a few-shot classifier on a folder of images and save it.

    FOLDER has one sub-folder of images for each class, or is a .csv file of path and label (or of path and labels,
    joined by ; or in a row each, where pictures may have several); a detector file (.json) stands for its labelled
    boxes, an export of Label Studio for the choices of its tasks, too, and with --keywords a folder of a photo library
    for its tagged pictures. Several of these are joined, and a file that is listed again has the later label. Columns
    x, y, width and height make a row a part of its picture. A column group names pictures of one video or object, which
    are left out together; a table with columns of several questions is fitted once for each, by --label-column.

    Without --model it is photographs, a small network that needs no download; a CLIP is better and reads class names.

    \b
    iosr-fast fit support/ --out my-classifier
    iosr-fast fit support/ --model ViT-B-32 --pretrained laion2b_s34b_b79k \\
        --out my-classifier
    iosr-fast classify my-classifier photos/
    """
    parameters: dict[str, Any] = {**locals()}
    beside = ("unknown_images", "descriptions", "calibrate_on", "tree", "nested", "root", "label_column", "keywords")
    data = {name: parameters.pop(name) for name in (*beside, "similar_names")}
    for name in ("folder", "out", "template", "overwrite"):
        del parameters[name]  # the others are parameters of Classifier
    from iosr_fast.classifier import Classifier

    templates = [] if template == ["none"] else template or None
    parameters |= {"adapter": None if adapter == "none" else adapter, "templates": templates}
    classifier = Classifier(**parameters, progress=True)
    with stop_message("stopped; nothing was written"):
        check_new_folder(out, "classifier")
        if not overwrite and out.is_dir() and any(out.iterdir()):
            raise FileExistsError(f"{out} is a classifier already: --overwrite replaces it, or choose another folder")
        try:
            with warnings.catch_warnings(category=LookAlikesWarning, action="ignore"):  # the summary says it
                classifier.fit_folder(*folder, **data)
        except BadImageError as error:
            raise IosrFastError(f"{error}; repair or remove it, or leave such images out by --skip-bad") from error
        with progress("save", None):
            classifier.save(out)
    note(*_summary(classifier, out), err=False)
    if classifier.skipped_:
        note(f"left out {len(classifier.skipped_)} unreadable images")


def _summary(classifier: Classifier, out: Path) -> list[str]:
    """What a fit gave, the accuracy first. The method's parameters are logged."""
    from iosr_fast.methods.config import describe_shares

    parameters = [f"{name} {value:.4g}" for name, value in classifier.parameters_.items()]
    log.info("%s", ", ".join([f"reducer {classifier.reducer_}", *parameters]))
    counts = f"{len(classifier.classes_)} classes, {len(classifier.support_.embeddings)} images"
    lines = [*classifier.snapshot().summary().split("\n"), f"{out}: {counts}, {classifier.method_}"]
    if (tuned := classifier.tuned_) is not None and max(tuned.shares.values(), default=1.0) < 1.0:
        lines.append(f"shares of the logits: {describe_shares(tuned.shares)}")
    return lines + (classifier.engine_choice_.lines() if classifier.engine_choice_ is not None else [])
