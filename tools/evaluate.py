"""Evaluate methods with parameters that no test image has a part in.

    python tools/evaluate.py features FILE.npz --methods all --shots 1 2 4 8 16 --json F
    python tools/evaluate.py demo --methods all --shots 1 2 4 --shift --json F
    python tools/evaluate.py demo --first-adapted-block 0 1 2 3 4 5 --bottleneck 64 256 --adapters DIR
    python tools/evaluate.py paper --data all --root DIR --model ViT-B-16 --pretrained openai --adapter FILE

`features` reads embeddings (tools/evaluation/features.py lists the arrays). `demo` encodes the demo's held-out concepts
with the shipped adapter, or maps the adapter's start block and width: accuracy, overlap, cost. `paper` runs the paper's
experiments on its data sets, every cell resumable; `--help` of each has more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DEMO_SHOTS = (1, 2, 4)
PACKAGES = ("torch", "open_clip_torch", "onnxruntime")


def parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    main_parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="features|demo|paper")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--methods", nargs="+", default=["all"], help="names, auto, or all [all]")
    shared.add_argument("--reducers", nargs="+", default=["none", "centre", "pca"], help="[none centre pca]")
    shared.add_argument("--shots", nargs="+", type=int, help="[all that the file has; of the demo 1 2 4]")
    for name in ("json", "csv", "markdown"):
        shared.add_argument(f"--{name}", type=Path, metavar="F", help="write the rows here")

    features = commands.add_parser("features", parents=[shared], help="embeddings and labels of a file")
    features.add_argument("file", type=Path, metavar="FILE.npz")
    features.add_argument(
        "--tune",
        choices=["validation", "loo"],
        help="on what parameters are chosen [validation if the file has such a set, else loo, on the support set]; "
        "auto is always chosen by loo",
    )
    demo = commands.add_parser("demo", parents=[shared], help="the demo's held-out concepts")
    demo.add_argument("--seeds", type=int, default=3, metavar="N", help="draws of the support sets [3]")
    demo.add_argument("--shift", action="store_true", help="also: support from some styles, queries from the others")
    demo.add_argument("--adapter", type=Path, metavar="FILE", help="in place of the shipped one")
    sweep = demo.add_argument_group("the map of the adapter's place")
    sweep.add_argument("--first-adapted-block", nargs="+", type=int, metavar="S", help="start blocks")
    sweep.add_argument("--bottleneck", nargs="+", type=int, default=[64, 256], metavar="B", help="widths [64 256]")
    sweep.add_argument("--adapters", type=Path, metavar="DIR", help="of s{S}-b{B}.safetensors; trained if missing")
    sweep.add_argument("--epochs", type=int, default=12, help="of an adapter's training [12]")
    sweep.add_argument("--repeats", type=int, default=31, help="timed rounds of all encoders [31]")

    from tools.evaluation.paper import command

    command.add_options(
        commands.add_parser("paper", description=command.__doc__, formatter_class=formatter, help="the paper's tables")
    )
    return main_parser


def check(options: argparse.Namespace) -> None:
    """Raise ValueError for options that don't go together, before any work."""
    if options.command == "demo":
        sweep = options.first_adapted_block is not None
        if sweep != (options.adapters is not None):
            raise ValueError("expected --first-adapted-block and --adapters DIR together")
        if sweep and (options.csv or options.markdown or options.shift or options.adapter):
            raise ValueError(
                "expected none of --csv, --markdown, --shift and --adapter with --first-adapted-block; use --json"
            )
        if options.seeds < 1 or options.repeats < 1:
            raise ValueError(f"expected --seeds and --repeats of at least 1, got {options.seeds} and {options.repeats}")
    from iosr_fast.utils.outputs import check_new_file

    for path in (options.json, options.csv, options.markdown):
        if path is not None:
            check_new_file(path)


