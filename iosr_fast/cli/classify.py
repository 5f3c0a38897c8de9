"""The command `iosr-fast classify`."""

from __future__ import annotations

import sys
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, TextIO

from iosr_fast.cli import options as shared
from iosr_fast.cli.command import note, output, write_new
from iosr_fast.cli.options import RejectOption, argument, as_share, note_counts, option, ray_pool, resumable, rows_in
from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.detector_files import Selection, is_detector_file
from iosr_fast.utils.require import require

UNKNOWN_LABEL, KEEP = "unknown", 0.95
FORMS = {".csv": "csv", ".parquet": "parquet", ".json": "json", "": "parts"}  # by the suffix of --out


def classify(
    classifier: shared.SavedClassifier,
    images: Annotated[list[str], argument("IMAGES", "Images, folders, CSV files with a column path, detector files.")],
    out: Annotated[Path | None, option("File to write (.csv, .parquet, .json), or a folder for parts.")] = None,
    top: Annotated[int | None, option("Classes of each image [default: 1; in a folder 5].", min=1)] = None,
    batch: shared.Batch = None,
    runtime: shared.Runtime = "auto",
    threads: shared.Threads = None,
    skip_bad: shared.SkipBad = False,
    joint: Annotated[bool, option("Classify all images together; does not resume.", "--joint")] = False,
    html: shared.Html = None,
    reject_unknown: Annotated[bool, RejectOption("Give them a label, and all a score.", "--reject-unknown")] = False,
    unknown_label: Annotated[str, RejectOption("Their label.", metavar="WORD")] = UNKNOWN_LABEL,
    keep: Annotated[float, RejectOption("Share of known images that keep their label.")] = KEEP,
    max_error: Annotated[
        float | None,
        option("Accept labels of which at most this share, like 1%, is wrong.", metavar="SHARE", parser=as_share),
    ] = None,
    sort: Annotated[
        Path | None,
        option("Link accepted images below class folders of this folder, the others below look/.", metavar="FOLDER"),
    ] = None,
    root: shared.Root = None,
    min_confidence: shared.MinConfidence = None,
    category: shared.Category = None,
    chunk: shared.Chunk = None,
    ray: shared.Ray = False,
    workers: shared.Workers = None,
    gpus: shared.Gpus = 0,
    address: shared.Address = None,
) -> None:
    """Classify images with a saved classifier.

    Writes rows of path, label, probability and error (why an image can't be read) as CSV to standard output, or to a
    file, where an interrupted run resumes; with --html alone a page instead of the rows. --max-error adds the column
    accepted, and the page shows the images whose label is not accepted. Where the classifier has a tree it also adds
    level, 0 for a class, 1 for the deepest nodes, and label_path, and the label may be such a node. Where pictures may
    have several labels, a row has all of them: labels, probabilities and accepted are each joined by ";" in CSV.

    With --sort the images are also hard links, or copies on another file system, in FOLDER: those with an accepted
    label below CLASS/, of a node of a tree NODE/(group)/, the others below look/, each with its path in the input.
    Nothing is moved or replaced, an image has one place, and sorted.csv there lists what was made. The rows are printed
    only with --out.

    A detector file (JSON of MegaDetector, COCO or Label Studio) stands for its boxes. With --out of .json it is written
    with a class for each: MegaDetector's get classifications, the --top best; COCO's the category_id and score (the
    detector's own become detection_category_id and detection_score), and of several labels an annotation for each, with
    detection_copy_of, the first's id; Label Studio's tasks a prediction. A box that is rejected, or whose label is not
    accepted, gets none, nor keeps that of an earlier run; all else stays.

    For millions of images --out is a folder (a name without a suffix). It gets Parquet parts, which also have the
    class id and the parts of the logit: zero_shot, from the texts, cache, from the support images, and adapter, what
    of cache comes through adapted embeddings; and manifest.json when all parts exist. Keys are paths in the input, if
    that is one folder. With --ray the machines of a cluster need this package, the images and the classifier at the
    same paths, and one version of Ray.
    """
    from iosr_fast.head.verdict import check_abstention

    if not reject_unknown and (unknown_label, keep) != (UNKNOWN_LABEL, KEEP):
        raise IosrFastError("expected --unknown-label and --keep only with --reject-unknown")
    abstention = check_abstention("reject" if reject_unknown else None, unknown_label, keep, max_error)
    taken = rows_in(classifier, ray=ray, sort=sort)
    pool = ray_pool(ray, workers, gpus, address)
    if out is not None and out.suffix not in FORMS:
        raise IosrFastError(
            f"expected --out to end in .csv, .parquet or .json, or a folder without a suffix, got {out}"
        )
    form: Any = "csv" if out is None else FORMS[out.suffix]
    if form in ("parquet", "parts"):
        require("pyarrow.parquet", "parquet")
    if form == "parts" and (joint or html is not None):
        given = "--joint" if joint else "--html"
        raise IosrFastError(f"expected a file for --out with {given}, got the folder {out}; use .csv or .parquet")
    if sort is not None and (max_error is None or form not in ("csv", "parquet")):
        raise IosrFastError("expected --max-error, and .csv or .parquet if --out is given, with --sort")
    boxes = Selection(root, min_confidence, tuple(category or ()))
    is_one = len(images) == 1 and is_detector_file(images[0])
    if form == "json" and (taken or html or unknown_label != UNKNOWN_LABEL or not is_one):
        raise IosrFastError(
            f"expected a classifier of images and one detector file (.json) with --out {out}, and neither --html nor "
            "--unknown-label; use .csv or .parquet"
        )
    if (out is None or joint) and (ray or chunk is not None):
        raise IosrFastError("expected --out, and no --joint, with --ray and --chunk: they are for runs of parts")
    from iosr_fast.files.detections import DetectionsTable
    from iosr_fast.files.embedding_files import read_rows
    from iosr_fast.files.run import check_out, run
    from iosr_fast.files.sort import check_sort, class_folders, sort_images
    from iosr_fast.files.source import read_source
    from iosr_fast.files.stream import ReadOptions
    from iosr_fast.files.tables import read_table
    from iosr_fast.files.work import Classify
    from iosr_fast.reports.predictions_report import predictions_page

    text: TextIO = output(sys.stdout) if html is None and sort is None else StringIO()
    with resumable(None if joint else out):
        if out is not None:
            check_out(out)
        embedded = None if taken is None else read_rows(images, taken, html is not None)[0]
        source = embedded or read_source(images, form == "parts", skip_bad, boxes)
        if sort is not None:
            check_sort(sort, images, source.paths)
        most = top or (5 if form == "parts" else 1)
        detections = DetectionsTable.of(images[0], boxes, most) if form == "json" else None
        work = Classify(str(classifier), form, most, abstention, joint, detections)
        if top is not None:
            work.head.require_single_label("--top", "leave it out, a picture has all of its labels")
        work.check()
        folders = {} if sort is None else class_folders(work.head.require_single_label("--sort"))
        counts = run(work, source, out or text, ReadOptions(batch, runtime, threads, skip_bad), chunk, pool)
    kind = "boxes" if all(map(is_detector_file, images)) else "images"
    note_counts(out, counts, kind)
    labels = counts.images - counts.errors
    if reject_unknown:
        note(f"rejected {counts.rejected} of {labels} {kind}{'' if detections else f' as {abstention.label!r}'}")
    if max_error is not None:
        look = f"{counts.accepted:,} of {labels:,} labels; {labels - counts.accepted:,} need a look"
        note(f"accepted {f'{counts.accepted:,} labels of {labels:,} {kind}' if work.head.is_multi_label else look}")
        note(*(f"{classifier}: {doubt}" for doubt in work.head.doubts))
    if html is not None:
        text.seek(0)
        rows = read_table(text if out is None else out)
        names = ", ".join(Path(place).name or place for place in images[:3])
        title = f"Labels of {names}{', ...' if images[3:] else ''}"
        upright, classes = work.bundle.settings.exif_orientation, work.bundle.head.class_names
        write_new(html, predictions_page(rows, title, counts.errors, abstention.label, upright, classes))
    if counts.errors == counts.images:
        raise IosrFastError("none of the images could be read")
    if sort is not None:
        text.seek(0)
        rows = read_table(text if out is None else out)
        note(sort_images(rows, sort, images, folders))
