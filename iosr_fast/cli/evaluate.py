"""Evaluate methods with parameters that no test image has a part in.

    python tools/evaluate.py features FILE.npz --methods all --shots 1 2 4 8 16 --json F
    python tools/evaluate.py demo --methods all --shots 1 2 4 --shift --json F
    python tools/evaluate.py demo --first-adapted-block 0 1 2 3 4 5 --bottleneck 64 256 --adapters DIR
    python tools/evaluate.py paper --data all --root DIR --model ViT-B-16 --pretrained openai --adapter FILE

`features` reads embeddings (evaluation/features.py lists the arrays). `demo` encodes the demo's held-out concepts
with the shipped adapter, or maps the adapter's start block and width: accuracy, overlap, cost. `paper` runs the paper's
experiments on its data sets, every cell resumable; `--help` of each has more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iosr_fast.evaluation import accuracy, demo, overlap, table
from iosr_fast.evaluation.features import read_features
from iosr_fast.evaluation.paper import command as paper
from iosr_fast.methods import METHODS
from iosr_fast.scoring.reducers import REDUCERS
from iosr_fast.utils.outputs import check_new_file
from iosr_fast.utils.provenance import write_rows


def whole(text: str, least: int = 1) -> int:
    """A whole number of at least `least`, as argparse converts a word."""
    if not text.lstrip("-").isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return int(text)


def natural(text: str) -> int:
    return whole(text, least=0)


def parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    main_parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="features|demo|paper")

    def add(name: str, summary: str, methods: str, reducers: Sequence[str], **more: Any) -> argparse.ArgumentParser:
        """A command with the options that all have."""
        to = commands.add_parser(name, help=summary, **more)
        to.add_argument("--methods", nargs="+", default=[methods], help=f"names, or a group of them [{methods}]")
        to.add_argument("--reducers", nargs="+", choices=REDUCERS, default=reducers, help=f"[{' '.join(reducers)}]")
        to.add_argument("--shots", nargs="+", type=whole, help="images a class [all that the data has, up to 16]")
        return to

    features = add("features", "embeddings and labels of a file", "all", REDUCERS)
    features.add_argument("file", type=Path, metavar="FILE.npz")
    features.add_argument(
        "--tune",
        choices=["validation", "loo"],
        help="on what parameters are chosen [validation if the file has such a set, else loo, on the support set]; "
        "auto is always chosen by loo",
    )
    of_demo = add("demo", "the demo's held-out concepts", "all", REDUCERS)
    of_demo.set_defaults(shots=demo.SHOTS)
    of_demo.add_argument("--seeds", type=whole, default=3, metavar="N", help="draws of the support sets [3]")
    of_demo.add_argument("--shift", action="store_true", help="also: support from some styles, queries from the others")
    of_demo.add_argument("--adapter", type=Path, metavar="FILE", help="in place of the shipped one")
    sweep = of_demo.add_argument_group("the map of the adapter's place")
    sweep.add_argument("--first-adapted-block", nargs="+", type=int, metavar="S", help="start blocks")
    sweep.add_argument("--bottleneck", nargs="+", type=int, default=[64, 256], metavar="B", help="widths [64 256]")
    sweep.add_argument("--adapters", type=Path, metavar="DIR", help="of s{S}-b{B}.safetensors; trained if missing")
    sweep.add_argument("--epochs", type=int, default=12, help="of an adapter's training [12]")
    sweep.add_argument("--repeats", type=whole, default=31, help="timed rounds of all encoders [31]")
    for to in (features, of_demo):
        to.add_argument("--json", type=Path, metavar="F", help="write the rows here")
    add_paper_options(
        add("paper", "the paper's tables", "paper", ["none"], description=paper.__doc__, formatter_class=formatter)
    )
    return main_parser


def add_paper_options(to: argparse.ArgumentParser) -> None:
    to.add_argument("--data", nargs="+", required=True, metavar="SET", help="demo, names of data sets, or all")
    to.add_argument("--root", type=Path, metavar="DIR", help="the folder that holds the data sets")
    to.add_argument("--model", help="demo or one of open_clip's [demo, for --data demo]")
    to.add_argument("--pretrained", help="one of open_clip's tags, or a file of weights")
    to.add_argument("--adapter", default="auto", metavar="FILE", help="[the demo's, or none]")
    to.add_argument("--fewer", action="store_true", help="a class with fewer images than shots gives all it has")
    to.add_argument("--seeds", nargs="+", type=natural, default=[1, 2, 3], help="draws of the support [1 2 3]")
    to.add_argument("--views", type=whole, default=10, help="random views a key is the mean of; 1: none [10]")
    to.add_argument("--no-mirror", action="store_true", help="mirror no view: where left and right matter")
    to.add_argument("--runtime", default="auto", help="tensorrt, onnxruntime, torch, ... [auto]")
    to.add_argument("--published", nargs="+", type=Path, default=[], metavar="FILE", help="more published figures")
    to.add_argument("--out", type=Path, metavar="DIR", help="[a folder of this CLIP and adapter in the user's cache]")
    to.add_argument("--embeddings", type=Path, metavar="DIR", help="share embeddings between runs [OUT/embeddings]")
    to.add_argument("--status", action="store_true", help="print how many cells are done, and stop")


def check(options: argparse.Namespace) -> None:
    """Raise ValueError for options that don't go together, before any work."""
    if options.command == "demo":
        demo.check_shots(options.shots)
        options.shots = tuple(dict.fromkeys(options.shots))
        sweep = options.first_adapted_block is not None
        if sweep != (options.adapters is not None):
            raise ValueError("expected --first-adapted-block and --adapters DIR together")
        if sweep and (options.shift or options.adapter):
            raise ValueError("expected neither --shift nor --adapter with --first-adapted-block")
    if options.json is not None:
        check_new_file(options.json)


