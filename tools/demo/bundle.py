"""Save a classifier of the demo: the shipped CLIP and adapter, some held-out concepts, a few pictures of each.

python tools/demo/bundle.py --out build/demo-bundle
"""

from __future__ import annotations

from pathlib import Path

import typer

from iosr_fast.classifier import Classifier
from iosr_fast.evaluation.demo_bundle import CLASSES, METHOD, SHOTS, held_out_queries, make_demo_bundle
from iosr_fast.utils.command import run
from iosr_fast.utils.folders import check_new_folder


def main(
    out: Path = typer.Option(Path("build/demo-bundle"), help="the folder to write"),
    classes: int = typer.Option(CLASSES, help="held-out concepts"),
    shots: int = typer.Option(SHOTS, help="pictures of each"),
    method: str = typer.Option(METHOD, help="a method, or 'auto'"),
) -> None:
    check_new_folder(out, "classifier")
    make_demo_bundle(out, classes, shots, method)
    loaded = Classifier.load(out)
    images, labels = held_out_queries(classes, shots)
    print(
        f"{out}: {classes} classes, {classes * shots} pictures, {loaded.method_}; "
        f"{loaded.score(images, labels):.1%} of {len(labels)} other pictures right"
    )
    print(f"try it: iosr-fast serve {out}")


if __name__ == "__main__":
    run(main)
