"""The command `iosr-fast evaluate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from iosr_fast.utils.command import ListCommand, new_app, new_file, stop_message

if TYPE_CHECKING:
    from iosr_fast.evaluation.tasks import Source

evaluate = new_app(
    "iosr-fast",
    no_args_is_help=True,
    help="""Measure the accuracy of methods. No test image takes part in the choice of a parameter.

    An option that is marked ... takes several words: --shots 1 2 4.""",
)

Methods = Annotated[list[str], typer.Option(metavar="NAME ...", help="Names, 'all', 'auto', or 'scikit-learn'.")]
Reducers = Annotated[list[str], typer.Option(metavar="NAME ...", help="Reducers: none, centre, pca or pca:RANK.")]
Shots = Annotated[
    list[int] | None, typer.Option(min=1, metavar="N ...", help="Images of each class [default: all there are, to 16].")
]
Json = Annotated[Path | None, typer.Option("--json", callback=new_file, help="Write the rows here, as JSON.")]
Runtime = Annotated[str, typer.Option(help="auto, onnxruntime, openvino, tensorrt, tensorrt_rtx or torch.")]
REDUCERS = ["none", "centre", "pca"]


@evaluate.command(cls=ListCommand)
def features(
    file: Annotated[Path, typer.Argument(help="An .npz file of embeddings and labels.")],
    methods: Methods = ["all"],
    reducers: Reducers = REDUCERS,
    shots: Shots = None,
    tune: Annotated[
        Literal["validation", "loo"] | None,
        typer.Option(
            help="Choose parameters on the validation set, or by leave-one-out on the support set [default: "
            "validation if the file has one]. auto always uses leave-one-out."
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Draws of the support set; more than one are drawn from the largest set.")
    ] = 1,
    text: Annotated[bool, typer.Option(help="Use the file's text embeddings.")] = True,
    json_path: Json = None,
) -> None:
    """Compare methods on your own embeddings.

    Arrays of FILE: support1_x (N, D) and support1_y (N,) for one image of each class, support2_x and so on; test_x and
    test_y; and, if you have them, val_x and val_y, text (C, D), class_names (C,), tau, and embeddings of the adapter as
    support1_xa, test_xa and val_xa.

    The method 'scikit-learn' stands for four of its classifiers, which see no texts: compare with --no-text too.
    """
    from iosr_fast.evaluation.features import read_features

    _compare([read_features(file, shots, seeds, text)], methods, reducers, tune, json_path)


@evaluate.command(cls=ListCommand)
def demo(
    methods: Methods = ["all"],
    reducers: Reducers = REDUCERS,
    shots: Annotated[list[int], typer.Option(metavar="N ...", help="Images of each class.")] = [1, 2, 4],
    seeds: Annotated[int, typer.Option(min=1, help="Draws of the support set.")] = 3,
    shift: Annotated[bool, typer.Option("--shift", help="Also with support and queries in different styles.")] = False,
    adapter: Annotated[Path | None, typer.Option(help="An adapter file instead of the demo's.")] = None,
    first_adapted_block: Annotated[
        list[int] | None, typer.Option(metavar="N ...", help="Compare adapters from these blocks on; needs --adapters.")
    ] = None,
    bottleneck: Annotated[list[int], typer.Option(metavar="N ...", help="Their widths.")] = [64, 256],
    adapters: Annotated[
        Path | None, typer.Option(help="Folder of s{BLOCK}-b{WIDTH}.safetensors; missing ones are trained.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of a missing adapter's training.")] = 12,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds of the encoders with these adapters.")] = 31,
    json_path: Json = None,
) -> None:
    """Compare methods, or places of the adapter, on the demo's held-out concepts."""
    from iosr_fast.evaluation import demo, table
    from iosr_fast.exceptions import IosrFastError
    from iosr_fast.utils.provenance import write_rows

    demo.check_shots(shots)
    shots = list(dict.fromkeys(shots))
    if (first_adapted_block is not None) != (adapters is not None):
        raise IosrFastError("expected --first-adapted-block and --adapters DIR together")
    if first_adapted_block is not None and adapters is not None:
        if shift or adapter:
            raise IosrFastError("expected neither --shift nor --adapter with --first-adapted-block")
        from iosr_fast.benchmarks import block_sweep

        place = (first_adapted_block, bottleneck, adapters, epochs)
        rows = block_sweep.run(*place, shots, range(seeds), repeats, report)
        block_sweep.print_sweep(table.console(), rows, shots)
        if json_path is not None:
            write_rows(json_path, [{**row, **table.facts(table.PACKAGES)} for row in rows])
        return
    report("encoding the demo's held-out concepts")
    encoded, styles = demo.encode_test(adapter or "auto")
    sources = [demo.in_domain(encoded, shots, range(seeds))]
    if shift:
        sources = list(demo.shifted(encoded, styles, shots, range(seeds)))
    facts = table.facts(table.PACKAGES[:2]) | ({} if adapter is None else {"adapter": adapter.name})
    _compare(sources, methods, reducers, "loo", json_path, facts)


