"""The command `iosr-fast open-images-subset`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from iosr_fast.cli.command import new_file, note
from iosr_fast.cli.options import Seed, option
from iosr_fast.exceptions import IosrFastError


def open_images_subset(
    classes: Annotated[Path, option("Class descriptions: a CSV file of LabelName,DisplayName.")],
    labels: Annotated[list[Path], option("Labels: a CSV file of ImageID,Source,LabelName,Confidence. Repeatable.")],
    images_a_class: Annotated[int, option("Images of each class. Classes with fewer are left out.")],
    out: Annotated[Path, option("CSV of path,label to write, beside the images or IMAGES.", callback=new_file)],
    download_list: Annotated[Path | None, option("File to write for downloader.py.", callback=new_file)] = None,
    images: Annotated[Path | None, option("Choose only among the images in this folder.")] = None,
    min_confidence: Annotated[float, option("Least confidence of a label; 1: verified by people.")] = 1.0,
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
