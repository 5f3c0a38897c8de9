"""The command `iosr-fast fit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from iosr_fast.utils.command import stop_message
from iosr_fast.utils.outputs import check_new_folder
from iosr_fast.utils.progress import progress

if TYPE_CHECKING:
    from iosr_fast.classifier import Classifier


def fit(
    folder: Path = typer.Argument(..., help="one sub-folder of images a class"),
    out: Path = typer.Option(..., help="the folder to write the classifier to"),
    model: str = typer.Option(
        ...,
        help="a model of open_clip, like ViT-B-32 with --pretrained laion2b_s34b_b79k or ViT-B-16 with --pretrained "
        "openai; or 'demo', a toy for trying out that is near chance on photographs",
    ),
    pretrained: str = typer.Option(None, help="tag (downloaded) or weights file; not needed for the demo"),
    adapter: str = typer.Option("auto", help="a file of `iosr-fast train-adapter`, 'auto' or 'none'"),
    method: str = typer.Option("auto", help="a training-free method (`iosr-fast info` lists them), or 'auto'"),
    alpha: float = typer.Option(None, help="weight of the images against the texts [default: chosen by leave-one-out]"),
    beta: float = typer.Option(None, help="sharpness of the cache [default: likewise]"),
    gamma: float = typer.Option(None, help="the third parameter of tip-x and ape [default: likewise]"),
    ridge: float = typer.Option(None, help="proker's regularisation [default: likewise]"),
    reducer: str = typer.Option(None, help="none, centre, pca or pca:64 [default: none; auto chooses]"),
    tune: str = typer.Option(None, help="loo or none [default: loo where no parameter is given]"),
    template: list[str] = typer.Option(None, help="a prompt with {} for the class name; may be given more than once"),
    views: int = typer.Option(10, help="random views averaged into each key; 1 takes the image as it is"),
    mirror: bool = typer.Option(True, help="mirror half of the views"),
    runtime: str = typer.Option("auto"),
    skip_bad: bool = typer.Option(False, "--skip-bad", help="leave unreadable images out and count them"),
    key_precision: str = typer.Option("fp32", help="of the keys when scoring: fp32, fp16, bf16 or int8"),
) -> None:
    """Fit a few-shot classifier on a folder and save it."""
    parameters: dict[str, Any] = {**locals()}
    for name in ("folder", "out", "template"):
        del parameters[name]  # the others are parameters of Classifier
    from iosr_fast.classifier import Classifier

    parameters |= {"adapter": None if adapter == "none" else adapter, "templates": template or None}
    classifier = Classifier(**parameters, progress=True)
    with stop_message("stopped; nothing was written", "iosr-fast"):
        check_new_folder(out, "classifier")
        classifier.fit_folder(folder)
        with progress("save", None):
            classifier.save(out)
    typer.echo(
        f"{out}: {len(classifier.classes_)} classes, {len(classifier.support_.embeddings)} images, {classifier.method_}"
    )
    typer.echo(_describe_choice(classifier))
    if classifier.skipped_:
        typer.echo(f"left out {len(classifier.skipped_)} unreadable images", err=True)


def _describe_choice(classifier: Classifier) -> str:
    """How the method's parameters were chosen, in one line."""
    parameters = ", ".join(f"{name} {value:.4g}" for name, value in classifier.parameters_.items())
    choice = f"reducer {classifier.reducer_}{', ' if parameters else ''}{parameters}"
    tuned = classifier.tuned_
    if tuned is None:
        return f"{choice} (given, or the method's defaults)"
    if tuned.scored == 0:
        return f"{choice} (one image a class leaves nothing to leave out: a rule of thumb)"
    note = tuned.note and f"; {tuned.note}"
    return (
        f"{choice}: {tuned.accuracy:.1%} right by leave-one-out on {tuned.scored} images ({tuned.seconds:.1f} s){note}"
    )
