"""The adapter's first block and width: accuracy, overlap and the encoder's cost for each choice.

The choice is made on the validation concepts; the test concepts are only reported. Parameters on both come from
leave-one-out on support sets.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from iosr_fast.benchmarks import harness
from iosr_fast.benchmarks.encoder import fused_flops
from iosr_fast.clip.adapter import Adapter, check_belongs, init_adapter, load_adapter, save_adapter
from iosr_fast.clip.demo.pictures import POOL, Pictures, held_out
from iosr_fast.clip.fuse import build_dual_encoder
from iosr_fast.clip.load import LoadedClip, load_clip
from iosr_fast.clip.prompts import embed_classes
from iosr_fast.encoders.encoder import Encoder
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.evaluation.accuracy import evaluate
from iosr_fast.evaluation.demo import encode
from iosr_fast.evaluation.overlap import overlap_rows
from iosr_fast.evaluation.table import OVERLAP, percent, print_table
from iosr_fast.evaluation.tasks import Encoded, Source
from iosr_fast.exceptions import IosrFastError
from iosr_fast.export.export import write_engine
from iosr_fast.training.data import demo_pictures
from iosr_fast.training.train import train_adapter
from iosr_fast.training.train_config import TrainConfig
from iosr_fast.utils.machine import usable_threads

METHODS = ("tip-adapter++", "proker++")
SCALE = 0.1
BATCH = 64
VALIDATION_SHOTS = 2
MAX_COST = 1.35
Report = Callable[[str], None]


def get_adapter(clip: LoadedClip, start: int, width: int, folder: Path, epochs: int, report: Report) -> Adapter:
    """The file s{start}-b{width}.safetensors in `folder`, trained there if it is missing (as train_adapter.py does).

    Raises ValueError for a file of another CLIP, start block, width or number of epochs.
    """
    path = folder / f"s{start}-b{width}.safetensors"
    if not path.is_file():
        report(f"{path.stem}: training for {epochs} epochs")
        adapter = init_adapter(clip, start, width, SCALE)
        config = TrainConfig(epochs=epochs, schedule="cosine", augment=True, cached_views=4)
        folder.mkdir(parents=True, exist_ok=True)
        training = path.with_name(path.name + ".training")
        save_adapter(train_adapter(clip, adapter, demo_pictures(clip.geometry), config, training), path)
        shutil.rmtree(training)
    adapter = load_adapter(path)
    check_belongs(adapter, clip)
    written = adapter.config
    actual = (written.first_adapted_block, written.bottleneck, written.training.get("epochs"))
    if actual != (start, width, epochs):
        raise IosrFastError(
            f"expected an adapter from block {start} on, {width} wide, of {epochs} epochs in {path}, got {actual[0]}, "
            f"{actual[1]}, {actual[2]}; name another folder, or give --epochs {actual[2]}"
        )
    return adapter


def sweep(
    clip: LoadedClip,
    adapters: Mapping[str, Adapter],
    test: Pictures,
    validation: Pictures,
    shots: Sequence[int],
    seeds: Sequence[int],
    repeats: int,
    report: Report,
) -> list[dict[str, Any]]:
    """A row for the plain encoder and one for each adapter, JSON-ready."""
    texts = [embed_classes(clip, pictures.names) for pictures in (test, validation)]
    rows, encoders, flops = [], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, adapter in {"plain": None, **adapters}.items():
            engine = Path(folder) / name
            write_engine(clip, adapter, engine, "onnxruntime", max_batch=BATCH)
            encoders[name] = encoder = open_engine(engine)
            flops[name] = fused_flops(build_dual_encoder(clip, adapter).shapes, BATCH)
            in_test, in_validation = (
                encode(encoder.encode, clip, pictures, text)
                for pictures, text in zip((test, validation), texts, strict=True)
            )
            rows.append(_row(adapter, in_test, in_validation, shots, seeds))
            cells = [f"{method} {_cell(_on_validation(rows[-1], method))} on validation" for method in METHODS]
            report(f"{name}: {', '.join(cells)}")
        costs = measure_cost(encoders, test.images[:BATCH], repeats)
    for row, name in zip(rows, encoders, strict=True):
        row |= {**costs[name], "cost_arithmetic": flops[name] / flops["plain"]}
    return rows


def _row(
    adapter: Adapter | None, test: Encoded, validation: Encoded, shots: Sequence[int], seeds: Sequence[int]
) -> dict[str, Any]:
    images = test.embeddings.plain if adapter is None else test.embeddings.adapted
    overlap = overlap_rows("demo", {"images": np.asarray(images)}, test.labels)[0]
    methods = [name.removesuffix("++") if adapter is None else name for name in METHODS]
    return {
        "bench": "block-sweep",
        "first_adapted_block": None if adapter is None else adapter.config.first_adapted_block,
        "bottleneck": None if adapter is None else adapter.config.bottleneck,
        "epochs": None if adapter is None else adapter.config.training.get("epochs"),
        "validation_accuracy": _accuracy(
            "validation", validation, VALIDATION_SHOTS, [VALIDATION_SHOTS], seeds, methods
        ),
        "test_accuracy": _accuracy("test", test, POOL, shots, seeds, methods),
        "tuned_on": "loo",
        **{name: overlap[name] for name in OVERLAP},
    }


def _accuracy(
    name: str, encoded: Encoded, pool: int, shots: Sequence[int], seeds: Sequence[int], methods: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """By method and shots; the names are the same with and without an adapter."""
    draw = partial(encoded.task, pool=pool)
    source = Source(name, tuple(shots), tuple(seeds), draw, encoded.embeddings, encoded.labels)
    cells: dict[str, dict[str, Any]] = {method: {} for method in METHODS}
    for result in evaluate(source, [(method, "none") for method in methods], "loo"):
        row = result.row()
        fields = ("method", "mean", "std", "se", "accuracies", "test_images", "classes", "seeds", "parameters")
        of_method = cells[result.method if result.method in cells else f"{result.method}++"]
        of_method[str(result.shots)] = {key: row[key] for key in fields}
    return cells


def measure_cost(encoders: Mapping[str, Encoder], pixels: np.ndarray, repeats: int) -> dict[str, dict[str, Any]]:
    """Milliseconds an image, and the cost relative to the plain pass that was timed in the same round."""
    runs = {name: (lambda encoder=encoder: encoder.encode(pixels)) for name, encoder in encoders.items()}
    times = {name: np.array(measured) / len(pixels) for name, measured in harness.measure(runs, repeats).items()}
    costs: dict[str, dict[str, Any]] = {}
    for name, measured in times.items():
        costs[name] = {"batch": len(pixels), "threads": usable_threads()}
        for key, values in (("ms_per_image", measured), ("cost", measured / times["plain"])):
            costs[name][key] = round(float(np.median(values)), 4)
            costs[name][f"{key}_spread"] = [round(float(np.percentile(values, q)), 4) for q in (10, 90)]
    return costs


def best(rows: Sequence[Mapping[str, Any]], method: str, max_cost: float = float("inf")) -> Mapping[str, Any] | None:
    """The adapter of the highest validation accuracy within a cost, of equals the cheaper one; None if none is."""
    within = [row for row in rows if row["first_adapted_block"] is not None and row["cost"] <= max_cost]
    return max(within, key=lambda row: (_on_validation(row, method)["mean"], -row["cost"]), default=None)


def _on_validation(row: Mapping[str, Any], method: str) -> Any:
    return row["validation_accuracy"][method][str(VALIDATION_SHOTS)]


def _cell(cell: Mapping[str, Any]) -> str:
    return percent(cell["mean"], cell["se"] if cell["std"] is None else cell["std"])


def print_sweep(out: Console, rows: Sequence[Mapping[str, Any]], shots: Sequence[int]) -> None:
    """The map, and the choices on validation."""
    cell = rows[0]["test_accuracy"][METHODS[0]][str(shots[0])]
    out.print(
        f"demo, a row an adapter: accuracy in % (± {'se' if cell['std'] is None else 'std over'} {len(cell['seeds'])} "
        f"seeds) on validation and on test concepts ({cell['classes'][0]}), overlap on the test concepts' pictures; "
        f"cost in plain passes, measured in batches of {rows[0]['batch']} and by arithmetic; 'plain' has no adapter "
        "and is scored by the methods without ++",
        soft_wrap=True,
    )
    heads = ["from\nblock", "width", "cost", "by arith-\nmetic", "overlap\narea", "AUROC"]
    for method in METHODS:
        heads += [f"{method}\nvalidation, {VALIDATION_SHOTS}", *(f"\ntest, {k}" for k in shots)]
    lines = []
    for row in rows:
        plain = row["first_adapted_block"] is None
        line = ["plain", ""] if plain else [str(row["first_adapted_block"]), str(row["bottleneck"])]
        line += [f"{row[name]:.2f}" for name in ("cost", "cost_arithmetic")]
        line += [f"{row[name]:.3f}" for name in ("overlap_area", "auroc")]
        for method in METHODS:
            cells = [_on_validation(row, method), *(row["test_accuracy"][method][str(k)] for k in shots)]
            line += map(_cell, cells)
        lines.append(line)
    print_table(out, heads, lines, left=2)
    for method in METHODS:
        for limit, max_cost in ((f"within {MAX_COST} plain passes", MAX_COST), ("at any cost", float("inf"))):
            chosen = best(rows, method, max_cost)
            choice = "none"
            if chosen is not None:
                accuracy = f"{_cell(_on_validation(chosen, method))} at {chosen['cost']:.2f} passes"
                choice = f"block {chosen['first_adapted_block']}, width {chosen['bottleneck']}: {accuracy}"
            out.print(f"  best on validation, {method}, {limit}: {choice}")


def run(
    starts: Sequence[int],
    widths: Sequence[int],
    folder: Path,
    epochs: int,
    shots: Sequence[int],
    seeds: Sequence[int],
    repeats: int,
    report: Report,
) -> list[dict[str, Any]]:
    """The sweep on the demo's CLIP and held-out concepts."""
    clip = load_clip("demo")
    adapters = {
        f"s{start}-b{width}": get_adapter(clip, start, width, folder, epochs, report)
        for width in widths
        for start in starts
    }
    return sweep(clip, adapters, *held_out(), shots, seeds, repeats, report)
