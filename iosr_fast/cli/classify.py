"""The command `iosr-fast classify`."""

from __future__ import annotations

import sys
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO

import typer

from iosr_fast.cli import parts
from iosr_fast.cli.options import Address, RejectOption, Runtime, SavedClassifier, SkipBad
from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.utils.command import new_page, note, output, stop_message, write_new
from iosr_fast.utils.outputs import check_utf8
from iosr_fast.utils.require import require

if TYPE_CHECKING:
    from iosr_fast.head.rejecting import Rejecting

FILES = (".csv", ".parquet")
# Options that only a folder of parts has, and their defaults.
OF_PARTS = {
    "chunk": 1024,
    "ray": False,
    "workers": None,
    "gpus": 0,
    "address": None,
}


def classify(
    classifier: SavedClassifier,
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES",
            help="Images, or folders of images. For a folder of parts: one folder of images.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write (.csv or .parquet), or a folder for parts. An interrupted run resumes."),
    ] = None,
    top: Annotated[int | None, typer.Option(min=1, help="Classes of each image [default: 1; in parts 5].")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images encoded at a time [default: 16 on a CPU, else 64; in parts 64].")
    ] = None,
    decoder: Annotated[
        Literal["cpu", "cpu-exact"],
        typer.Option(metavar="NAME", help="cpu, or cpu-exact: large JPEGs too are decoded at full size."),
    ] = "cpu",
    runtime: Runtime = "auto",
    threads: parts.Threads = None,
    skip_bad: SkipBad = False,
    joint: Annotated[
        bool,
        typer.Option("--joint", help="Classify all images together, for a file or standard output; does not resume."),
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            callback=new_page,
            help="Write a page with the pictures by label here, one file; without --out instead of the rows.",
        ),
    ] = None,
    reject_unknown: Annotated[
        bool,
        RejectOption(
            "--reject-unknown", help="Images of none of the classes get --unknown-label, and all an unknown_score."
        ),
    ] = False,
    unknown_label: Annotated[
        str | None, RejectOption(metavar="WORD", help="Label of rejected images [default: unknown].")
    ] = None,
    keep: Annotated[
        float | None, RejectOption(help="Share of known images that keep their label [default: 0.95].")
    ] = None,
    chunk: parts.Chunk = 1024,
    ray: parts.Ray = False,
    workers: parts.Workers = None,
    gpus: parts.Gpus = 0,
    address: Address = None,
) -> None:
    """Classify images with a saved classifier.

    Writes rows of path, label, probability and error (why an image can't be read) as CSV to standard output, or to a
    file.

    For millions of images, or on Ray, --out is a folder (a name without a suffix). It gets Parquet parts, which also
    have the class id and the parts of the logit: zero_shot, from the texts, cache, from the support images, and
    adapter, what of cache comes through adapted embeddings; and manifest.json when all parts exist. With --ray the
    machines of a cluster need this package, the images, the classifier and the folder at the same paths, and one
    version of Ray.
    """
    options = {**locals()}
    rejecting = _check_unknown(*(options.pop(name) for name in ("reject_unknown", "unknown_label", "keep")))
    if out is not None and out.suffix not in FILES:
        if out.suffix:
            raise IosrFastError(
                f"expected --out to end in {' or '.join(FILES)}, or a folder without a suffix, got {out}"
            )
        if joint:
            raise IosrFastError(
                f"expected a file for --out with --joint, got the folder {out}: parts are written before all images "
                f"are encoded; use {' or '.join(FILES)}, or leave --joint out"
            )
        if html is not None:
            raise IosrFastError(
                f"expected a file for --out with --html, got the folder {out}: use {' or '.join(FILES)}"
            )
        if len(images) > 1 or decoder != "cpu":
            raise IosrFastError("expected one input and no --decoder with --out FOLDER; give a file for several inputs")
        for name in ("images", "decoder", "classifier", "joint", "html"):
            del options[name]
        options |= {"location": images[0], "batch": batch or 64}
        require("pyarrow", "parquet")
        from iosr_fast.files import run as runs

        classes = options.pop("top") or 5
        parts.write_parts(
            lambda source, run_options: runs.classify(classifier, source, out, run_options, classes, rejecting),
            **options,
        )
        return
    if given := [f"--{name.replace('_', '-')}" for name, default in OF_PARTS.items() if options[name] != default]:
        raise IosrFastError(f"expected --out FOLDER with {', '.join(given)}")
    paths = [Path(image) for image in images]
    _classify_list(classifier, paths, out, top or 1, batch, decoder, runtime, threads, skip_bad, joint, rejecting, html)


