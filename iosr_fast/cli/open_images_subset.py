"""Choose a balanced subset of Open Images to train the adapter on, from the official label files.

    python tools/open_images_subset.py --classes oidv7-class-descriptions.csv \\
        --labels oidv7-train-annotations-human-imagelabels.csv --images-a-class 200 \\
        --out oi_data.csv --download-list images.txt
    python downloader.py images.txt --download_folder=images    # the official downloader

The files are at https://storage.googleapis.com/openimages/web/download_v7.html.
"""

from __future__ import annotations

from pathlib import Path

import typer

from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.command import new_file, one_line_errors

with one_line_errors("iosr-fast"):
    from iosr_fast.training.data.open_images import balanced_subset, write_download_list, write_subset_csv


def open_images_subset(
    classes: Path = typer.Option(..., help="class descriptions: LabelName,DisplayName"),
    labels: list[Path] = typer.Option(..., help="image labels: ImageID,Source,LabelName,Confidence; may be repeated"),
    images_a_class: int = typer.Option(..., help="exactly so many images a class; classes with fewer are left out"),
    out: Path = typer.Option(..., callback=new_file, help="the subset to write: ImageID,DisplayName,type"),
    download_list: Path = typer.Option(None, callback=new_file, help="file to write for the official downloader.py"),
    images: Path = typer.Option(None, help="choose only among the images in this folder"),
    min_confidence: float = typer.Option(1.0, help="1: labels verified by people only"),
    seed: int = typer.Option(0),
) -> None:
    if download_list is not None and download_list.absolute() == out.absolute():
        raise IosrFastError(f"expected two files to write, got {out} twice")
    subset = balanced_subset(classes, labels, images_a_class, seed, min_confidence, images)
    if not subset.image_ids:
        raise IosrFastError(f"no class has {images_a_class} images; {len(subset.left_out)} have fewer free")
    write_subset_csv(subset, out)
    if download_list is not None:
        write_download_list(subset, download_list)
    classes_used = len(set(subset.class_names))
    typer.echo(
        f"{len(subset.image_ids)} images of {classes_used} classes -> {out}; {len(subset.left_out)} classes left out"
    )
