"""The command `iosr-fast benchmark`."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from iosr_fast.utils.command import new_app, new_file

benchmark = new_app(
    "iosr-fast",
    no_args_is_help=True,
    help="""Time each part of the package, its rivals, and the limits of this machine.

    A result is verified before it is timed.""",
)
ON_GPU = "On an NVIDIA GPU"

Json = Annotated[Path | None, typer.Option("--json", callback=new_file, help="Write the rows here, as JSON.")]
Csv = Annotated[Path | None, typer.Option("--csv", callback=new_file, help="Write the rows here, as CSV.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of NumPy and PyTorch [default: all].")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed calls of each implementation, interleaved.")]
Quick = Annotated[bool, typer.Option("--quick", help="Run small cases only.")]
Model = Annotated[str, typer.Option(help="Name of an open_clip ViT, or demo.")]
Models = Annotated[list[str], typer.Option("--model", help="Name of an open_clip ViT, or demo. Repeatable.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or rehearsal: the GPU code on the CPU.")]
FirstBlock = Annotated[int, typer.Option(min=0, help="First block with an adapter.")]
FirstBlocks = Annotated[
    list[int] | None,
    typer.Option("--first-adapted-block", min=0, help="First block with an adapter. Repeatable."),
]


def number(default: int | None, help: str, name: str | None = None) -> tuple[Any, Any]:
    names = [] if name is None else [name]
    return Annotated[int if default else int | None, typer.Option(*names, min=1, help=help)], default


def cases(help: str) -> tuple[Any, Any]:
    return Annotated[list[str] | None, typer.Option(help=f"{help}. Repeatable.")], None


def timing(repeats: int) -> dict[str, tuple[Any, Any]]:
    return {"threads": (Threads, None), "repeats": (Repeats, repeats)}


class Bench(NamedTuple):
    """A command that calls `run` of benchmarks/NAME.py, once a model where it takes --model, and reports the rows.

    `options`: by parameter of `run`, annotation and default; those that are None are left out. Each bench takes --json
    and --csv, too. `smoke` has the options of a smoke run.
    """

    help: str
    smoke: str
    options: dict[str, tuple[Any, Any]]


# The benches of `all`, in this order. Each runs in its own process, so that none inherits another's threads and memory.
BENCHES = {
    "encoder": Bench(
        "Both embeddings of a batch: in one fused pass, and in two passes by other compilers.",
        "--model demo --batch 2 --repeats 1",
        {
            "models": (Models, ["ViT-B-16", "ViT-B-32", "demo"]),
            "batch": number(None, "Images of a call [default: 8; demo 64]."),
            "first_adapted_blocks": (FirstBlocks, None),
            **timing(5),
            "device": (Device, "cpu"),
            "compiled": (Annotated[bool, typer.Option("--compiled", help="On a GPU: by torch.compile.")], False),
        },
    ),
    "precision": Bench(
        "The encoder in fewer bits: speed, distance to the embeddings in fp32, accuracy on the demo.",
        "--model demo --repeats 1",
        {
            "models": (
                Annotated[
                    list[str],
                    typer.Option(
                        "--model",
                        help="Name of an open_clip ViT, or demo; with -hard behind it, with outliers in its weights. "
                        "Repeatable.",
                    ),
                ],
                ["demo", "demo-hard", "ViT-B-16", "ViT-B-16-hard"],
            ),
            **timing(7),
        },
    ),
    "pipeline": Bench(
        "JPEG files to labels: predict_folder, the encoder alone, and a plain script.",
        "--model demo --first-adapted-block 3 --pictures 16 --repeats 1",
        {
            "model": (Model, "ViT-B-32"),
            "pictures": number(500, "JPEG files."),
            "first_adapted_block": (FirstBlock, 8),
            **timing(3),
        },
    ),
    "fit": Bench(
        "JPEG files to a fitted classifier: its parts, encoding alone, and logistic regression on open_clip.",
        "--model demo --pictures 24 --classes 4",
        {
            "model": (Model, "ViT-B-32"),
            "pictures": number(800, "JPEG files."),
            "classes": number(100, "Classes, with as many pictures each."),
            **timing(1),
        },
    ),
    "classifier": Bench(
        "Images to labels, one at a time and in batches, against two passes.",
        "--repeats 1",
        timing(7),
    ),
    "cold-start": Bench(
        "The start of a process to its first label.",
        "--model demo --repeats 1",
        {"models": (Models, ["demo", "ViT-B-16"]), "repeats": (Repeats, 5)},
    ),
    "score": Bench(
        "Embeddings to logits: each implementation, the papers' formula, and PyTorch.",
        "--cases q1-k1600-d512-c100 --cases q8-k1600-d512-c100 --repeats 1",
        {
            "cases": cases("For example q256-k16000-d512-c1000: queries, keys, channels, classes"),
            **timing(7),
            "device": (Device, "cpu"),
        },
    ),
    "scaling": Bench(
        "How times grow with batches, classes, keys and queries.",
        "--quick --repeats 1",
        {**timing(5), "quick": (Quick, False)},
    ),
    "search": Bench(
        "The choice of a method's parameters: the exact search, and the grid of the papers' code.",
        "--cases tip-adapter-v60-c6-s3-d24 --repeats 1",
        {
            "cases": cases(
                "tip-adapter, tip-x or tip-x-v2500-c100-s16-d512: validation images, classes, shots, channels"
            ),
            **timing(3),
        },
    ),
    "train": Bench(
        "Training of an adapter: ours, and the recipe of the papers' code.",
        "--model demo --first-adapted-block 3 --batch 4 --pictures 8 --repeats 1",
        {
            "model": (Model, "ViT-B-16"),
            "batch": number(16, "Images of a step."),
            "first_adapted_block": (FirstBlock, 8),
            "count": number(48, "Images of an epoch.", "--pictures"),
            **timing(3),
        },
    ),
    "updates": Bench(
        "Changes of a running classifier, against fitting it again.",
        "--cases tip-adapter++-k1000-c100-d512 --repeats 1",
        {
            "cases": cases("For example tip-adapter++-k100000-c100-d512: method, keys, classes, channels"),
            **timing(7),
        },
    ),
}


def limit_blas(threads: int) -> None:
    """Before NumPy's first import, because BLAS reads its threads when it is loaded; our kernels read theirs later."""
    if "numpy" in sys.modules:
        raise RuntimeError("expected to set the threads of BLAS before NumPy is imported, which it is already")
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["IOSR_FAST_THREADS"] = str(threads)


