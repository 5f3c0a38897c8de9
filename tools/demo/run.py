"""The whole idea on real pictures, in minutes: train an adapter, fuse it, classify from a few pictures of each class.

python tools/demo/run.py --out build/demo
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from iosr_fast.backbones.demo.pictures import Pictures, load_index, only
from iosr_fast.classifier import Classifier
from iosr_fast.cli.command import one_line_errors, run
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.utils.require import require_installed

with one_line_errors():
    require_installed("torch", "cpu")
    from onnxruntime import InferenceSession

    from iosr_fast.backbones.adapter import Adapter, init_adapter, load_adapter, save_adapter
    from iosr_fast.backbones.demo.pictures import held_out
    from iosr_fast.backbones.load import LoadedModel, load_clip
    from iosr_fast.evaluation.comparison import Result, compare
    from iosr_fast.evaluation.demo import encode, encoded_source
    from iosr_fast.export.build import write_engine
    from iosr_fast.export.pretrained import DEMO_ADAPTER
    from iosr_fast.export.source import source_of
    from iosr_fast.training.config import TrainConfig
    from iosr_fast.training.overlap import overlap_area, pair_cosines
    from iosr_fast.training.pictures import demo_pictures
    from iosr_fast.training.progress import TrainingBar
    from iosr_fast.training.train import train_adapter

SHOTS = (1, 2, 4)
FIRST_ADAPTED_BLOCK, BOTTLENECK, SCALE = 3, 256, 0.1
CLASSES, PICTURES, SHOWN = 10, 3, 5  # of the last step: classes, pictures of each to learn from, predictions to print
console = Console(highlight=False)


def train(clip: LoadedModel, path: Path, epochs: int, views: int) -> tuple[Adapter, float]:
    """Train an adapter on the generic concepts and save it. Returns it and the seconds."""
    adapter = init_adapter(clip, FIRST_ADAPTED_BLOCK, BOTTLENECK, SCALE)
    config = TrainConfig(epochs=epochs, schedule="cosine", augment=True, cached_views=views)
    pictures = demo_pictures(clip.geometry)
    bar = TrainingBar(config, len(pictures.labels))
    with bar:
        train_adapter(clip, adapter, pictures, config, report=bar.step)
    save_adapter(adapter, path)
    return adapter, bar.seconds


def show_accuracy(results: dict[str, dict[int, Result]]) -> None:
    table = Table("accuracy in %", *(f"{shots} picture{'s' * (shots > 1)}" for shots in SHOTS))
    for name, row in results.items():
        table.add_row(name, *(f"{100 * row[shots].mean:.1f} ± {100 * row[shots].spread:.1f}" for shots in SHOTS))
    console.print(table)


def distinct_concepts(pictures: Pictures) -> list[str]:
    """CLASSES clearly different concepts: the first one by name of each of the first groups of emoji by name."""
    groups = {concept["name"]: concept["subgroup"] for concept in load_index()["concepts"]}
    first: dict[str, str] = {}
    for name in sorted(pictures.names):
        first.setdefault(groups[name], name)
    return [first[group] for group in sorted(first)][:CLASSES]


def ten_classes(engine: Path, adapter: Path, pictures: Pictures, out: Path) -> dict[str, Any]:
    """Fit the classifier that a program would use, save it, and classify all other pictures of its classes."""
    names = distinct_concepts(pictures)
    few = only(pictures, np.isin(pictures.names, names))
    rng = np.random.default_rng(0)
    order = [rng.permutation(np.flatnonzero(few.concepts == c)) for c in range(len(few.names))]
    support, queries = (
        np.concatenate([rows[part] for rows in order]) for part in (slice(PICTURES), slice(PICTURES, None))
    )
    labels = np.array(few.names)[few.concepts]
    classifier = Classifier("demo", adapter=adapter, engine=engine)
    classifier.fit(few.images[support], labels[support])
    predicted = classifier.predict(few.images[queries])
    right = int((predicted == labels[queries]).sum())
    console.print(f"  {', '.join(few.names)}", soft_wrap=True)
    for line in classifier.snapshot().summary().splitlines():  # what the classifier expects, before what is true
        console.print(f"  {line}", soft_wrap=True)
    console.print(
        f"  {right} of {len(queries)} other pictures right ({right / len(queries):.1%}; chance {1 / len(names):.0%})"
    )
    (out / "pictures").mkdir(exist_ok=True)
    for rows in order[:: len(order) // SHOWN][:SHOWN]:
        row = rows[PICTURES]
        path = out / "pictures" / f"{labels[row].replace(' ', '-')}.png"
        Image.fromarray(few.images[row]).save(path)
        probabilities = classifier.predict_proba(path)[0]
        best = classifier.classes_[probabilities.argmax()]
        mark = "right" if best == labels[row] else "wrong"
        console.print(f"  {path.name}: {best}, {probabilities.max():.0%} ({mark})")
    classifier.save(out / "classifier")
    classifier.export(out / "classifier.onnx")
    session = InferenceSession(out / "classifier.onnx", providers=["CPUExecutionProvider"])
    (positions,) = session.run(["label"], {"picture": few.images[queries]})
    alike = int((classifier.classes_[positions] == predicted).sum())
    console.print(f"  classifier.onnx, in ONNX Runtime alone: {alike} of {len(queries)} labels are the classifier's")
    return {"classes": few.names, "right": right, "queries": len(queries), "alike": alike}


def main(
    out: Path = typer.Option(Path("build/demo"), help="the folder for the report, engines and the classifier"),
    epochs: int = typer.Option(12, help="training epochs of the adapter"),
    views: int = typer.Option(2, help="augmented views of each training picture"),
    seeds: int = typer.Option(3, help="random support sets"),
) -> None:
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    clip = load_clip("demo")
    test, _ = held_out()

    console.rule("1. train an adapter on drawings of 1,000 concepts", align="left")
    trained, seconds = train(clip, out / "adapter.safetensors", epochs, views)
    console.print(f"  {epochs} epochs in {seconds:.0f} s on {os.cpu_count()} cores; the shipped adapter trained longer")

    console.rule("2. fuse it into the encoder: one pass gives both embeddings", align="left")
    manifest = write_engine(source_of(clip, trained), out / "engine", "onnxruntime", "fp32", pictures=test.images[:32])
    write_engine(source_of(clip, load_adapter(DEMO_ADAPTER)), out / "engine-shipped", "onnxruntime", "fp32")
    console.print(f"  built in {manifest['build_seconds']:.1f} s and checked against PyTorch")

    console.rule("3. does it separate classes? Pairs of pictures of other concepts, by cosine", align="left")
    ours = encode(open_engine(out / "engine").encode, clip, test)
    shipped = encode(open_engine(out / "engine-shipped").encode, clip, test, ours.text)
    embeddings = {"plain": ours.embeddings.plain, "adapted": ours.embeddings.adapted}
    embeddings["adapted, shipped"] = shipped.embeddings.adapted
    overlap = {name: overlap_area(*pair_cosines(rows, test.concepts)) for name, rows in embeddings.items()}
    areas = "; ".join(f"{name} {area:.3f}" for name, area in overlap.items())
    console.print(f"  overlap of pairs of one concept and of two (0: none): {areas}", soft_wrap=True)

    results: dict[str, dict[int, Result]] = {}
    for name, encoded, pair in (
        ("class names alone (zero-shot)", ours, ("zero-shot", "none")),
        ("Tip-Adapter, plain embeddings", ours, ("tip-adapter", "none")),
        ("Tip-Adapter, adapted", ours, ("tip-adapter++", "none")),
        ("Tip-Adapter, adapted, shipped", shipped, ("tip-adapter++", "none")),
        ("auto, the default, shipped", shipped, ("auto", "auto")),
    ):
        compared = compare(encoded_source(encoded, SHOTS, range(seeds)), [pair])
        results[name] = {result.shots: result for result in compared.results}
    draw = results["auto, the default, shipped"][1].draws[0]
    console.rule(f"4. the hard task: {draw.classes} concepts that neither CLIP nor adapter saw", align="left")
    console.print(f"  from 1, 2 or 4 drawings of each; {draw.images} other drawings; chance is {1 / draw.classes:.1%}")
    show_accuracy(results)

    console.rule(f"5. the usual task: {CLASSES} classes, from {PICTURES} drawings of each", align="left")
    ten = ten_classes(out / "engine", out / "adapter.safetensors", test, out)

    accuracy = {name: {shots: [row[shots].mean, row[shots].spread] for shots in SHOTS} for name, row in results.items()}
    report = {"overlap": overlap, "accuracy": accuracy, "seeds": seeds, "queries": draw.images, "ten_classes": ten}
    report |= {"train_seconds": seconds, "total_seconds": time.perf_counter() - started}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.rule(f"done in {report['total_seconds']:.0f} s", align="left")
    files = ("report.json", "adapter.safetensors", "engine", "classifier", "classifier.onnx", "pictures")
    console.print(f"  in {out}: {', '.join(files)}", soft_wrap=True)  # a wrapped path can't be copied
    command = os.path.relpath(Path(sys.executable).with_name("iosr-fast"))
    console.print(f"try it: {command} classify {out / 'classifier'} {out / 'pictures'}", soft_wrap=True)


if __name__ == "__main__":
    run(main)
