"""Verify, then time, then compare with rivals and with what the machine can do at best.

python tools/benchmark.py all --out benchmarks/results     # then python tools/report.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from iosr_fast.utils.command import new_app, new_file
from tools.source_tree import use_source_tree

use_source_tree()  # make gpu-check runs where nothing is installed
app = new_app(no_args_is_help=True, help=__doc__)

# The benches of `all`, in this order, each with the options of a smoke run. Each runs in its own process, so that none
# inherits another's threads and memory.
BENCHES = {
    "encoder": "--model demo --batch 2 --repeats 1",
    "precision": "--model demo --repeats 1",
    "pipeline": "--model demo --first-adapted-block 3 --pictures 16 --repeats 1",
    "classifier": "--repeats 1",
    "cold-start": "--model demo --repeats 1",
    "score": "--cases q1-k1600-d512-c100 --cases q8-k1600-d512-c100 --repeats 1",
    "scaling": "--quick --repeats 1",
    "search": "--cases tip-adapter-v60-c6-s3-d24 --repeats 1",
    "train": "--model demo --first-adapted-block 3 --batch 4 --pictures 8 --repeats 1",
    "updates": "--cases tip-adapter++-k1000-c100-d512 --repeats 1",
}

Json = Annotated[Path | None, typer.Option("--json", callback=new_file, help="Write the rows here, as JSON.")]
Csv = Annotated[Path | None, typer.Option("--csv", callback=new_file, help="Write the rows here, as CSV.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads of NumPy and PyTorch; all that may be used where left out.")
]
Repeats = Annotated[int, typer.Option(min=1, help="Timed calls of each implementation, interleaved.")]
Quick = Annotated[bool, typer.Option("--quick", help="Small cases only, to see that everything runs.")]
Models = Annotated[list[str] | None, typer.Option("--model", help="An open_clip ViT, or demo. Repeatable.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or rehearsal: the code for GPUs on the CPU.")]


def limit_blas(threads: int | None) -> None:
    """Before NumPy's first import, because BLAS reads its threads when it is loaded; our kernels read theirs later."""
    if threads is None:
        return
    if "numpy" in sys.modules:
        raise RuntimeError("expected to set the threads of BLAS before NumPy is imported, which it is already")
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["IOSR_FAST_THREADS"] = str(threads)


def report(rows: list[dict[str, Any]], json_path: Path | None, csv_path: Path | None) -> None:
    from tools.bench import harness

    harness.print_rows(rows)
    if json_path is not None:
        harness.write_json(json_path, rows)
    if csv_path is not None:
        harness.write_csv(csv_path, rows)


@app.command()
def score(
    json_path: Json = None,
    csv_path: Csv = None,
    cases: Annotated[
        list[str] | None,
        typer.Option(help="Like q256-k16000-d512-c1000: queries, keys, channels, classes. Repeatable."),
    ] = None,
    threads: Threads = None,
    repeats: Repeats = 7,
    device: Device = "cpu",
) -> None:
    """Execute scoring plans: our implementations, the papers' formula, the best of eager PyTorch."""
    limit_blas(threads)
    from tools.bench import score as bench

    report(bench.run(cases, threads=threads, repeats=repeats, device=device), json_path, csv_path)


@app.command()
def encoder(
    json_path: Json = None,
    csv_path: Csv = None,
    models: Models = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images a call; 8, and 64 for the demo.")] = None,
    first_adapted_block: Annotated[
        list[int] | None, typer.Option(min=0, help="Of ours: the first block that holds an adapter. Repeatable.")
    ] = None,
    threads: Threads = None,
    repeats: Repeats = 5,
    device: Device = "cpu",
    compiled: Annotated[bool, typer.Option("--compiled", help="On a GPU: by torch.compile.")] = False,
) -> None:
    """Both embeddings of a batch: fused in one pass, and in two passes by all that compiles them."""
    limit_blas(threads)
    rows: list[dict[str, Any]] = []
    for model in models or ["ViT-B-16", "ViT-B-32", "demo"]:
        if device == "cpu":
            from tools.bench import encoder as bench

            size = batch or (64 if model == "demo" else 8)
            rows += bench.run(model, size, first_adapted_block, threads=threads, repeats=repeats)
        else:
            from tools.bench import encoder_gpu

            rows += encoder_gpu.run(model, batch or 256, repeats, device, compiled)
    report(rows, json_path, csv_path)


@app.command()
def precision(
    json_path: Json = None, csv_path: Csv = None, models: Models = None, threads: Threads = None, repeats: Repeats = 7
) -> None:
    """The encoder in fewer bits: its speed, how far its embeddings are from fp32's, the demo's accuracy."""
    limit_blas(threads)
    from tools.bench import precision as bench

    rows = bench.run(tuple(models or ("demo", "ViT-B-16")), threads=threads, repeats=repeats)
    report(rows, json_path, csv_path)


@app.command()
def pipeline(
    json_path: Json = None,
    csv_path: Csv = None,
    model: Annotated[str, typer.Option(help="An open_clip ViT, or demo.")] = "ViT-B-32",
    pictures: Annotated[int, typer.Option(min=1, help="JPEG files.")] = 500,
    first_adapted_block: Annotated[int, typer.Option(min=0, help="The first block that holds an adapter.")] = 8,
    threads: Threads = None,
    repeats: Repeats = 3,
) -> None:
    """JPEG files to labels: predict_folder, the encoder alone, and the script that anyone would write."""
    limit_blas(threads)
    from tools.bench import pipeline as bench

    rows = bench.run(model, pictures, first_adapted_block, threads=threads, repeats=repeats)
    report(rows, json_path, csv_path)


