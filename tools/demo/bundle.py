"""Save a classifier of the demo: the shipped CLIP and adapter, some held-out concepts, a few pictures of each.

python tools/demo/bundle.py --out build/demo-bundle
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import typer

from iosr_fast.backbones.demo.pictures import load_pictures
from iosr_fast.classifier import Classifier
from iosr_fast.cli.command import run
from iosr_fast.exceptions import IosrFastError
from iosr_fast.sealed.folders import check_new_folder

CLASSES, SHOTS = 100, 4
Labelled = tuple[np.ndarray, list[str]]  # pictures and their class names


def make_demo_bundle(
    folder: str | Path,
    classes: int = CLASSES,
    shots: int = SHOTS,
    method: str = "tip-adapter++",
    runtime: Literal["auto", "onnxruntime"] = "onnxruntime",
) -> Path:
    """Fit `classes` held-out concepts from `shots` pictures each, in `runtime`, and save to `folder`.

    Concepts are evenly spaced in Unicode's order, because neighbours look alike. Parameters are chosen by
    leave-one-out.
    """
    (images, labels), _ = _draw(classes, shots)
    classifier = Classifier("demo", runtime=runtime, method=method)
    classifier.fit(images, labels, class_names=list(dict.fromkeys(labels)))
    classifier.save(folder)
    return Path(folder)


def held_out_queries(classes: int = CLASSES, shots: int = SHOTS) -> Labelled:
    """The other pictures (N, 64, 64, 3) uint8 of the same concepts, and their class names."""
    return _draw(classes, shots)[1]


def _draw(classes: int, shots: int) -> tuple[Labelled, Labelled]:
    """Pictures and class names: `shots` random pictures of each chosen concept, and the others."""
    pictures = load_pictures("held-out", min_styles=shots + 1)
    if not 2 <= classes <= len(pictures.names):
        raise IosrFastError(f"expected 2 to {len(pictures.names)} classes, got {classes}")
    rng = np.random.default_rng(0)
    chosen = np.linspace(0, len(pictures.names) - 1, classes).astype(int)
    rows = [rng.permutation(np.flatnonzero(pictures.concepts == concept)) for concept in chosen]

    def labelled(part: slice) -> Labelled:
        few = np.concatenate([row[part] for row in rows])
        return pictures.images[few], [pictures.names[concept] for concept in pictures.concepts[few]]

    return labelled(slice(shots)), labelled(slice(shots, None))


def main(
    out: Path = typer.Option(Path("build/demo-bundle"), help="the folder to write"),
    runtime: Literal["auto", "onnxruntime"] = typer.Option("onnxruntime", help="auto: the GPU's, where there is one"),
) -> None:
    check_new_folder(out, "classifier")
    make_demo_bundle(out, method="auto", runtime=runtime)
    loaded = Classifier.load(out)
    images, labels = held_out_queries()
    print(
        f"{out}: {CLASSES} classes, {CLASSES * SHOTS} pictures, {loaded.method_}; "
        f"{loaded.score(images, labels):.1%} of {len(labels)} other pictures right"
    )
    print(f"try it: iosr-fast serve {out}")


if __name__ == "__main__":
    run(main)
