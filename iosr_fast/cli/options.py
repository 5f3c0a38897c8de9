"""The options that several commands share, and what they mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from iosr_fast.cli.command import new_csv, new_file, new_page, note, say, stop_message
from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.utils.require import require

if TYPE_CHECKING:
    from iosr_fast.encoders.rows import Rows
    from iosr_fast.files.work import Counts
    from iosr_fast.ray import Pool


def option(text: str, *names: str, **settings: Any) -> Any:
    """An option with the help `text`. Its name follows from the parameter's, if none is given."""
    return typer.Option(*names, help=text, **settings)


def argument(name: str, text: str) -> Any:
    """An argument that help calls `name`."""
    return typer.Argument(metavar=name, help=text)


# Options in sections of their own in the help.
RejectOption = partial(option, rich_help_panel="Images of none of the classes")
BoxOption = partial(option, rich_help_panel="Boxes of a detector file (.json)")
RayOption = partial(typer.Option, rich_help_panel="Ray")
ReplicaOption = partial(typer.Option, rich_help_panel="Replicas")

SavedClassifier = Annotated[
    Path, argument("CLASSIFIER", "Folder that `iosr-fast fit`, Classifier.save or FewShotHead.save wrote.")
]
Model = Annotated[str, option("A model: `iosr-fast models` lists the kinds.")]
Pretrained = Annotated[str | None, option("Tag of the weights of open_clip's model, which are downloaded, or a file.")]
Adapter = Annotated[str, option("File of `iosr-fast train-adapter`, none, or auto: the demo's for the demo.")]
Runtime = Annotated[str, option("auto, onnxruntime, openvino, tensorrt, tensorrt_rtx or torch.")]
Nested = Annotated[bool, option("Each folder of images is a class, and the folders above it are a tree.", "--nested")]
LabelColumn = Annotated[str | None, option("Column of labels in CSV files [default: label, or labels].")]
Keywords = Annotated[
    str | None,
    option("XMP keywords are the labels in a folder, of pictures with some (tagged) or of all.", metavar="tagged|all"),
]
SkipBad = Annotated[bool, option("Leave out images that can't be read, and report them.", "--skip-bad")]


def as_share(text: str) -> float:
    """A share above 0 and below 1, as a number or in percent: 0.01 or 1%."""
    number = text.removesuffix("%")
    try:
        share = float(number) / (1 if number == text else 100)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise typer.BadParameter(f"expected a share above 0 and below 1, like 0.01 or 1%, got {text!r}")
    return share


# Of a classifier that is exported.
PromisedError = Annotated[
    float | None,
    option(
        "Answer whether a label is accepted: at most this share, like 1%, is wrong.", metavar="SHARE", parser=as_share
    ),
]
RejectUnknown = Annotated[bool, RejectOption("Answer whether it is one, with a score.", "--reject-unknown")]
Margin = Annotated[float, option("Share of a box's sides to take beside it, of parts of pictures.", metavar="SHARE")]
# Files to write.
Html = Annotated[Path | None, option("Write a page with the pictures here, one file.", callback=new_page)]
Json = Annotated[Path | None, option("Write the figures here, as JSON.", "--json", callback=new_file)]
Csv = Annotated[Path | None, option("CSV file to write [default: standard output].", callback=new_csv)]
# Of runs over many images.
Batch = Annotated[int | None, option("Images encoded at a time [default: 16 on a CPU, else 64; on Ray 64].", min=1)]
Threads = Annotated[int | None, option("CPU threads of this process [default: all], or of each Ray worker.")]
Chunk = Annotated[int | None, option("Images of a part, which a kill may cost [default: 1024; of a file 256].")]
Ray = Annotated[bool, RayOption("--ray", help="Spread the parts over Ray workers.")]
Workers = Annotated[int | None, RayOption(help="Number of workers [default: 2].")]
Gpus = Annotated[float, RayOption(help="GPUs of each worker, or its share of one.")]
Address = Annotated[str | None, RayOption(help="Address of a running cluster; auto: the one on this machine.")]
# Of boxes of detector files.
Root = Annotated[Path | None, BoxOption("Folder that all pictures are below [default: the file's].")]
MinConfidence = Annotated[float | None, BoxOption("Leave out boxes of less confidence.", min=0, max=1)]
Category = Annotated[list[str] | None, BoxOption("Take boxes of this category of the detector. Repeatable.")]
# Of replicas of the server.
MaxBatch = Annotated[int | None, option("Most images of a batch [default: 8 on a CPU; all that a GPU's engine takes].")]
Deadline = Annotated[int, option("Deadline of a request that names none, in milliseconds.")]


def rows_in(classifier: Path, **given: Any) -> Rows | None:
    """The rows of embeddings that the head in a folder takes; None where it holds anything else. Raises IosrFastError
    where a head is there, and options that need images are given."""
    from iosr_fast.encoders.rows import Rows
    from iosr_fast.store.bundle import HEAD_KIND, kind_of, load

    if kind_of(classifier) != HEAD_KIND:
        return None
    if flags := [f"--{name.replace('_', '-')}" for name, value in given.items() if value not in (None, False)]:
        raise IosrFastError(
            f"{classifier} is a head, which takes embeddings: expected no {', '.join(flags)}, for images"
        )
    return Rows.like(load(classifier).head.examples.embeddings)


def ray_pool(ray: bool, workers: int | None, gpus: float, address: str | None) -> Pool | None:
    """The workers that the options name, None without --ray. Raises IosrFastError, and ImportError without Ray."""
    if not ray:
        if workers is not None or address is not None or gpus:
            raise IosrFastError("expected --workers, --gpus and --address only with --ray, got them without it")
        return None
    workers = 2 if workers is None else workers
    if workers < 1 or gpus < 0:
        raise IosrFastError(f"expected --workers of at least 1 and --gpus of at least 0, got {workers} and {gpus}")
    require("ray", "ray")
    from iosr_fast.ray import Pool

    return Pool(workers, gpus, address)


@contextmanager
def resumable(out: Path | None) -> Iterator[None]:
    """Ctrl-C and an unreadable image end a run; where it writes parts for `out`, the message says how it resumes."""
    with stop_message("stopped" if out is None else f"stopped; the same command resumes {out}"):
        try:
            yield
        except BadImageError as error:
            if out is None:
                raise
            raise IosrFastError(
                f"{error}; the finished parts are kept. Repair it, or give --skip-bad, and start again"
            ) from error


def note_counts(out: Path | None, counts: Counts, kind: str) -> None:
    """Say what a run over many images, or boxes, did."""
    if out is not None:
        note(f"wrote {out}: {counts.images} {kind}")
    if counts.errors:
        note(f"could not read {counts.errors} of {counts.images} {kind}")


def echo_first(title: str, lines: list[str], count: int = 0, most: int = 10, by: str = "--html or --json") -> None:
    """The first lines below a title, how many more there are, of `count` if that is more, and what lists all lines."""
    if lines:
        say(title, *(f"  {line}" for line in lines[:most]))
    if (more := max(count, len(lines)) - most) > 0:
        say(f"  and {more} more; {by} lists {'them' if count <= len(lines) else f'the first {len(lines)}'}")
