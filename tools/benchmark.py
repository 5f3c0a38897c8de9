"""Verify, then time, then compare with rivals and with the machine's GEMM rate."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.source_tree import use_source_tree

use_source_tree()

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

Json = Annotated[Path | None, typer.Option("--json", help="Write the rows here, as JSON.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads of NumPy and PyTorch; all that may be used where left out.")
]
Repeats = Annotated[int, typer.Option(min=1, help="Timed calls of each implementation, interleaved.")]


def limit_blas(threads: int | None) -> None:
    """Before NumPy's first import, because BLAS reads its threads when it is loaded; our kernels read theirs later."""
    if threads is None:
        return
    if "numpy" in sys.modules:
        raise RuntimeError("expected to set the threads of BLAS before NumPy is imported, which it is already")
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["IOSR_FAST_THREADS"] = str(threads)


def report(made: list[dict[str, Any]], json_path: Path | None) -> None:
    from tools.bench import harness

    harness.print_rows(made)
    if json_path is not None:
        harness.write_json(json_path, made)


@app.command()
def score(
    json_path: Json = None,
    cases: Annotated[
        list[str] | None,
        typer.Option(help="Like q256-k16000-d512-c1000: queries, keys, channels, classes. Repeatable."),
    ] = None,
    threads: Threads = None,
    repeats: Repeats = 7,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Execute scoring plans: our implementations, the papers' formula, the best of eager PyTorch."""
    limit_blas(threads)
    from tools.bench import score as bench

    report(bench.run(cases or bench.DEFAULT_CASES, threads=threads, repeats=repeats, device=device), json_path)


@app.command()
def encoder(
    json_path: Json = None,
    model: Annotated[str, typer.Option(help="An open_clip ViT.")] = "ViT-B-16",
    batch: Annotated[int, typer.Option(min=1, help="Images a call.")] = 8,
    first_adapted_block: Annotated[int, typer.Option(min=0, help="The first block that holds an adapter.")] = 8,
    threads: Threads = None,
    repeats: Repeats = 7,
) -> None:
    """Both embeddings of a batch: fused in one pass, and in two passes as the papers' code takes them."""
    limit_blas(threads)
    from tools.bench import encoder as bench

    made = bench.run(
        model=model, batch=batch, first_adapted_block=first_adapted_block, threads=threads, repeats=repeats
    )
    report(made, json_path)


@app.command()
def search(
    json_path: Json = None,
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

    report(bench.run(cases or bench.DEFAULT_CASES, threads=threads, repeats=repeats), json_path)


@app.command()
def train(
    json_path: Json = None,
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

    report(bench.run(model, batch, first_adapted_block, pictures, threads, repeats), json_path)


@app.command()
def updates(
    json_path: Json = None,
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

    report(bench.run(cases or bench.DEFAULT_CASES, threads=threads, repeats=repeats), json_path)


if __name__ == "__main__":
    app()
