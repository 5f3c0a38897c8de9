"""Run the paper's experiments (Kravets & Namboodiri, BMVC 2024, arXiv 2409.11338), one command a table.

    python tools/reproduce_paper.py --data demo
    python tools/reproduce_paper.py --data all --root DIR --model ViT-B-16 --pretrained openai --adapter FILE --fewer
    python tools/reproduce_paper.py ... --status

Shots x seeds x data sets x methods, each with and without the adapter ("++"). docs/datasets.md says what to put under
DIR; tools/reproduction/run.py says what the protocol is. Every cell is a file in OUT/cells, embeddings lie in
OUT/embeddings: stop the run at any moment, and the same command goes on from there. More sets, methods, shots and seeds
may be asked of the same OUT. PlantDoc has classes of 9 images to draw from: more shots of it need --fewer, which
does as the papers' code (https://github.com/KaiyangZhou/Dassl.pytorch). The tables are printed, and written to
OUT/results.md, .csv and .json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tools.evaluation.accuracy import Draw
    from tools.reproduction.models import Model
    from tools.reproduction.problems import Problem
    from tools.reproduction.run import Group
    from tools.reproduction.store import Store

PAPERS = ("zero-shot", "tip-adapter", "tip-adapter++", "tip-x", "tip-x++")
RUN = "run.json"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", nargs="+", required=True, metavar="SET", help="demo, names of data sets, or all")
    made.add_argument("--root", type=Path, metavar="DIR", help="the folder that holds the data sets")
    made.add_argument("--model", help="demo or one of open_clip's [demo, for --data demo]")
    made.add_argument("--pretrained", help="one of open_clip's tags, or a file of weights")
    made.add_argument("--adapter", default="auto", metavar="FILE", help="[the demo's, or none]")
    made.add_argument("--methods", nargs="+", default=["paper"], help=f"names, all, or [paper]: {' '.join(PAPERS)}")
    made.add_argument("--reducers", nargs="+", default=["none"], help="none centre pca [none]")
    made.add_argument("--shots", nargs="+", type=int, help="images a class [1 2 4 8 16; of the demo 1 2 4]")
    made.add_argument("--fewer", action="store_true", help="a class with fewer images than shots gives all it has")
    made.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="draws of the support [1 2 3]")
    made.add_argument("--views", type=int, default=10, help="random views a key is the mean of; 1: none [10]")
    made.add_argument("--no-mirror", action="store_true", help="mirror no view: where left and right matter")
    made.add_argument("--runtime", default="auto", help="tensorrt, onnxruntime, torch, ... [auto]")
    made.add_argument("--published", nargs="+", type=Path, default=[], metavar="FILE", help="more published figures")
    made.add_argument("--out", type=Path, metavar="DIR", help="[a folder of this CLIP and adapter in the user's cache]")
    made.add_argument("--embeddings", type=Path, metavar="DIR", help="share embeddings between runs [OUT/embeddings]")
    made.add_argument("--status", action="store_true", help="say how many cells are done, and stop")
    return made


def check_words(options: argparse.Namespace) -> None:
    """Raise ValueError for what can't be, whatever the data: it is known before a large set has been looked through."""
    from iosr_fast.encoders.runtimes import choose_runtime
    from iosr_fast.scoring.reducers import check_reducer

    method_names(options)
    for reducer in options.reducers:
        check_reducer(reducer)
    if options.runtime != "auto":
        choose_runtime(options.runtime)
    if min(options.shots or [1]) < 1 or min(options.seeds) < 0 or options.views < 1:
        raise ValueError(
            f"expected --shots and --views of at least 1 and --seeds of at least 0, got {options.shots}, "
            f"{options.views} and {options.seeds}"
        )


def method_names(options: argparse.Namespace) -> list[str]:
    """The methods asked for. Raises ValueError for an unknown name."""
    from iosr_fast.methods import METHODS

    groups = {"paper": PAPERS, "all": tuple(METHODS)}
    names = list(dict.fromkeys(name for word in options.methods for name in groups.get(word, (word,))))
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"expected --methods of paper, all, {', '.join(METHODS)}; got {', '.join(unknown)}")
    return names


def choose_rows(options: argparse.Namespace, model: Model) -> tuple[list[tuple[str, str]], list[str]]:
    """(method, reducer) of every row, and why methods of "paper" or "all" are left out.

    Raises ValueError for a method named by itself that needs an adapter where there is none.
    """
    from iosr_fast.methods import METHODS

    names = method_names(options)
    without = [name for name in names if METHODS[name].needs_adapter and model.adapter is None]
    told = f"no adapter for {model.clip.name}: give --adapter FILE (tools/train_adapter.py trains one)"
    if named := [name for name in without if name in options.methods]:
        raise ValueError(f"{', '.join(named)}: {told}")
    kept = [name for name in names if name not in without]
    rows = [(name, one) for name in kept for one in (options.reducers if METHODS[name].needs_support else ["none"])]
    return list(dict.fromkeys(rows)), [f"left out: {', '.join(without)}: {told}"] if without else []


def check_shots(options: argparse.Namespace, problems: Sequence[Problem]) -> None:
    """Raise ValueError for more shots than there are images. Fills in the default of --shots."""
    from tools.reproduction.problems import DEMO, DEMO_SHOTS, SHOTS

    if options.shots is None:
        options.shots = list(DEMO_SHOTS if any(problem.name == DEMO for problem in problems) else SHOTS)
    options.shots, options.seeds = sorted(set(options.shots)), list(dict.fromkeys(options.seeds))
    most = {problem.name: problem.most_shots(options.fewer) for problem in problems}
    if few := [f"{name} has {images}" for name, images in most.items() if images < max(options.shots)]:
        told = f"got {max(options.shots)}: {', '.join(few)}"
        if options.fewer:
            raise ValueError(f"expected --shots up to the images of the largest class and none without, {told}")
        raise ValueError(
            f"expected --shots up to the images of the smallest class, {told}. "
            "--fewer lets a class that has fewer give all of them"
        )


