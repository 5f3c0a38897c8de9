"""The work of `iosr-fast evaluate paper`: checks, the missing cells, the tables. run.py describes the protocol."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from iosr_fast.encoders.runtimes.engine import choose_runtime
from iosr_fast.evaluation import demo, table
from iosr_fast.evaluation.accuracy import AUTO, Draw
from iosr_fast.evaluation.paper import model as models
from iosr_fast.evaluation.paper import problems as sets
from iosr_fast.evaluation.paper import report as reports
from iosr_fast.evaluation.paper import run
from iosr_fast.evaluation.paper.cells import Cell, Cells, digest, write_json
from iosr_fast.evaluation.paper.problems import Problem
from iosr_fast.evaluation.paper.published import read_published
from iosr_fast.evaluation.paper.run import Group
from iosr_fast.evaluation.paper.store import Store
from iosr_fast.evaluation.rivals import ADAPTED, DEFAULT_RIVALS, RIVALS
from iosr_fast.evaluation.selection import method_names, table_rows
from iosr_fast.exceptions import IosrFastError
from iosr_fast.export.pretrained import cache_folder
from iosr_fast.methods import METHODS
from iosr_fast.scoring.isoclip import check_projections
from iosr_fast.utils.folders import check_new_folder
from iosr_fast.utils.provenance import write_rows
from iosr_fast.utils.require import require
from iosr_fast.utils.temporaries import remove_leftovers

PAPER_METHODS = ("zero-shot", "tip-adapter", "tip-adapter++", "tip-x", "tip-x++")
SHOTS = (1, 2, 4, 8, 16)
RUN = "run.json"
Report = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """The options of the command; `shots` None: all that the data sets have, up to 16."""

    data: list[str]
    root: Path | None
    model: str | None
    pretrained: str | None
    adapter: str
    methods: list[str]
    reducers: list[str]
    shots: list[int] | None
    fewer: bool
    seeds: list[int]
    views: int
    mirror: bool
    runtime: str
    published: list[Path]
    out: Path | None
    embeddings: Path | None
    status: bool


def check_options(options: Options) -> list[str]:
    """The methods. Raises ValueError for options that are wrong whatever the data, before any set is opened."""
    groups = {"paper": PAPER_METHODS, "all": [*METHODS], "scikit-learn": DEFAULT_RIVALS}
    names = method_names(options.methods, groups)
    if any(name in RIVALS for name in names):
        require("sklearn", "sklearn")
    if AUTO in names:
        raise IosrFastError("expected --methods without auto: the paper's tables compare methods by name")
    for reducer in options.reducers:
        check_projections(reducer, None)  # embeddings are cached without the CLIP
    if options.runtime != "auto":
        choose_runtime(options.runtime)
    if options.model is None and options.data != [sets.DEMO]:
        raise IosrFastError("expected --model (and --pretrained) for data sets other than the demo's")
    return names


def choose_shots(options: Options, problems: Sequence[Problem]) -> list[int]:
    """--shots, or its default. Raises ValueError for more shots than there are images."""
    default = demo.SHOTS if any(problem.name == sets.DEMO for problem in problems) else SHOTS
    shots = sorted(set(options.shots or default))
    most = {problem.name: problem.most_shots(options.fewer) for problem in problems}
    if few := [f"{name} has {images}" for name, images in most.items() if images < max(shots)]:
        actual = f"got {max(shots)}: {', '.join(few)}"
        if options.fewer:
            raise IosrFastError(f"expected --shots up to the images of the largest class and none without, {actual}")
        raise IosrFastError(
            f"expected --shots up to the images of the smallest class, {actual}. "
            "--fewer lets a class that has fewer give all of them"
        )
    return shots


def check_out(out: Path, facts: dict[str, Any]) -> None:
    """Make `out` this run's. Raises FileExistsError for a folder of other things, ValueError for one of another run."""
    path = out / RUN
    if path.is_file():
        try:
            stored = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise IosrFastError(f"{path} is damaged ({error}): remove it, or choose another --out") from error
        changed = [
            f"{name} {stored.get(name)}, now {value}" for name, value in facts.items() if stored.get(name) != value
        ]
        if changed:
            raise IosrFastError(f"{out} is of another run: {'; '.join(changed)}. Choose another --out")
    else:
        check_place(out)
        write_json(path, facts)
    remove_leftovers(out, of=re.escape(RUN))


