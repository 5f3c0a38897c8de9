"""The command `iosr-fast`: fit a folder, classify images, serve them over HTTP, and say what this machine can do."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from iosr_fast.pipeline.command import classify
from iosr_fast.serving.http.command import serve
from iosr_fast.utils.outputs import check_new_folder
from iosr_fast.utils.progress import progress

if TYPE_CHECKING:
    from iosr_fast.classifier import Classifier

# Without rich's markup, which takes `[...]` in a help text for a style and leaves it out.
app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__
)
app.command()(serve)
app.command()(classify)


def _fail(error: Exception) -> NoReturn:
    typer.echo(f"iosr-fast: {error}", err=True)
    raise typer.Exit(2) from error


@app.callback()
def main(
    verbose: bool = typer.Option(False, "--verbose", "-v", help="say which runtimes and kernels are chosen"),
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")


@app.command()
def info(
    folder: Path | None = typer.Argument(None, help="a saved classifier or an engine: what it is, and its digest"),
) -> None:
    """Versions, runtimes and scoring kernels of this machine, or what a saved classifier is, after verifying it."""
    if folder is None:
        from iosr_fast.info import format_info

        typer.echo(format_info())
        return
    from iosr_fast.state.bundle_info import describe

    try:
        typer.echo(describe(folder))
    except (ValueError, OSError, ImportError) as error:
        _fail(error)


@app.command()
def fit(
    folder: Path = typer.Argument(..., help="one sub-folder of images a class"),
    out: Path = typer.Option(..., help="the folder to write the classifier to"),
    model: str = typer.Option(
        ...,
        help="a model of open_clip, like ViT-B-32 with --pretrained laion2b_s34b_b79k or ViT-B-16 with --pretrained "
        "openai; or 'demo', a toy for trying out that is near chance on photographs",
    ),
    pretrained: str = typer.Option(None, help="tag (downloaded) or weights file; not needed for the demo"),
    adapter: str = typer.Option("auto", help="a file of tools/train_adapter.py, 'auto' or 'none'"),
    method: str = typer.Option("auto", help="a training-free method (`iosr-fast info` lists them), or 'auto'"),
    alpha: float = typer.Option(None, help="weight of the images against the texts [default: chosen by leave-one-out]"),
    beta: float = typer.Option(None, help="sharpness of the cache [default: likewise]"),
    gamma: float = typer.Option(None, help="the third parameter of tip-x and ape [default: likewise]"),
    ridge: float = typer.Option(None, help="proker's regularisation [default: likewise]"),
    reducer: str = typer.Option(None, help="none, centre, pca or pca:64 [default: none; auto chooses]"),
    tune: str = typer.Option(None, help="loo, loo-single or none [default: loo where no parameter is given]"),
    template: list[str] = typer.Option(None, help="a prompt with {} for the class name; may be given more than once"),
    views: int = typer.Option(10, help="random views averaged into each key; 1 takes the image as it is"),
    mirror: bool = typer.Option(True, help="mirror half of the views"),
    runtime: str = typer.Option("auto"),
    skip_bad: bool = typer.Option(False, "--skip-bad", help="leave unreadable images out and count them"),
    key_precision: str = typer.Option("fp32", help="of the keys when scoring: fp32, fp16, bf16 or int8"),
) -> None:
    """Fit a few-shot classifier on a folder and save it."""
    try:
        from iosr_fast.classifier import Classifier, check_support, labelled_images
        from iosr_fast.methods.tuning.choice import check_choice

        check_new_folder(out, "classifier")
        check_choice(method, reducer, tune, alpha=alpha, beta=beta, gamma=gamma, ridge=ridge)
        check_support(views, mirror, template or None, key_precision)
        images, labels, names = labelled_images(folder)  # what is amiss with it shows before a CLIP is loaded
        classifier = Classifier.from_pretrained(
            model, pretrained, adapter=None if adapter == "none" else adapter, runtime=runtime, progress=True
        )
        classifier.fit(
            images,
            labels,
            names,
            templates=template or None,
            method=method,
            alpha=alpha,
            beta=beta,
            gamma=gamma,
            ridge=ridge,
            reducer=reducer,
            tune=tune,  # type: ignore[arg-type]  # check_choice refuses any other
            views=views,
            mirror=mirror,
            skip_bad=skip_bad,
            key_precision=key_precision,  # type: ignore[arg-type]  # check_support, too
            progress=True,
        )
        with progress("save", None):
            classifier.save(out)
    except KeyboardInterrupt:
        typer.echo("iosr-fast: stopped; nothing was written", err=True)
        raise typer.Exit(130) from None
    except (ValueError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        _fail(error)
    typer.echo(
        f"{out}: {len(classifier.classes_)} classes, {len(classifier.support_.embeddings)} images, {classifier.method_}"
    )
    typer.echo(_chosen(classifier))
    if classifier.skipped_:
        typer.echo(f"left out {len(classifier.skipped_)} unreadable images", err=True)


def _chosen(classifier: Classifier) -> str:
    """How the method's parameters were chosen, in a line."""
    parameters = ", ".join(f"{name} {value:.4g}" for name, value in classifier.parameters_.items())
    told = f"reducer {classifier.reducer_}{', ' if parameters else ''}{parameters}"
    tuned = classifier.tuned_
    if tuned is None:
        return f"{told} (given, or the method's defaults)"
    if tuned.scored == 0:
        return f"{told} (one image a class leaves nothing to leave out: a rule of thumb)"
    note = tuned.note and f"; {tuned.note}"
    return f"{told}: {tuned.accuracy:.1%} right by leave-one-out on {tuned.scored} images ({tuned.seconds:.1f} s){note}"


@app.command("export-triton")
def export_triton(
    classifier: Path = typer.Argument(..., help="a folder that `iosr-fast fit` or Classifier.save wrote"),
    out: Path = typer.Argument(..., help="the model repository to write"),
    max_batch: int = typer.Option(32, help="pictures that go through a model at once"),
    instances: int = typer.Option(1, help="copies of each model that work side by side"),
    gpu: bool = typer.Option(False, "--gpu", help="encoder and scoring on GPUs, the encoder through TensorRT"),
    top: int = typer.Option(5, help="classes in the example that README.txt shows"),
) -> None:
    """Write a classifier as a model repository of NVIDIA Triton Inference Server."""
    try:
        from iosr_fast.serving.triton import export_triton as export

        export(classifier, out, max_batch=max_batch, instances=instances, gpu=gpu, top=top)
    except (ValueError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        _fail(error)
    typer.echo(f"{out}:")
    typer.echo((out / "README.txt").read_text(encoding="utf-8"), nl=False)
