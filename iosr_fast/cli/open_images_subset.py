"""The command `iosr-fast open-images-subset`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from iosr_fast.cli.options import Seed
from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.command import new_file, note


def open_images_subset(
    classes: Annotated[Path, typer.Option(help="Class descriptions: a CSV file of LabelName,DisplayName.")],
    labels: Annotated[
        list[Path], typer.Option(help="Labels: a CSV file of ImageID,Source,LabelName,Confidence. Repeatable.")
    ],
    images_a_class: Annotated[int, typer.Option(help="Images of each class. Classes with fewer are left out.")],
    out: Annotated[
        Path,
        typer.Option(callback=new_file, help="CSV file of path,label to write; images lie beside it or in IMAGES."),
    ],
    download_list: Annotated[
        Path | None, typer.Option(callback=new_file, help="File to write for Open Images' downloader.py.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Choose only among the images in this folder.")] = None,
    min_confidence: Annotated[float, typer.Option(help="Least confidence of a label; 1: verified by people.")] = 1.0,
    seed: Seed = 0,
) -> None:
    """Choose a balanced subset of Open Images to train an adapter on, by `iosr-fast train-adapter --data OUT`.

    The label files and downloader.py are at https://storage.googleapis.com/openimages/web/download_v7.html.
    """
    from iosr_fast.training.open_images import balanced_subset, write_download_list, write_list

    if download_list is not None and download_list.absolute() == out.absolute():
        raise IosrFastError(f"expected two files to write, got {out} twice")
    subset = balanced_subset(classes, labels, images_a_class, seed, min_confidence, images)
    if not subset.image_ids:
        raise IosrFastError(f"no class has {images_a_class} images; {len(subset.left_out)} have fewer free")
    write_list(subset, out, images)
    if download_list is not None:
        write_download_list(subset, download_list)
    classes_used = len(set(subset.class_names))
    note(
        f"{len(subset.image_ids)} images of {classes_used} classes -> {out}; {len(subset.left_out)} classes left out",
        err=False,
    )
