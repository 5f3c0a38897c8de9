"""The whole pipeline on real pictures, in minutes: train an adapter, fuse it, build engines, fit, classify.

python tools/demo/run.py --out build/demo
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from iosr_fast.classifier import Classifier
from iosr_fast.clip.demo.pictures import Pictures
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.utils.command import one_line_errors, run
from iosr_fast.utils.require import require_installed

with one_line_errors():
    require_installed("torch", "cpu")
    from iosr_fast.clip.adapter import Adapter, init_adapter, load_adapter, save_adapter
    from iosr_fast.clip.demo.pictures import POOL, held_out
    from iosr_fast.clip.load import LoadedClip, load_clip
    from iosr_fast.evaluation.accuracy import Result
    from iosr_fast.evaluation.demo import encode, evaluate_few_shot
    from iosr_fast.export.export import write_engine
    from iosr_fast.export.pretrained import DEMO_ADAPTER
    from iosr_fast.training.config import TrainConfig
    from iosr_fast.training.overlap import auroc, overlap_area, pair_cosines
    from iosr_fast.training.pictures import demo_pictures
    from iosr_fast.training.progress import TrainingBar
    from iosr_fast.training.train import train_adapter
    from tools.demo.few_shot import cell, changed_labels

SHOTS = (1, 2, 4)
FIRST_ADAPTED_BLOCK, BOTTLENECK, SCALE = 3, 256, 0.1
console = Console()


def train(clip: LoadedClip, path: Path, epochs: int, views: int) -> tuple[Adapter, float]:
    """Train an adapter on the generic concepts and save it. Returns it and the seconds."""
    adapter = init_adapter(clip, FIRST_ADAPTED_BLOCK, BOTTLENECK, SCALE)
    config = TrainConfig(epochs=epochs, schedule="cosine", augment=True, cached_views=views)
    pictures = demo_pictures(clip.geometry)
    bar = TrainingBar(config, len(pictures.labels))
    with bar:
        train_adapter(clip, adapter, pictures, config, report=bar.step)
    save_adapter(adapter, path)
    return adapter, bar.seconds


def build(clip: LoadedClip, adapter: Adapter, out: Path, images: np.ndarray) -> dict[str, dict[str, Any]]:
    """Build an engine for every runtime that is installed; the others have the reason."""
    engines: dict[str, dict[str, Any]] = {}
    for runtime in ("onnxruntime", "tensorrt_rtx"):
        if importlib.util.find_spec(runtime) is None:
            engines[runtime] = {"skipped": f"the package {runtime} is not installed"}
            console.print(f"  {runtime}: skipped, the package is not installed")
            continue
        manifest = write_engine(clip, adapter, out / f"engine-{runtime}", runtime, "fp32", real_images=images[:32])
        size = sum(entry["bytes"] for entry in manifest["files"].values())
        engines[runtime] = {
            "folder": str(out / f"engine-{runtime}"),
            "bytes": size,
            "build_seconds": manifest["build_seconds"],
            "check": manifest["check"],
        }
        console.print(f"  {runtime}: {size / 1e6:.1f} MB in {manifest['build_seconds']:.1f} s")
    return engines


def measure(classifier: Classifier, images: np.ndarray) -> tuple[float, float]:
    """Median milliseconds from one uint8 picture to its logits, and pictures per second in batches of 64."""
    one, batch = images[:1], images[:64]
    times = {1: [], 64: []}
    for pixels, count in ((one, 30), (batch, 8)):
        classifier.decision_function(pixels)
        for _ in range(count):
            started = time.perf_counter()
            classifier.decision_function(pixels)
            times[len(pixels)].append(time.perf_counter() - started)
    return 1000 * float(np.median(times[1])), 64 / float(np.median(times[64]))


def show_accuracy(results: dict[str, dict[int, Result]]) -> None:
    draw = next(iter(results.values()))[SHOTS[0]].draws[0]
    table = Table(title=f"accuracy in %, {draw.classes} held-out concepts, {draw.images} queries", title_justify="left")
    table.add_column("method")
    for shots in SHOTS:
        table.add_column(f"{shots} shot" + ("s" if shots != 1 else ""), justify="right")
    table.add_column("± is")
    for name, row in results.items():
        draws = len(row[SHOTS[0]].draws)
        cells = (f"{100 * row[shots].mean:.1f} ± {100 * row[shots].spread:.1f}" for shots in SHOTS)
        table.add_row(name, *cells, f"std of {draws} seeds" if draws > 1 else "se of one seed")
    console.print(table)


def fit_and_show(engine: Path, adapter: Path, pictures: Pictures, out: Path) -> Classifier:
    """Fit a Classifier by "auto" on two pictures of each concept, on its fastest engine, save it, and classify a few
    other pictures."""
    rng = np.random.default_rng(0)
    order = [rng.permutation(np.flatnonzero(pictures.concepts == c)) for c in range(len(pictures.names))]
    support = np.concatenate([rows[:2] for rows in order])
    # A style may draw two concepts alike ("detective", "man detective"), which `fit` refuses; omit one of them.
    _, first = np.unique(pictures.images[support].reshape(len(support), -1), axis=0, return_index=True)
    alike = np.setdiff1d(np.arange(len(support)), first)
    support = support[~np.isin(pictures.concepts[support], pictures.concepts[support[alike]])]
    classifier = Classifier("demo", adapter=adapter, engine=engine, precision="auto", views=1)
    names = [pictures.names[c] for c in pictures.concepts[support]]
    classifier.fit(pictures.images[support], names, class_names=list(dict.fromkeys(names)))
    tuned = classifier.tuned_
    assert tuned is not None
    chosen = ", ".join(f"{name} {value:.3g}" for name, value in tuned.parameters.items())
    console.print(
        f"  chosen by leave-one-out in {tuned.seconds:.0f} s: {tuned.method}, reducer {tuned.reducer}, {chosen}; "
        f"{tuned.accuracy:.1%} of {tuned.scored} support pictures right"
    )
    choice = classifier.engine_choice_
    assert choice is not None
    for line in choice.lines():
        console.print(f"  {line}", soft_wrap=True, highlight=False)
    classifier.save(out / "classifier")
    (out / "pictures").mkdir(exist_ok=True)
    for c in rng.choice(len(order), 5, replace=False):
        row = order[c][POOL]
        path = out / "pictures" / f"{pictures.names[c].replace(' ', '-')}.png"
        Image.fromarray(pictures.images[row]).save(path)
        probabilities = classifier.predict_proba(path)[0]
        best = probabilities.argmax()
        mark = "right" if classifier.classes_[best] == pictures.names[c] else "wrong"
        style = pictures.style_names[pictures.styles[row]]
        console.print(f"  {path.name}, drawn by {style}: {classifier.classes_[best]} ({mark})")
    return classifier


def main(
    out: Path = typer.Option(Path("build/demo"), help="the folder for the report, figures, engines and the classifier"),
    epochs: int = typer.Option(12, help="training epochs of the adapter"),
    views: int = typer.Option(4, help="augmented views of each training picture"),
    seeds: int = typer.Option(3, help="random support sets"),
) -> None:
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    clip = load_clip("demo")
    test, _ = held_out()

    console.rule("1. train an adapter on the generic concepts", align="left")
    trained, seconds = train(clip, out / "adapter.safetensors", epochs, views)
    console.print(f"  {epochs} epochs in {seconds:.0f} s on {os.cpu_count()} cores; the shipped one trained longer")

    console.rule("2. fuse it into the encoder and build engines", align="left")
    engines = build(clip, trained, out, test.images)
    write_engine(clip, load_adapter(DEMO_ADAPTER), out / "engine-shipped", "onnxruntime", "fp32")

    console.rule("3. overlap of same-class and different-class cosines, before and after", align="left")
    ours = encode(open_engine(out / "engine-onnxruntime").encode, clip, test)
    shipped = encode(open_engine(out / "engine-shipped").encode, clip, test, ours.text)
    rows = {
        "plain": ours.embeddings.plain,
        "adapted": ours.embeddings.adapted,
        "adapted (shipped)": shipped.embeddings.adapted,
    }
    pairs = {name: pair_cosines(part, test.concepts) for name, part in rows.items()}
    overlap = {name: overlap_area(*pair) for name, pair in pairs.items()}
    for name, pair in pairs.items():
        console.print(f"  {name}: overlap area {overlap[name]:.3f}, AUROC {auroc(*pair):.3f}")

    console.rule("4. classify held-out concepts from a few pictures each", align="left")
    draws = range(seeds)
    results = {
        "zero-shot": evaluate_few_shot(ours, "zero-shot", "none", SHOTS, draws),
        "tip-adapter": evaluate_few_shot(ours, "tip-adapter", "none", SHOTS, draws),
        "tip-adapter, centred": evaluate_few_shot(ours, "tip-adapter", "centre", SHOTS, draws),
        "tip-adapter++": evaluate_few_shot(ours, "tip-adapter++", "none", SHOTS, draws),
        "tip-adapter++ (shipped)": evaluate_few_shot(shipped, "tip-adapter++", "none", SHOTS, draws),
        "auto (shipped)": evaluate_few_shot(shipped, "auto", "auto", SHOTS, draws),
    }
    show_accuracy(results)
    changed = changed_labels(shipped, results["tip-adapter++ (shipped)"])
    shares = ", ".join(f"{name} {part} ({part / whole:.2%})" for name, (part, whole) in changed.items())
    console.print(f"  labels that narrower keys change, of {next(iter(changed.values()))[1]}: {shares}")

    console.rule("5. the classifier a program would use", align="left")
    classifier = fit_and_show(out / "engine-onnxruntime", out / "adapter.safetensors", test, out)
    latency_ms, images_per_s = measure(classifier, test.images)
    console.print(f"  one picture to its label: {latency_ms:.1f} ms; batches of 64: {images_per_s:.0f} pictures/s")

    report = {
        "overlap": overlap,
        "auroc": {name: auroc(*pair) for name, pair in pairs.items()},
        "accuracy": {
            str(shots): {name: cell(by_shots[shots]) for name, by_shots in results.items()} for shots in SHOTS
        },
        "labels_changed_by_narrow_keys": changed,
        "engines": engines,
        "engine_choice": msgspec.to_builtins(classifier.engine_choice_),
        "latency_ms": latency_ms,
        "images_per_s": images_per_s,
        "train_seconds": seconds,
        "total_seconds": time.perf_counter() - started,
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.rule(f"done in {report['total_seconds']:.0f} s; written:", align="left")
    folders = [f"engine-{name}" for name, engine in engines.items() if "folder" in engine]
    files = ("report.json", "adapter.safetensors", "classifier", "pictures", *folders, "engine-shipped")
    for name in files:
        console.print(f"  {out / name}", soft_wrap=True)  # a wrapped path can't be copied
    command = os.path.relpath(Path(sys.executable).with_name("iosr-fast"))
    console.print(f"try it: {command} classify {out / 'classifier'} {out / 'pictures'}", soft_wrap=True)


if __name__ == "__main__":
    run(main)
