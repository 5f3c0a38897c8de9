"""The command `iosr-fast classify`."""

from __future__ import annotations

import sys
from contextlib import closing
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer

from iosr_fast.cli.options import (
    Address,
    Batch,
    Chunk,
    Gpus,
    Html,
    Ray,
    RejectOption,
    Runtime,
    SavedClassifier,
    SkipBad,
    Threads,
    Workers,
    ray_pool,
    resumable,
)
from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.utils.command import note, output, write_new
from iosr_fast.utils.progress import progress

if TYPE_CHECKING:
    from iosr_fast.files.run import Counts
    from iosr_fast.files.source import Source
    from iosr_fast.files.work import Classify, ReadOptions
    from iosr_fast.head.rejecting import Rejecting

FORMS = {".csv": "csv", ".parquet": "parquet", "": "parts"}  # by the suffix of --out


def classify(
    classifier: SavedClassifier,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGES", help="Images, folders, or CSV files with a column path.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write (.csv or .parquet), or a folder for parts. An interrupted run resumes."),
    ] = None,
    top: Annotated[int | None, typer.Option(min=1, help="Classes of each image [default: 1; in a folder 5].")] = None,
    batch: Batch = None,
    decoder: Annotated[
        Literal["cpu", "cpu-exact"],
        typer.Option(metavar="NAME", help="cpu, or cpu-exact: large JPEGs too are decoded at full size."),
    ] = "cpu",
    runtime: Runtime = "auto",
    threads: Threads = None,
    skip_bad: SkipBad = False,
    joint: Annotated[
        bool,
        typer.Option("--joint", help="Classify all images together, for a file or standard output; does not resume."),
    ] = False,
    html: Html = None,
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
    chunk: Chunk = None,
    ray: Ray = False,
    workers: Workers = None,
    gpus: Gpus = 0,
    address: Address = None,
) -> None:
    """Classify images with a saved classifier.

    Writes rows of path, label, probability and error (why an image can't be read) as CSV to standard output, or to a
    file; with --html alone a page instead of the rows.

    For millions of images --out is a folder (a name without a suffix). It gets Parquet parts, which also have the
    class id and the parts of the logit: zero_shot, from the texts, cache, from the support images, and adapter, what
    of cache comes through adapted embeddings; and manifest.json when all parts exist. Keys are paths in the input, if
    that is one folder. With --ray the machines of a cluster need this package, the images, the classifier and --out
    at the same paths, and one version of Ray.
    """
    rejecting = _check_unknown(reject_unknown, unknown_label, keep)
    pool = ray_pool(ray, workers, gpus, address)
    if out is not None and out.suffix not in FORMS:
        raise IosrFastError(f"expected --out to end in .csv or .parquet, or a folder without a suffix, got {out}")
    form: Any = "csv" if out is None else FORMS[out.suffix]
    if form == "parts" and (joint or html is not None):
        option = "--joint" if joint else "--html"
        raise IosrFastError(f"expected a file for --out with {option}, got the folder {out}; use .csv or .parquet")
    parts = None if joint else out
    if parts is None and (ray or chunk is not None):
        raise IosrFastError("expected --out, and no --joint, with --ray and --chunk: they are for runs of parts")
    from iosr_fast.files.run import check_out, parts_of, run
    from iosr_fast.files.source import read_source
    from iosr_fast.files.tables import read_csv, read_table
    from iosr_fast.files.work import Classify, ReadOptions
    from iosr_fast.reports.predictions_report import predictions_page

    text: TextIO = output(sys.stdout) if html is None else StringIO()
    options = ReadOptions(batch, runtime, threads, skip_bad)
    with resumable(parts):
        if out is not None:
            if joint and parts_of(out).exists():
                raise FileExistsError(
                    f"{parts_of(out)} holds an interrupted run without --joint: finish that run, remove the folder, or "
                    "choose another name"
                )
            check_out(out)
        source = read_source(images, form == "parts", skip_bad)
        known = (None, None) if rejecting is None else (rejecting.label, rejecting.keep)
        work = Classify(str(classifier), form, top or (5 if form == "parts" else 1), decoder, *known)
        work.check(one_label=joint or html is not None)
        if parts is not None:
            counts = run(work, source, parts, options, chunk, pool)
        elif joint:
            counts = _jointly(work, source, options, out, text)
        else:
            counts = _stream(work, source, options, text)
    if out is not None:
        note(f"wrote {out}: {counts.images} images")
    if counts.unread:
        note(f"could not read {counts.unread} of {counts.images} images")
    if rejecting is not None:
        note(f"rejected {counts.rejected} of {counts.images - counts.unread} images as {rejecting.label!r}")
    if html is not None:
        text.seek(0)
        rows = read_csv(text) if out is None else read_table(out)
        names = ", ".join(Path(place).name or place for place in images[:3])
        title = f"Labels of {names}{', ...' if images[3:] else ''}"
        upright = work.bundle.views.exif_orientation
        write_new(html, predictions_page(rows, title, counts.unread, work.unknown_label, upright))
    if counts.unread == counts.images:
        raise IosrFastError("none of the images could be read")


def _check_unknown(reject: bool, label: str | None, keep: float | None) -> Rejecting | None:
    from iosr_fast.head.rejecting import UNKNOWN_LABEL, check_rejecting
    from iosr_fast.methods.unknown import KEEP

    if not reject and (label is not None or keep is not None):
        raise IosrFastError("expected --unknown-label and --keep only with --reject-unknown")
    word, share = UNKNOWN_LABEL if label is None else label, KEEP if keep is None else keep
    return check_rejecting("reject" if reject else None, word, share)


def _stream(work: Classify, source: Source, options: ReadOptions, file: TextIO) -> Counts:
    """Write CSV rows as images are classified."""
    from iosr_fast.files.classify import classify
    from iosr_fast.files.run import Counts
    from iosr_fast.files.tables import CsvTable, Row, row_of

    reader, table, unread, rejected = work.open(options), work.table, 0, 0
    assert isinstance(table, CsvTable)
    file.write(table.header())
    keys = iter(source.keys)
    bar = progress("classify", len(source.keys), not file.isatty())
    with bar as advance, closing(classify(work.head, reader, source.paths, work.top, work.keep)) as batches:
        for answers in batches:
            rows = [
                Row(key, error=one.reason) if isinstance(one, BadImageError) else row_of(key, one, table.fields)
                for one, key in zip(answers, keys, strict=False)
            ]
            file.write(table.group(rows))
            unread += sum(bool(row.error) for row in rows)
            rejected += sum(row.unknown is not None and row.unknown.rejected for row in rows)
            advance(len(rows))
    return Counts(len(source.keys), unread, rejected)


def _jointly(work: Classify, source: Source, options: ReadOptions, out: Path | None, file: TextIO) -> Counts:
    """Encode all images, classify them together, and write the rows."""
    from iosr_fast.files.classify import classify_jointly
    from iosr_fast.files.run import Counts
    from iosr_fast.files.tables import CsvTable

    with progress("encode", len(source.keys), out is not None or not file.isatty()) as advance:
        together = classify_jointly(work.head, work.open(options), source.paths, work.rejecting, advance)
    note(together.joint.summary())
    group = work.table.group(together.rows(source.keys, work.top))
    if out is not None:
        work.table.write(out, [group])
    else:
        assert isinstance(work.table, CsvTable)
        file.write(work.table.header() + group)
    unread = len(source.keys) - len(together.probabilities)
    return Counts(len(source.keys), unread, sum(one.rejected for one in together.rejections or ()))