def report(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def open_sources(options: argparse.Namespace) -> list[Any]:
    """One source; with --shift the same concepts in-domain and shifted."""
    if options.command == "features":
        return [read_features(options.file, options.shots)]
    report("encoding the demo's held-out concepts")
    encoded, styles = demo.encode_test(options.adapter or "auto")
    if options.shift:
        return list(demo.shifted(encoded, styles, options.shots, range(options.seeds)))
    return [demo.in_domain(encoded, options.shots, range(options.seeds))]


def evaluate_methods(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the tables of accuracy and of overlap; return their rows."""
    sources = open_sources(options)
    sample = sources[0].draw(max(sources[0].shots), sources[0].seeds[0])
    names = accuracy.method_names(options.methods, {"all": [*METHODS, accuracy.AUTO]})
    left_out = accuracy.unavailable_methods(names, sample)
    rows = accuracy.table_rows([name for name in names if name not in left_out], options.reducers)
    if not rows:
        raise ValueError(f"expected a method that the data allows, got none: {'; '.join(left_out.values())}")
    tune_on: accuracy.TuneOn = getattr(options, "tune", None) or ("loo" if sample.validation is None else "validation")
    if tune_on == "validation" and sample.validation is None:
        raise ValueError("expected data with a validation set for --tune validation, got none; use --tune loo")
    sheets = []
    for source in sources:
        results = accuracy.evaluate(source, rows, tune_on, lambda result: report(f"{result.source}: {result.summary}"))
        notes = (table.header(source.name, results), *source.notes)
        sheets.append(table.Sheet(source.name, tuple(results), notes))
    overlaps = overlap.overlap_rows(sources[0].name.partition(",")[0], *overlap.representations(sources[0]))

    out = table.console()
    table.print_sheets(out, sheets, [f"  left out: {reason}" for reason in left_out.values()])
    table.print_overlap(out, overlaps)
    common = table.facts(() if options.command == "features" else table.PACKAGES[:2])
    if getattr(options, "adapter", None) is not None:
        common["adapter"] = options.adapter.name
    return [{**row, **common} for row in (*table.rows_of(sheets), *overlaps)]


def evaluate_blocks(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the map of the adapter's place; return its rows."""
    from iosr_fast.benchmarks import block_sweep

    place = (options.first_adapted_block, options.bottleneck, options.adapters, options.epochs)
    rows = block_sweep.run(*place, options.shots, range(options.seeds), options.repeats, report)
    block_sweep.print_sweep(table.console(), rows, options.shots)
    common = table.facts(table.PACKAGES)
    return [{**row, **common} for row in rows]


def main(words: Sequence[str] | None = None) -> None:
    main_parser = parser()
    options = main_parser.parse_args(words)
    try:
        if options.command == "paper":
            paper.reproduce(options, report)
            return
        check(options)
        sweep = options.command == "demo" and options.first_adapted_block is not None
        rows = (evaluate_blocks if sweep else evaluate_methods)(options)
        if options.json is not None:
            write_rows(options.json, rows)
            report(f"wrote {options.json}")
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        main_parser.error(str(error))


if __name__ == "__main__":
    main()
