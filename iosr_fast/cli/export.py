"""The command `iosr-fast export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from iosr_fast.cli import options as shared
from iosr_fast.cli.command import note
from iosr_fast.cli.options import argument, option
from iosr_fast.exceptions import IosrFastError


def export(
    classifier: shared.SavedClassifier,
    file: Annotated[Path, argument("FILE", "ONNX file to write.")],
    max_error: shared.PromisedError = None,
    reject_unknown: shared.RejectUnknown = False,
    pixels: Annotated[bool, option("Take images of the encoder's size only, without a resize.", "--pixels")] = False,
    web: Annotated[
        Path | None,
        option("Also write a page that classifies images in the browser, beside a copy of the file.", metavar="FOLDER"),
    ] = None,
) -> None:
    """Write a saved classifier as one ONNX file: images of any size in, probabilities and labels out.

    ONNX Runtime, OpenVINO, a browser or C++ executes it without this package and answers alike. The resize in it is
    exact and slow for large images, 0.4 s for 12 megapixels: shrink these first. fp16 and int8 answer alike on the
    same processors and runtimes only; fp32 everywhere.

    \b
    iosr-fast export my-classifier pets.onnx --max-error 1%
    """
    from iosr_fast.classifier import Classifier
    from iosr_fast.export.web import NEEDED, check_page, write_page

    if web is not None and pixels:
        raise IosrFastError("expected no --pixels with --web: its page takes images of any size")
    opened = Classifier.load(classifier)
    if web is not None:
        check_page(file, web, opened.exif_orientation)
    opened.export(file, max_error, "reject" if reject_unknown else None, "pixels" if pixels else "picture")
    note(f"wrote {file}: {file.stat().st_size / 1e6:.1f} MB")
    if web is not None:
        write_page(file, web)
        note(f"wrote {web / 'index.html'}; {NEEDED}")