def check_out(out: Path, facts: dict[str, Any]) -> None:
    """Make `out` this run's. Raises FileExistsError for a folder of other things, ValueError for one of another run."""
    from iosr_fast.utils.temporaries import remove_leftovers
    from tools.reproduction.cells import write_json

    held = out / RUN
    if held.is_file():
        try:
            found = dict(json.loads(held.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{held} is damaged ({error}): remove it, or choose another --out") from error
        differs = [
            f"{name} {found.get(name)}, now {value}" for name, value in facts.items() if found.get(name) != value
        ]
        if differs:
            raise ValueError(f"{out} is of another run: {'; '.join(differs)}. Choose another --out")
    else:
        check_place(out)
        write_json(held, facts)
    remove_leftovers(out, of=re.escape(RUN))


def check_place(out: Path) -> None:
    """Raise OSError where no run can begin in `out`, or go on."""
    from iosr_fast.utils.outputs import check_new_folder

    if (out / RUN).is_file():
        return
    # A run that was killed at its very beginning leaves its hidden file only.
    if out.exists() and (not out.is_dir() or any(not path.name.startswith(f".{RUN}.") for path in out.iterdir())):
        raise FileExistsError(f"{out} exists and holds other things than a run's; choose another --out")
    if not out.exists():
        check_new_folder(out)


def say(told: str) -> None:
    print(told, file=sys.stderr, flush=True)


def load(options: argparse.Namespace) -> tuple[list[Problem], Model]:
    from tools.reproduction.models import load_model
    from tools.reproduction.problems import DEMO, open_problems

    if options.model is None and options.data != [DEMO]:
        raise ValueError("expected --model (and --pretrained) for data sets other than the demo's")
    problems = open_problems(options.data, options.root)
    return problems, load_model(options.model or DEMO, options.pretrained, options.adapter, options.runtime)


def reproduce(options: argparse.Namespace) -> None:
    """Check everything, then fill the cells that are missing and show the tables."""
    from tools.reproduction import report, run
    from tools.reproduction.cells import Cells, digest
    from tools.reproduction.published import read_published
    from tools.reproduction.store import Store

    published = read_published(options.published)
    check_words(options)
    if options.out is not None:
        check_place(options.out)
    problems, model = load(options)
    check_shots(options, problems)
    rows, left_out = choose_rows(options, model)
    views = run.Views(options.views, not options.no_mirror)
    # Not --pretrained: a file may be called in several ways, and the fingerprint in the model's facts is its content's.
    facts = {**model.facts, "views": views.count, "mirror": views.mirror}
    if options.out is None:
        from iosr_fast.export.pretrained import cache_folder

        options.out = cache_folder() / "reproduction" / f"{model.clip.name}-{digest(facts)[:12]}"
    if options.status and not (options.out / RUN).is_file():
        raise FileNotFoundError(f"no run in {options.out} yet")
    check_out(options.out, facts)
    for told in left_out:
        say(told)

    store = Store(options.embeddings or options.out / "embeddings", model, say)
    cells = Cells(options.out / "cells", say)
    groups = run.plan(problems, rows, options.shots, options.seeds, views, store)
    if options.status:
        status(groups, cells, options.out)
        return
    found = compute(groups, store, cells)
    weights = report.Weights(model.clip.name, options.pretrained)
    made = report.sheets(groups, found, published, weights)
    from tools.evaluation import table

    report.print_sheets(table.console(), made, weights)
    facts["pretrained"] = options.pretrained
    written = report.rows_of(made, facts)
    table.write_json(options.out / "results.json", written)
    table.write_csv(options.out / "results.csv", written)
    report.write_markdown(options.out / "results.md", made, weights, facts)
    say(f"wrote results.md, results.csv and results.json to {options.out}")


def status(groups: Sequence[Group], cells: Any, out: Path) -> None:
    """Print how many cells of each data set are done."""
    names = dict.fromkeys(group.problem.name for group in groups)
    asked = {name: [cell for g in groups if g.problem.name == name for cell in g.cells] for name in names}
    done = {name: sum(cells.read(cell) is not None for cell in of_set) for name, of_set in asked.items()}
    print(f"{sum(done.values())} of {sum(map(len, asked.values()))} cells done in {out}")
    for name, of_set in asked.items():
        print(f"  {name}: {done[name]} of {len(of_set)}")


def compute(groups: Sequence[Group], store: Store, cells: Any) -> dict[str, Draw]:
    """Fill the cells under a bar that says how many are done and how long the others will take."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from tools.reproduction import run

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        encoding = progress.add_task("images to encode", total=run.to_encode(groups, store))
        filling = progress.add_task("cells", total=sum(len(group.cells) for group in groups))
        store.tell = cells.tell = lambda told: progress.console.print(told, soft_wrap=True)
        store.encoded = lambda images: progress.advance(encoding, images)

        def done(cell: Any, draw: Draw) -> None:
            progress.update(filling, advance=1, description=f"cells: {cell.data}, {cell.shots} shots, {cell.method}")

        return run.compute(groups, store, cells, done)


def main(words: Sequence[str] | None = None) -> None:
    read = parser()
    options = read.parse_args(words)
    try:
        reproduce(options)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        read.error(str(error))


if __name__ == "__main__":
    main()
