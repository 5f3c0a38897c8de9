"""The command `iosr-fast export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from iosr_fast.cli import options as shared
from iosr_fast.cli.command import note
from iosr_fast.cli.options import RejectOption, argument, as_share, option


def export(
    classifier: shared.SavedClassifier,
    file: Annotated[Path, argument("FILE", "ONNX file to write.")],
    max_error: Annotated[
        float | None,
        option(
            "Answer whether a label is accepted: at most this share, like 1%, is wrong.",
            metavar="SHARE",
            parser=as_share,
        ),
    ] = None,
    reject_unknown: Annotated[
        bool, RejectOption("Answer whether it is one, with a score.", "--reject-unknown")
    ] = False,
    pixels: Annotated[bool, option("Take images of the encoder's size only, without a resize.", "--pixels")] = False,
) -> None:
    """Write a saved classifier as one ONNX file: images of any size in, probabilities and labels out.

    ONNX Runtime, OpenVINO, a browser or C++ executes it without this package and answers alike. The resize in it is
    exact and slow for large images, 0.3 s for 12 megapixels: shrink these first. int8 answers alike on the same
    processors and runtimes only; fp32 everywhere.

    \b
    iosr-fast export my-classifier pets.onnx --max-error 1%
    """
    from iosr_fast.classifier import open_saved

    opened = open_saved(classifier)
    opened.export(file, max_error, "reject" if reject_unknown else None, "pixels" if pixels else "picture")
    note(f"wrote {file}: {file.stat().st_size / 1e6:.1f} MB")