def check_place(out: Path) -> None:
    """Raise OSError if no run can begin or resume in `out`."""
    if (out / RUN).is_file():
        return
    # A run that was killed at its very beginning leaves its hidden file only.
    if out.exists() and (not out.is_dir() or any(not path.name.startswith(f".{RUN}.") for path in out.iterdir())):
        raise FileExistsError(f"{out} exists and holds other things than a run's; choose another --out")
    if not out.exists():
        check_new_folder(out)


def reproduce(options: Options, report: Report) -> None:
    """Check everything, then fill the missing cells and show the tables."""
    published = read_published(options.published)
    names = check_options(options)
    if options.out is not None:
        check_place(options.out)
    problems = sets.open_problems(options.data, options.root)
    model = models.load_model(options.model or sets.DEMO, options.pretrained, options.adapter, options.runtime)
    shots, seeds = choose_shots(options, problems), list(dict.fromkeys(options.seeds))
    without = [name for name in names if name.endswith(ADAPTED) and model.adapter is None]
    reason = (
        f"no adapter for {model.clip.name}: give --adapter FILE (iosr-fast train-adapter --preset paper trains one)"
    )
    if named := [name for name in without if name in options.methods]:
        raise IosrFastError(f"{', '.join(named)}: {reason}")
    rows = table_rows([name for name in names if name not in without], options.reducers)
    views = run.Views(options.views, options.mirror)
    # Without --pretrained, as a file has several paths: the fingerprint in the model's facts is that of its content.
    facts = {**model.facts, "views": views.count, "mirror": views.mirror}
    out = options.out or cache_folder() / "reproduction" / f"{model.clip.name}-{digest(facts)[:12]}"
    if options.status and not (out / RUN).is_file():
        raise FileNotFoundError(f"no run in {out} yet")
    check_out(out, facts)
    if without:
        report(f"left out: {', '.join(without)}: {reason}")

    store = Store(options.embeddings or out / "embeddings", model, report)
    cells = Cells(out / "cells", report)
    groups = run.plan(problems, rows, shots, seeds, views, store)
    if options.status:
        print_status(groups, cells, out)
        return
    draws = compute(groups, store, cells)
    weights = reports.Weights(model.clip.name, options.pretrained)
    sheets = reports.sheets(groups, draws, published, weights)
    footer = reports.footer(sheets, weights)
    table.print_sheets(table.console(), sheets, footer)
    common = {**facts, "pretrained": options.pretrained, **table.facts(table.PACKAGES)}
    written = [{**row, **common} for row in table.rows_of(sheets)]
    write_rows(out / "results.json", written)
    table.write_markdown(out / "results.md", sheets, common, footer)
    report(f"wrote results.md and results.json to {out}")


def print_status(groups: Sequence[Group], cells: Cells, out: Path) -> None:
    """How many cells of each data set are done."""
    names = dict.fromkeys(group.problem.name for group in groups)
    of_set = {name: [cell for g in groups if g.problem.name == name for cell in g.cells] for name in names}
    done = {name: sum(cells.read(cell) is not None for cell in listed) for name, listed in of_set.items()}
    print(f"{sum(done.values())} of {sum(map(len, of_set.values()))} cells done in {out}")
    for name, listed in of_set.items():
        print(f"  {name}: {done[name]} of {len(listed)}")


def compute(groups: Sequence[Group], store: Store, cells: Cells) -> dict[str, Draw]:
    """Fill the cells under a bar with the number of cells done and the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        encoding = progress.add_task("images to encode", total=run.to_encode(groups, store))
        filling = progress.add_task("cells", total=sum(len(group.cells) for group in groups))
        store.report = cells.report = lambda message: progress.console.print(message, soft_wrap=True)
        store.encoded = lambda images: progress.advance(encoding, images)

        def done(cell: Cell) -> None:
            progress.update(filling, advance=1, description=f"cells: {cell.data}, {cell.shots} shots, {cell.method}")

        return run.compute(groups, store, cells, done)
