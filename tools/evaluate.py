"""Evaluate every method on a data set, with parameters that no test image has a part in.

    python tools/evaluate.py --features FILE.npz --methods all --shots 1 2 4 8 16 --json F
    python tools/evaluate.py --data demo --methods all --shots 1 2 4 --shift --plots DIR
    python tools/evaluate.py --data demo --first-adapted-block 0 1 2 3 4 5 --bottleneck 64 256 --adapters DIR

The first reads embeddings (tools/evaluation/features.py says which arrays), the second encodes the demo's held-out
concepts with the shipped adapter, the third maps the adapter's start block and width: accuracy, overlap, cost.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DEMO_SHOTS = (1, 2, 4)
# Rows, and what draws them into a folder.
Evaluated = tuple[list[dict[str, Any]], Callable[[Path], None]]
PACKAGES = ("torch", "open_clip_torch", "onnxruntime")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = made.add_mutually_exclusive_group(required=True)
    data.add_argument("--features", type=Path, metavar="FILE.npz", help="embeddings and labels")
    data.add_argument("--data", choices=["demo"], help="the demo's held-out concepts")
    made.add_argument("--methods", nargs="+", default=["all"], help="names, auto, or all [all]")
    made.add_argument("--reducers", nargs="+", default=["none", "centre", "pca"], help="[none centre pca]")
    made.add_argument("--shots", nargs="+", type=int, help="[all that the file has; of the demo 1 2 4]")
    made.add_argument("--seeds", type=int, default=3, metavar="N", help="draws of the demo's support sets [3]")
    made.add_argument("--shift", action="store_true", help="demo: support from some styles, queries from the others")
    made.add_argument("--adapter", type=Path, metavar="FILE", help="for the demo, in place of the shipped one")
    made.add_argument(
        "--tune",
        choices=["validation", "loo"],
        help="what parameters are chosen on: validation where there is such a set, else loo, on the support set. "
        "auto is always chosen by loo",
    )
    for name in ("json", "csv", "markdown"):
        made.add_argument(f"--{name}", type=Path, metavar="F", help="write the rows here")
    made.add_argument("--plots", type=Path, metavar="DIR", help="write figures here")
    sweep = made.add_argument_group("the map of the adapter's place, with --data demo")
    sweep.add_argument("--first-adapted-block", nargs="+", type=int, metavar="S", help="start blocks")
    sweep.add_argument("--bottleneck", nargs="+", type=int, default=[64, 256], metavar="B", help="widths [64 256]")
    sweep.add_argument("--adapters", type=Path, metavar="DIR", help="of s{S}-b{B}.safetensors; trained if missing")
    sweep.add_argument("--epochs", type=int, default=12, help="of an adapter's training [12]")
    sweep.add_argument("--repeats", type=int, default=31, help="timed rounds of all encoders [31]")
    return made


def check(options: argparse.Namespace) -> None:
    """Raise ValueError where options don't go together; before any work."""
    sweep = options.first_adapted_block is not None
    demo_only = {
        "--shift": options.shift,
        "--first-adapted-block": sweep,
        "--adapters": options.adapters is not None,
        "--adapter": options.adapter is not None,
    }
    if options.features is not None and any(demo_only.values()):
        raise ValueError(f"expected --data demo with {', '.join(name for name, on in demo_only.items() if on)}")
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
    if options.plots is not None:
        from iosr_fast.utils.require import require

        require("matplotlib.figure", "train")
        options.plots.mkdir(parents=True, exist_ok=True)


def say(told: str) -> None:
    print(told, file=sys.stderr, flush=True)