def _check_unknown(reject: bool, label: str | None, keep: float | None) -> Rejecting | None:
    from iosr_fast.head.rejecting import UNKNOWN_LABEL, check_rejecting
    from iosr_fast.methods.unknown import KEEP

    if not reject and (label is not None or keep is not None):
        raise IosrFastError("expected --unknown-label and --keep only with --reject-unknown")
    word, share = UNKNOWN_LABEL if label is None else label, KEEP if keep is None else keep
    return check_rejecting("reject" if reject else None, word, share)


def _classify_list(
    classifier: Path,
    images: list[Path],
    out: Path | None,
    top: int,
    batch: int | None,
    decoder: str,
    runtime: str,
    threads: int | None,
    skip_bad: bool,
    joint: bool,
    rejecting: Rejecting | None,
    html: Path | None,
) -> None:
    """To standard output, to a file, or to a page."""
    from iosr_fast.classifier import Classifier
    from iosr_fast.files.job import Job, check_place
    from iosr_fast.files.joint import check_joint_place, stream_jointly, write_jointly
    from iosr_fast.files.reader import Reader
    from iosr_fast.files.tables import read_csv, read_table
    from iosr_fast.reports.predictions_report import predictions_page

    def log(line: str) -> None:
        note(line)

    file: TextIO = output(sys.stdout) if html is None else StringIO()
    resumes = out is not None and not joint
    with stop_message(f"stopped; the same command resumes {out}" if resumes else "stopped", "iosr-fast"):
        paths = _list(images, skip_bad)
        if out is not None:
            (check_joint_place if joint else check_place)(out, paths)
        if html is not None:
            check_utf8(paths)
        loaded = Classifier.load(classifier, runtime=runtime, threads=threads)
        head = loaded.snapshot()
        if joint or rejecting or html or top > 1 or (out is not None and out.suffix != ".csv"):
            head = head.one_label(
                "a table with --joint, --reject-unknown, --html, --top or in another format than CSV",
                "leave these out, and give a .csv file for --out, or none",
            )
        reader = Reader.of(
            loaded.encoder,
            loaded.engine_,
            loaded.exif_orientation_,
            batch=batch,
            skip_bad=skip_bad,
            threads=threads,
            decoder=decoder,
        )
        job = Job(head, reader, paths, head.classes_shown(top), rejecting)
        if rejecting is not None:
            rejecting.check(head.one_label("--reject-unknown"))
        try:
            if joint:
                counts = stream_jointly(job, file, log) if out is None else write_jointly(job, out, log)
            else:
                counts = job.stream(file) if out is None else job.write(out)
        except BadImageError as error:
            if not resumes:
                raise
            advice = "earlier results are kept: repair the image or give --skip-bad, and start again"
            raise IosrFastError(f"{error}; {advice}") from error
    if out is not None:
        log(f"wrote {out}: {len(paths)} images")
    if counts.unread:
        log(f"could not read {counts.unread} of {len(paths)} images")
    if rejecting is not None:
        log(f"rejected {counts.rejected} of {len(paths) - counts.unread} images as {rejecting.label!r}")
    if html is not None:
        file.seek(0)
        rows = read_csv(file) if out is None else read_table(out)
        label = None if rejecting is None else rejecting.label
        title = f"Labels of {', '.join(path.name or str(path) for path in images[:3])}{', ...' if images[3:] else ''}"
        write_new(html, predictions_page(rows, title, counts.unread, label, loaded.exif_orientation_))
    if counts.unread == len(paths):
        raise IosrFastError("none of the images could be read")


def _list(images: list[Path], skip_bad: bool) -> list[str]:
    """Paths of the images, folders expanded.

    Raises ValueError for no images and, unless `skip_bad`, FileNotFoundError naming all missing ones.
    """
    from iosr_fast.images.listing import list_images, refuse_url
    from iosr_fast.utils.text import abbreviate

    for place in images:
        refuse_url(place)
    paths = [path for place in images for path in (list_images(place).paths if place.is_dir() else [str(place)])]
    if not paths:
        raise IosrFastError(
            f"expected images to classify, found none in {abbreviate([str(place) for place in images])}"
        )
    missing = [str(place) for place in images if not place.exists()]
    if missing and not skip_bad:
        raise FileNotFoundError(f"no such file or folder: {abbreviate(missing)}")
    return paths