def add_command(name: str, bench: Bench) -> None:
    def command(json_path: Path | None, csv_path: Path | None, **options: Any) -> None:
        options = {option: value for option, value in options.items() if value is not None}
        if "threads" in options:
            limit_blas(options["threads"])
        on_gpu = name == "encoder" and options["device"] != "cpu"
        module = importlib.import_module(f"iosr_fast.benchmarks.{'encoder_gpu' if on_gpu else name.replace('-', '_')}")
        from iosr_fast.benchmarks import harness
        from iosr_fast.utils.provenance import write_rows

        taken = inspect.signature(module.run).parameters  # encoder and encoder_gpu share a command
        arguments = {option: value for option, value in options.items() if option in taken}
        models = [{"model": model} for model in options.get("models", ())] or [{}]
        rows = [row for model in models for row in module.run(**arguments | model)]
        harness.print_rows(rows)
        if json_path is not None:
            write_rows(json_path, rows)
        if csv_path is not None:
            harness.write_csv(csv_path, rows)

    options = {"json_path": (Json, None), "csv_path": (Csv, None), **bench.options}
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for option, (annotation, default) in options.items()
        ]
    )
    command.__annotations__ = {option: annotation for option, (annotation, _) in options.items()}
    benchmark.command(name, help=bench.help)(command)


for _name, _bench in BENCHES.items():
    add_command(_name, _bench)