@app.command()
def classifier(json_path: Json = None, csv_path: Csv = None, threads: Threads = None, repeats: Repeats = 7) -> None:
    """The demo's classifier, pictures to labels, one at a time and in batches, against two passes."""
    limit_blas(threads)
    from tools.bench import classifier as bench

    report(bench.run(threads=threads, repeats=repeats), json_path, csv_path)


@app.command("cold-start")
def cold_start(json_path: Json = None, csv_path: Csv = None, models: Models = None, repeats: Repeats = 5) -> None:
    """From nothing to the first label, in a new process each time."""
    from tools.bench import cold_start as bench

    report(bench.run(tuple(models or ("demo", "ViT-B-16")), repeats=repeats), json_path, csv_path)


@app.command()
def scaling(
    json_path: Json = None,
    csv_path: Csv = None,
    threads: Threads = None,
    repeats: Repeats = 5,
    quick: Quick = False,
) -> None:
    """How time grows with batches, classes, keys and queries."""
    limit_blas(threads)
    from tools.bench import scaling as bench

    report(bench.run(threads, repeats, bench.QUICK if quick else bench.SIZES), json_path, csv_path)


@app.command()
def search(
    json_path: Json = None,
    csv_path: Csv = None,
    cases: Annotated[
        list[str] | None,
        typer.Option(
            help="tip-adapter, tip-x, or like tip-x-v2500-c100-s16-d512: validation images, classes, shots, channels. "
            "Repeatable."
        ),
    ] = None,
    threads: Threads = None,
    repeats: Repeats = 3,
) -> None:
    """Choose a method's parameters on a validation set: the exact search, and the grid of the public code."""
    limit_blas(threads)
    from tools.bench import search as bench

    report(bench.run(cases or bench.DEFAULT_CASES, threads=threads, repeats=repeats), json_path, csv_path)


@app.command()
def train(
    json_path: Json = None,
    csv_path: Csv = None,
    model: Annotated[str, typer.Option(help="An open_clip ViT, or demo.")] = "ViT-B-16",
    batch: Annotated[int, typer.Option(min=1, help="Pictures a step.")] = 16,
    first_adapted_block: Annotated[int, typer.Option(min=0, help="The first block that holds an adapter.")] = 8,
    pictures: Annotated[int, typer.Option(min=1, help="Pictures an epoch.")] = 48,
    threads: Threads = None,
    repeats: Repeats = 3,
) -> None:
    """Train an adapter, first epoch and later ones: ours, and the recipe of the papers' public code."""
    limit_blas(threads)
    from tools.bench import train as bench

    report(bench.run(model, batch, first_adapted_block, pictures, threads, repeats), json_path, csv_path)


@app.command()
def updates(
    json_path: Json = None,
    csv_path: Csv = None,
    cases: Annotated[
        list[str] | None,
        typer.Option(help="Like tip-adapter++-k100000-c100-d512: method, keys, classes, channels. Repeatable."),
    ] = None,
    threads: Threads = None,
    repeats: Repeats = 7,
) -> None:
    """Change a running classifier: an example or a class more or less, against fitting it again."""
    limit_blas(threads)
    from tools.bench import updates as bench

    report(bench.run(cases or bench.DEFAULT_CASES, threads=threads, repeats=repeats), json_path, csv_path)


@app.command()
def parity(json_path: Json = None, device: Device = "cuda") -> None:
    """Errors of the encoder and the scoring kernels on a GPU, as a table; code 1 if one is too large."""
    from tools.bench import gpu
    from tools.bench import parity as check

    result = check.run(device, lambda result: None if json_path is None else gpu.write_whole(json_path, result))
    if not all(line["right"] for lines in result["tables"].values() for line in lines):
        raise typer.Exit(1)


@app.command()
def machine(json_path: Json = None, device: Device = "cuda") -> None:
    """The GPU, its driver, the host and what is not installed."""
    from tools.bench import gpu

    facts = gpu.machine(device)
    typer.echo(facts)
    if json_path is not None:
        gpu.write_whole(json_path, facts)


@app.command()
def gpu(
    out: Annotated[Path, typer.Option(help="The folder for gpu-check-GPU.json.")],
    only: Annotated[list[str] | None, typer.Option(help="A part of it, like score-q1-k1600-d512-c100.")] = None,
    rehearsal: Annotated[bool, typer.Option("--rehearsal", help="Tiny shapes on the CPU.")] = False,
) -> None:
    """Everything that needs a GPU, in less than 8 minutes: build, parity, benches, tests. One JSON file."""
    from tools.bench import gpu as check

    check.run(out, rehearsal, only or ())


@app.command("all")
def run_all(
    out: Annotated[Path, typer.Option(help="The folder for cpu-BENCH.json and cpu-BENCH.csv.")],
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(BENCHES)}. Repeatable.")] = None,
    quick: Quick = False,
) -> None:
    """Every bench in a process of its own. If one fails, its old rows stay and the others run."""
    if unknown := sorted(set(only or ()) - set(BENCHES)):
        raise typer.BadParameter(f"expected --only of {', '.join(BENCHES)}, got {', '.join(unknown)}")
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in [bench for bench in BENCHES if not only or bench in only]:
        typer.echo(f"== {name}", err=True)
        arguments = ["--json", str(out / f"cpu-{name}.json"), "--csv", str(out / f"cpu-{name}.csv")]
        arguments += BENCHES[name].split() if quick else []
        if subprocess.run([sys.executable, str(Path(__file__).resolve()), name, *arguments], check=False).returncode:
            failed.append(name)
    if failed:
        typer.echo(f"failed: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