@evaluate.command(cls=ListCommand)
def paper(
    data: Annotated[list[str], typer.Option(metavar="SET ...", help="Names of data sets, 'demo', or 'all'.")],
    root: Annotated[Path | None, typer.Option(help="The folder that holds the data sets.")] = None,
    model: Annotated[str | None, typer.Option(help="A model of open_clip [default: demo, for --data demo].")] = None,
    pretrained: Annotated[str | None, typer.Option(help="A pretrained tag of open_clip, or a weights file.")] = None,
    adapter: Annotated[str, typer.Option(help="An adapter file; auto: the demo's for the demo.")] = "auto",
    methods: Annotated[
        list[str], typer.Option(metavar="NAME ...", help="Methods: names, 'all', or 'paper': those of the paper.")
    ] = ["paper"],
    reducers: Reducers = ["none"],
    shots: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="N ...", help="Images of each class [default: 1 2 4 8 16; with the demo 1 2 4]."),
    ] = None,
    fewer: Annotated[bool, typer.Option("--fewer", help="A class with fewer images than shots gives all.")] = False,
    seeds: Annotated[list[int], typer.Option(min=0, metavar="N ...", help="Draws of the support set.")] = [1, 2, 3],
    views: Annotated[int, typer.Option(min=1, help="Random views averaged into each key; 1: none.")] = 10,
    mirror: Annotated[bool, typer.Option(help="Mirror half of the views.")] = True,
    runtime: Runtime = "auto",
    published: Annotated[
        list[Path], typer.Option(metavar="FILE ...", help="More published figures to compare with.")
    ] = [],
    out: Annotated[Path | None, typer.Option(help="Folder of the run [default: in the user's cache].")] = None,
    embeddings: Annotated[
        Path | None, typer.Option(help="Folder of embeddings, shared by runs [default: OUT/embeddings].")
    ] = None,
    status: Annotated[bool, typer.Option("--status", help="Print how many cells are done, and stop.")] = False,
) -> None:
    """Run the paper's experiments (Kravets & Namboodiri, BMVC 2024, arXiv 2409.11338).

    The tables have all combinations of shots, seeds, data sets and methods, with and without the adapter (++).
    docs/datasets.md describes ROOT. Every cell of a table is a file in OUT/cells, so the same command resumes an
    interrupted run; more data sets, methods, shots and seeds may be added to the same OUT. PlantDoc has a class of 9
    images: more shots of it need --fewer, as in the papers' code. The tables are also written to OUT/results.md and
    OUT/results.json.
    """
    options = {**locals()}
    from iosr_fast.evaluation.paper.command import Options, reproduce

    with stop_message("stopped; the same command resumes the run", "iosr-fast"):
        reproduce(Options(**options), report)


def report(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _compare(
    sources: list[Source],
    methods: list[str],
    reducers: list[str],
    tune: Literal["validation", "loo"] | None,
    json_path: Path | None,
    facts: dict[str, Any] | None = None,
) -> None:
    """Print the tables of accuracy and of overlap; write their rows. `sources` are one, or the same data shifted."""
    from iosr_fast.evaluation import accuracy, overlap, table
    from iosr_fast.evaluation.rivals import RIVALS
    from iosr_fast.exceptions import IosrFastError
    from iosr_fast.methods import METHODS
    from iosr_fast.scoring.reducers import check_reducer
    from iosr_fast.utils.provenance import write_rows

    for reducer in reducers:
        check_reducer(reducer)
    sample = sources[0].draw(max(sources[0].shots), sources[0].seeds[0])
    names = accuracy.method_names(methods, {"all": [*METHODS, accuracy.AUTO], "scikit-learn": [*RIVALS]})
    left_out = accuracy.unavailable_methods(names, sample)
    rows = accuracy.table_rows([name for name in names if name not in left_out], reducers)
    if not rows:
        raise IosrFastError(f"expected a method that the data allows, got none: {'; '.join(left_out.values())}")
    tune = tune or ("loo" if sample.validation is None else "validation")
    if tune == "validation" and sample.validation is None:
        raise IosrFastError("expected data with a validation set for --tune validation, got none; use --tune loo")
    sheets = []
    for source in sources:
        results = accuracy.evaluate(source, rows, tune, lambda result: report(f"{result.source}: {result.summary}"))
        notes = (table.header(source.name, results), *source.notes)
        sheets.append(table.Sheet(source.name, tuple(results), notes))
    overlaps = overlap.overlap_rows(sources[0].name.partition(",")[0], *overlap.representations(sources[0]))
    out = table.console()
    table.print_sheets(out, sheets, [f"  left out: {reason}" for reason in left_out.values()])
    table.print_overlap(out, overlaps)
    if json_path is not None:
        common = facts or table.facts()
        write_rows(json_path, [{**row, **common} for row in (*table.rows_of(sheets), *overlaps)])
        report(f"wrote {json_path}")