@benchmark.command(rich_help_panel=ON_GPU)
def parity(
    json_path: Json = None,
    device: Device = "cuda",
    shapes: Annotated[
        list[str] | None, typer.Option(help="Score this shape only, without encoders. Repeatable.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="Score keys of this precision only, by Triton.")] = None,
    part: Annotated[list[str], typer.Option(help="scoring or encoder. Repeatable.")] = ["scoring", "encoder"],
) -> None:
    """Print the errors of the encoder and the scoring kernels; exit code 1 if one is too large."""
    from iosr_fast.benchmarks import gpu
    from iosr_fast.benchmarks import parity as check

    def save(result: dict[str, Any]) -> None:
        if json_path is not None:
            gpu.write_whole(json_path, result)

    result = check.run(device, save, shapes or (), precision, part)  # type: ignore[arg-type]
    if not all(line["right"] for lines in result["tables"].values() for line in lines):
        raise typer.Exit(1)


@benchmark.command(rich_help_panel=ON_GPU)
def machine(json_path: Json = None, device: Device = "cuda") -> None:
    """Print the GPU, its driver, the host, and packages that are missing."""
    from iosr_fast.benchmarks import gpu

    facts = gpu.machine(device)
    typer.echo(facts)
    if json_path is not None:
        gpu.write_whole(json_path, facts)


@benchmark.command(rich_help_panel=ON_GPU)
def gpu(
    out: Annotated[Path, typer.Option(help="Folder for gpu-check-GPU.json.")],
    only: Annotated[list[str] | None, typer.Option(help="Run this part only. Repeatable.")] = None,
    rehearsal: Annotated[bool, typer.Option("--rehearsal", help="Run tiny shapes on the CPU.")] = False,
    call: Annotated[str, typer.Option(help="parity, tuning or tables.")] = "parity",
) -> None:
    """In a source tree: parity and tests, launch configurations, or timings; at most 8 minutes, one JSON file."""
    from iosr_fast.benchmarks import gpu as check

    check.run(out, rehearsal, only or (), call=call)


@benchmark.command(rich_help_panel=ON_GPU)
def gpu_bundle(
    version: Annotated[str, typer.Option("--python-version", help="Version of the GPU machine's Python.")] = "3.12",
    python: Annotated[str | None, typer.Option(help="Interpreter of that version, to build the modules.")] = None,
    architectures: Annotated[str, typer.Option(help="CMAKE_CUDA_ARCHITECTURES of the CUDA module.")] = "80-real;90",
) -> None:
    """In a source tree: collect what a GPU machine without a network needs in build/gpu-bundle."""
    from iosr_fast.benchmarks import gpu_bundle as bundle
    from iosr_fast.benchmarks.gpu_parts import ROOT

    typer.echo(f"wrote {bundle.make(ROOT, version, python, architectures)}")


@benchmark.command("all")
def run_all(
    out: Annotated[Path, typer.Option(help="Folder for cpu-BENCH.json and cpu-BENCH.csv.")],
    only: Annotated[list[str] | None, typer.Option(help="Run this benchmark only. Repeatable.")] = None,
    quick: Quick = False,
) -> None:
    """Run all of the above but those on a GPU, each in its own process.

    If one fails, its old rows stay and the others run.
    """
    if unknown := sorted(set(only or ()) - set(BENCHES)):
        raise typer.BadParameter(f"expected --only of {', '.join(BENCHES)}, got {', '.join(unknown)}")
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in [bench for bench in BENCHES if not only or bench in only]:
        typer.echo(f"== {name}", err=True)
        arguments = ["--json", str(out / f"cpu-{name}.json"), "--csv", str(out / f"cpu-{name}.csv")]
        arguments += BENCHES[name].smoke.split() if quick else []
        if subprocess.run([sys.executable, "-m", "iosr_fast", "benchmark", name, *arguments], check=False).returncode:
            failed.append(name)
    if failed:
        typer.echo(f"failed: {', '.join(failed)}", err=True)
        raise typer.Exit(1)
