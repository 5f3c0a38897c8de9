"""Make docs/gallery.md and its pictures: overlap, accuracy, a classified folder, and what predictions rest on.

    python tools/gallery.py --out docs

The page is a function of the demo's data and of the rows in benchmarks/results/accuracy-demo.json; every draw has a
fixed seed. The bytes of a picture depend on matplotlib's version. docs/page.png is made by tools/page_screenshot.py.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import typer
from PIL import Image

from iosr_fast.classifier import Classifier
from iosr_fast.clip.demo.pictures import FOLDER as DEMO_DATA
from iosr_fast.clip.demo.pictures import held_out, load_index, only
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.evaluation.demo import BATCH
from iosr_fast.evaluation.demo_bundle import CLASSES, METHOD, SHOTS, held_out_queries, make_demo_bundle
from iosr_fast.evaluation.overlap import overlap_rows
from iosr_fast.training.overlap import plot_overlap
from iosr_fast.utils.command import run
from tools.reporting.gallery_figures import Answer, draw_accuracy, draw_explanations, draw_grid
from tools.reporting.gallery_page import page
from tools.reporting.load import BrokenResults, Row, read_file

PAGE, PICTURES = "gallery.md", "gallery"
ROWS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "accuracy-demo.json"
SHOWN, TOP, NEAREST = 24, 4, 4


def measure_overlap(classifier: Classifier, concepts: int | None, path: Path) -> list[Row]:
    """Draw the histograms of the first test concepts (None: of all). A row each for plain and adapted embeddings."""
    pictures, _ = held_out()
    pictures = only(pictures, np.arange(len(pictures.names)) < (concepts or len(pictures.names)))
    batches = np.array_split(pictures.images, -(-len(pictures.images) // BATCH))
    embeddings = Embeddings.concatenate([classifier.encoder.encode(batch) for batch in batches])
    assert embeddings.adapted is not None
    named = {"plain": embeddings.plain, "adapted": embeddings.adapted}
    plot_overlap(named, pictures.concepts, path)
    return overlap_rows("demo", named, pictures.concepts)


def read_accuracy(path: Path) -> list[Row]:
    """The rows of every method without a reducer, and of auto."""
    rows = [row for row in read_file(path).rows.get("accuracy", []) if row["reducer"] in ("none", "auto")]
    if not rows or any(row.get("std") is None for row in rows):
        raise BrokenResults(f"{path}: expected rows of accuracy over at least two seeds, with reducer none or auto")
    return rows


def classify_folder(classifier: Classifier, images: np.ndarray, truths: Sequence[str]) -> list[Answer]:
    """The pictures as files of a folder, classified."""
    with tempfile.TemporaryDirectory() as folder:
        for i, image in enumerate(images):
            Image.fromarray(image).save(Path(folder) / f"{i:05}.png")
        predictions = classifier.predict_folder(folder)
    rows = zip(images, truths, predictions.labels.tolist(), predictions.probabilities.tolist(), strict=True)
    return [Answer(*row) for row in rows]


def explain(classifier: Classifier, answers: Sequence[Answer], path: Path) -> list[Answer]:
    """Draw the reasons of the first right answer and of the first wrong one, as far as there are such."""
    chosen = [next((one for one in answers if one.right is right), None) for right in (True, False)]
    explained = [answer for answer in chosen if answer is not None]
    predictions = classifier.explain([one.picture for one in explained], top=TOP, nearest=NEAREST)
    thumbnails = [[classifier.picture(one.example_id) for one in prediction.nearest] for prediction in predictions]
    draw_explanations(list(zip(explained, predictions, thumbnails, strict=True)), path)
    return explained


def make_gallery(out: Path, rows: Path = ROWS, concepts: int | None = None) -> None:
    """Write the page, its pictures and the licences of these to `out`."""
    pictures = out / PICTURES
    accuracy = read_accuracy(rows)
    classes = min(CLASSES, concepts or CLASSES)
    images, truths = held_out_queries(classes, SHOTS)
    pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        classifier = Classifier.load(make_demo_bundle(folder, classes, SHOTS, METHOD))
        overlap = measure_overlap(classifier, concepts, pictures / "overlap.png")
        draw_accuracy(accuracy, pictures / "accuracy.webp")
        answers = classify_folder(classifier, images, truths)
        shown = [answers[i] for i in np.random.default_rng(0).permutation(len(answers))[:SHOWN]]
        draw_grid(shown, pictures / "folder.webp")
        explained = explain(classifier, shown, pictures / "explanation.webp")
    for licence in DEMO_DATA.glob("LICENSE-*.txt"):
        shutil.copyfile(licence, pictures / licence.name)
    facts = {"classes": classes, "shots": SHOTS, "method": classifier.method_, "styles": load_index()["styles"]}
    (out / PAGE).write_text(page(overlap, accuracy, answers, shown, explained, facts), encoding="utf-8")


def main(
    out: Path = typer.Option(Path("docs"), help="the folder for gallery.md and gallery/"),
    rows: Path = typer.Option(ROWS, help="measured rows of tools/evaluate.py demo --json"),
    concepts: int | None = typer.Option(None, min=2, help="a trial with the first so many of the 443 test concepts"),
) -> None:
    make_gallery(out, rows, concepts)
    sizes = [path.stat().st_size for path in (out / PICTURES).iterdir() if path.suffix != ".txt"]
    print(f"{out / PAGE} and {len(sizes)} pictures of {sum(sizes) / 1024:.0f} KiB")


if __name__ == "__main__":
    run(main)