def sources_of(options: argparse.Namespace) -> list[Any]:
    """One source; with --shift the same concepts in-domain and shifted."""
    if options.features is not None:
        from tools.evaluation.features import read_features

        return [read_features(options.features, options.shots)]
    from tools.evaluation import demo

    shots, seeds = tuple(dict.fromkeys(options.shots or DEMO_SHOTS)), range(options.seeds)
    demo.check_shots(shots)
    say("encoding the demo's held-out concepts")
    encoded, styles = demo.encode_test(options.adapter or "auto")
    return (
        list(demo.shifted(encoded, styles, shots, seeds)) if options.shift else [demo.in_domain(encoded, shots, seeds)]
    )


def evaluate_methods(options: argparse.Namespace) -> Evaluated:
    """Print tables; the rows of accuracy and of overlap, and what draws them."""
    from tools.evaluation import accuracy, separation, table

    sources = sources_of(options)
    sample = sources[0].draw(max(sources[0].shots), sources[0].seeds[0])
    rows, left_out = accuracy.choose_rows(options.methods, options.reducers, sample)
    tune_on = accuracy.default_tuning(sample, options.tune)
    found = [(s, accuracy.evaluate(s, rows, tune_on, lambda r: say(f"{r.source}: {r.told}"))) for s in sources]
    results = [result for _, made in found for result in made]
    representations, labels = separation.of_source(sources[0])
    name = sources[0].name.partition(",")[0]
    overlap = separation.separation_rows(name, representations, labels)

    out = table.console()
    table.print_accuracy(out, found)
    for why in left_out:
        out.print(f"  left out: {why}", soft_wrap=True)
    table.print_parameters(out, results)
    table.print_overlap(out, overlap)

    def draw(folder: Path) -> None:
        from iosr_fast.training.overlap import plot_overlap
        from tools.evaluation import plots

        plot_overlap(representations, labels, folder / "overlap.png")
        for source, made in found:
            stem = source.name.replace(", ", "-").removesuffix(".npz")
            plots.plot_shots(made, folder / f"shots-{stem}.png", table.header(source, made))
            if plots.curves_of(made):
                plots.plot_alpha(made, folder / f"alpha-{stem}.png", source.name)
        if options.shift:
            plots.plot_robustness(found[0][1], found[1][1], folder / "robustness.png", "demo, shift of styles")

    common = table.facts(() if options.features is not None else PACKAGES[:2])
    if options.adapter is not None:
        common["adapter"] = options.adapter.name
    return [{**row, **common} for row in (*(result.row() for result in results), *overlap)], draw


def evaluate_blocks(options: argparse.Namespace) -> Evaluated:
    """Print the map; its rows, and what draws it."""
    from tools.evaluation import block_sweep, demo, table

    shots = tuple(dict.fromkeys(options.shots or DEMO_SHOTS))
    demo.check_shots(shots)
    rows = block_sweep.run(
        options.first_adapted_block,
        options.bottleneck,
        options.adapters,
        options.epochs,
        shots,
        range(options.seeds),
        options.repeats,
        say,
    )
    block_sweep.print_sweep(table.console(), rows, shots)

    def draw(folder: Path) -> None:
        from tools.evaluation import plots

        for method in block_sweep.METHODS:
            plots.plot_sweep(rows, method, max(shots), folder / f"sweep-{method.removesuffix('++')}.png")

    common = table.facts(PACKAGES)
    return [{**row, **common} for row in rows], draw


def main(words: Sequence[str] | None = None) -> None:
    read = parser()
    options = read.parse_args(words)
    try:
        check(options)
        rows, draw = (evaluate_methods if options.first_adapted_block is None else evaluate_blocks)(options)
    except (ValueError, OSError, ImportError) as error:
        read.error(str(error))
    from tools.evaluation import table

    writers: dict[str, Callable[..., None]] = {
        "json": table.write_json,
        "csv": table.write_csv,
        "markdown": table.write_markdown,
    }
    for name, write in writers.items():
        path = getattr(options, name)
        if path is not None:
            write(path, rows)
            say(f"wrote {path}")
    if options.plots is not None:
        draw(options.plots)
        say(f"wrote figures to {options.plots}")


if __name__ == "__main__":
    main()