def report(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def open_sources(options: argparse.Namespace) -> list[Any]:
    """One source; with --shift the same concepts in-domain and shifted."""
    if options.command == "features":
        from tools.evaluation.features import read_features

        return [read_features(options.file, options.shots)]
    from tools.evaluation import demo

    shots, seeds = tuple(dict.fromkeys(options.shots or DEMO_SHOTS)), range(options.seeds)
    demo.check_shots(shots)
    report("encoding the demo's held-out concepts")
    encoded, styles = demo.encode_test(options.adapter or "auto")
    if options.shift:
        return list(demo.shifted(encoded, styles, shots, seeds))
    return [demo.in_domain(encoded, shots, seeds)]


def evaluate_methods(options: argparse.Namespace) -> None:
    """Print and write the tables of accuracy and of overlap."""
    from iosr_fast.methods import METHODS
    from tools.evaluation import accuracy, overlap, table

    sources = open_sources(options)
    sample = sources[0].draw(max(sources[0].shots), sources[0].seeds[0])
    names = accuracy.method_names(options.methods, {"all": [*METHODS, accuracy.AUTO]})
    left_out = accuracy.unavailable_methods(names, sample)
    rows = accuracy.table_rows([name for name in names if name not in left_out], options.reducers)
    if not rows:
        raise ValueError(f"expected a method that the data allows, got none: {'; '.join(left_out.values())}")
    tune_on = getattr(options, "tune", None) or ("loo" if sample.validation is None else "validation")
    if tune_on == "validation" and sample.validation is None:
        raise ValueError("expected data with a validation set for --tune validation, got none; use --tune loo")
    sheets = []
    for source in sources:
        results = accuracy.evaluate(source, rows, tune_on, lambda result: report(f"{result.source}: {result.summary}"))
        notes = (table.header(source.name, results), *source.notes)
        sheets.append(table.Sheet(source.name, tuple(results), notes))
    representations, labels = overlap.representations(sources[0])
    overlaps = overlap.overlap_rows(sources[0].name.partition(",")[0], representations, labels)

    out = table.console()
    table.print_sheets(out, sheets, [f"  left out: {reason}" for reason in left_out.values()])
    table.print_parameters(out, [result for sheet in sheets for result in sheet.results])
    table.print_overlap(out, overlaps)
    common = table.facts(() if options.command == "features" else PACKAGES[:2])
    if getattr(options, "adapter", None) is not None:
        common["adapter"] = options.adapter.name
    written = [{**row, **common} for row in (*table.rows_of(sheets), *overlaps)]
    write(options.json, table.write_json, written)
    write(options.csv, table.write_csv, written)
    write(options.markdown, table.write_markdown, sheets, written, common)


def evaluate_blocks(options: argparse.Namespace) -> None:
    """Print and write the map of the adapter's place."""
    from tools.evaluation import block_sweep, demo, table

    shots = tuple(dict.fromkeys(options.shots or DEMO_SHOTS))
    demo.check_shots(shots)
    place = (options.first_adapted_block, options.bottleneck, options.adapters, options.epochs)
    rows = block_sweep.run(*place, shots, range(options.seeds), options.repeats, report)
    block_sweep.print_sweep(table.console(), rows, shots)
    common = table.facts(PACKAGES)
    write(options.json, table.write_json, [{**row, **common} for row in rows])


def write(path: Path | None, writer: Callable[..., None], *content: Any) -> None:
    if path is not None:
        writer(path, *content)
        report(f"wrote {path}")


def main(words: Sequence[str] | None = None) -> None:
    main_parser = parser()
    options = main_parser.parse_args(words)
    try:
        if options.command == "paper":
            from tools.evaluation.paper import command

            command.reproduce(options, report)
            return
        check(options)
        sweep = options.command == "demo" and options.first_adapted_block is not None
        (evaluate_blocks if sweep else evaluate_methods)(options)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        main_parser.error(str(error))


if __name__ == "__main__":
    main()
