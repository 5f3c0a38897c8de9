"""Time a part of iosr_fast against named rivals on this machine. Every result is verified before it is timed.

python tools/benchmark.py encoder      both embeddings of a batch: fused, in fewer bits, and in two passes by others
python tools/benchmark.py score        embeddings to logits: our kernels, the papers' formula, PyTorch
python tools/benchmark.py pipeline     JPEG files to labels
python tools/benchmark.py one-file     a classifier as one ONNX file in other runtimes, beside the library
python tools/benchmark.py fit          Classifier.fit of pictures
python tools/benchmark.py change       changes of a classifier that runs
python tools/benchmark.py cold-start   from a process's start to its first label

python tools/benchmark.py show SUBJECT            the rows of benchmarks/results
python tools/benchmark.py compare COMMIT SUBJECT  this tree beside another commit, in turns
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that `benchmarks` is found from anywhere
import iosr_fast  # noqa: E402
from iosr_fast.cli.command import ListCommand, command_app, new_file  # noqa: E402
from iosr_fast.utils.machine import usable_threads  # noqa: E402

# An installed package contains kernels/; a source tree has it beside iosr_fast/.
iosr_fast.__path__.append(str(ROOT))
WAITS = ("fit", "change", "cold-start")
CPU_ALONE = ("one-file", *WAITS)


def main(
    subject: Annotated[
        Literal["encoder", "score", "pipeline", "one-file", "fit", "change", "cold-start", "show", "compare"],
        typer.Argument(metavar="SUBJECT", help="A subject, show or compare."),
    ],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="...", help="Of show a subject; of compare a commit and a subject.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="open_clip ViT, or demo. Not for score.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Images of a call, several for encoder.")] = None,
    first_adapted_block: Annotated[
        int | None, typer.Option(min=0, help="First block with an adapter, for encoder and pipeline.")
    ] = None,
    case: Annotated[
        list[str] | None, typer.Option(help="For score: queries, keys, channels, classes: q256-k16000-d512-c1000.")
    ] = None,
    pictures: Annotated[int | None, typer.Option(min=2, help="Files, for pipeline and one-file.")] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="cuda is for encoder, score and pipeline.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of NumPy and PyTorch [default: all].")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds at most; a case ends after 45 s and three rounds.")] = 7,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", callback=new_file, help="Rows as JSON [default: build/bench/cpu-SUBJECT.json]."),
    ] = None,
) -> None:
    """Time a part of iosr_fast against named rivals; rows are printed as cases end and written after every round."""
    if subject == "show":
        from benchmarks.show import page

        typer.echo("\n\n".join(map(page, words or [])))
        return
    from iosr_fast.exceptions import IosrFastError

    given = {"model": model, "batch": batch, "first_adapted_block": first_adapted_block}
    given |= {"case": case, "pictures": pictures}
    if subject == "compare":
        from benchmarks.compare import compare

        if words is None or len(words) != 2:
            raise IosrFastError(f"expected compare COMMIT SUBJECT, got {' '.join(['compare', *(words or [])])}")
        options = {**given, "device": device, "threads": threads, "repeats": repeats}
        passed = [
            [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
            for name, value in options.items()
            if value is not None
        ]
        if slower := compare(*words, [word for one in passed for word in one]):
            raise ArithmeticError(f"slower than {words[0]}: {'; '.join(' '.join(line) for line in slower)}")
        return
    # Before the first import of NumPy and PyTorch, which read their threads then; our kernels read theirs later.
    threads = threads or usable_threads()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "IOSR_FAST_THREADS"):
        os.environ[name] = str(threads)
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # PyTorch's engines take a GPU where there is one
    name = subject.replace("-", "_")
    module: Any = importlib.import_module("benchmarks.waits" if subject in WAITS else f"benchmarks.{name}")
    measure = getattr(module, name if subject in WAITS else "run")
    from benchmarks.devices import Device
    from benchmarks.harness import Run

    taken = inspect.signature(measure).parameters
    options = {name: value for name, value in given.items() if value is not None}
    if wrong := [f"--{name.replace('_', '-')}" for name in options if name not in taken]:
        raise IosrFastError(f"expected no {', '.join(wrong)} with {subject}")
    if device != "cpu" and subject in CPU_ALONE:
        raise IosrFastError(f"expected --device cpu with {subject}, got {device}")
    out = json_path or ROOT / "build" / "bench" / f"{'cpu' if device == 'cpu' else 'gpu'}-{subject}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    run = Run(subject, Device(device), threads, repeats, out=out)
    measure(run, **options)
    run.write()
    typer.echo(f"wrote {len(run.rows)} rows to {out}", err=True)
    if run.failed:
        raise ArithmeticError(f"not timed: {', '.join(run.failed)}")


if __name__ == "__main__":
    command_app(main, ListCommand)()
