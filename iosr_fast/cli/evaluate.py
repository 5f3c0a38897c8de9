"""The command `iosr-fast evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from iosr_fast.cli.evaluate_saved import saved
from iosr_fast.utils.command import Group, ListCommand, new_app, new_file, say, stop_message

if TYPE_CHECKING:
    from iosr_fast.evaluation.tasks import Source


class Evaluate(Group):
    """Adds the name of a command where it is left out: `CLASSIFIER IMAGES` is `saved CLASSIFIER IMAGES`, and
    `--features FILE ... OPTIONS` is `features FILE ... OPTIONS`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self.named(args))

    def named(self, args: list[str]) -> list[str]:
        """The words with the name of a command first."""
        if args and args[0].startswith("-") and "--features" in args:
            start = args.index("--features")
            end = next((i for i in range(start + 1, len(args)) if args[i].startswith("-")), len(args))
            return ["features", *args[start + 1 : end], *args[:start], *args[end:]]
        return args if not args or args[0] in ("--help", *self.commands) else ["saved", *args]


evaluate = new_app(
    "iosr-fast",
    Evaluate,
    no_args_is_help=True,
    help="""Measure a saved classifier on labelled images:

    \b
    iosr-fast evaluate CLASSIFIER IMAGES --html report.html

    The other commands compare methods. No test image takes part in the choice of a parameter. An option that is marked
    ... takes several words: --shots 1 2 4.""",
)
evaluate.command()(saved)

Methods = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME ...",
        help="Names, 'all' (with scikit-learn's LogisticRegression and NearestCentroid), 'auto', or 'scikit-learn' "
        "[default: all; joint: auto].",
    ),
]
Reducers = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME ...",
        help="none, centre, pca or pca:RANK, for the demo isoclip, too [default: none centre pca].",
    ),
]
Shots = Annotated[
    list[int] | None, typer.Option(min=1, metavar="N ...", help="Images of each class [default: all there are, to 16].")
]
Json = Annotated[Path | None, typer.Option("--json", callback=new_file, help="Write the rows here, as JSON.")]
Runtime = Annotated[str, typer.Option(help="auto, onnxruntime, openvino, tensorrt, tensorrt_rtx or torch.")]


@evaluate.command(cls=ListCommand)
def features(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE ...", help=".npz files of embeddings and labels; 'demo': the demo's.")
    ],
    methods: Methods = None,
    reducers: Reducers = None,
    shots: Shots = None,
    tune: Annotated[
        Literal["validation", "loo"] | None,
        typer.Option(
            help="Choose parameters on the validation set, or by leave-one-out on the support set [default: "
            "validation if the file has one]. auto always uses leave-one-out."
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Draws of the support set; more than one are drawn from the largest set [default: 1; 3 for the demo].",
        ),
    ] = None,
    text: Annotated[bool, typer.Option(help="Use the file's text embeddings.")] = True,
    unequal: Annotated[
        bool,
        typer.Option(
            "--unequal", help="Leave half of the classes, drawn for each seed, a quarter of their support images."
        ),
    ] = False,
    json_path: Json = None,
) -> None:
    """Compare methods on your own embeddings. Several FILEs get a table each, and a summary over all.

    Arrays of FILE: support1_x (N, D) and support1_y (N,) for one image of each class, support2_x and so on; test_x and
    test_y; and, if you have them, val_x and val_y, text (C, D), class_names (C,), tau, and embeddings of the adapter as
    support1_xa, test_xa and val_xa.

    The method 'scikit-learn' stands for four of its classifiers, which see no texts: compare with --no-text too.

    Also written as: --features FILE ... OPTIONS, without the name of the command.
    """
    from iosr_fast.evaluation.sources import open_sources
    from iosr_fast.evaluation.tasks import with_unequal_classes

    sources = open_sources(files, shots, seeds, text)
    if unequal:
        sources = [with_unequal_classes(source) for source in sources]
    _measure(sources, (methods, reducers, tune), json_path)


@evaluate.command(cls=ListCommand)
def demo(
    methods: Methods = None,
    reducers: Reducers = None,
    shots: Annotated[list[int], typer.Option(metavar="N ...", help="Images of each class.")] = [1, 2, 4],
    seeds: Annotated[int, typer.Option(min=1, help="Draws of the support set.")] = 3,
    shift: Annotated[bool, typer.Option("--shift", help="Also with support and queries in different styles.")] = False,
    adapter: Annotated[Path | None, typer.Option(help="An adapter file instead of the demo's.")] = None,
    json_path: Json = None,
) -> None:
    """Compare methods on the demo's held-out concepts."""
    from iosr_fast.evaluation import demo, table

    shots = list(dict.fromkeys(shots))
    demo.check_shots(shots)
    report("encoding the demo's held-out concepts")
    encoded, styles = demo.encode_test(adapter or "auto")
    sources = [demo.in_domain(encoded, shots, range(seeds))]
    if shift:
        sources = list(demo.shifted(encoded, styles, shots, range(seeds)))
    facts = table.facts(table.PACKAGES[:2]) | ({} if adapter is None else {"adapter": adapter.name})
    _measure(sources, (methods, reducers, "loo"), json_path, facts)


@evaluate.command(cls=ListCommand)
def paper(
    data: Annotated[list[str], typer.Option(metavar="SET ...", help="Names of data sets, 'demo', or 'all'.")],
    root: Annotated[Path | None, typer.Option(help="The folder that holds the data sets.")] = None,
    model: Annotated[str | None, typer.Option(help="A model of open_clip [default: demo, for --data demo].")] = None,
    pretrained: Annotated[str | None, typer.Option(help="A pretrained tag of open_clip, or a weights file.")] = None,
    adapter: Annotated[str, typer.Option(help="An adapter file; auto: the demo's for the demo.")] = "auto",
    methods: Annotated[
        list[str], typer.Option(metavar="NAME ...", help="Names, 'all', 'paper' (the paper's), or 'scikit-learn'.")
    ] = ["paper"],
    reducers: Annotated[
        list[str], typer.Option(metavar="NAME ...", help="Reducers: none, centre, pca or pca:RANK.")
    ] = ["none"],
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
    docs/data.md names the sets. Every cell of a table is a file in OUT/cells, so the same command resumes an
    interrupted run; more data sets, methods, shots and seeds may be added to the same OUT. PlantDoc has a class of 9
    images: more shots of it need --fewer, as in the papers' code. The tables are also written to OUT/results.md and
    OUT/results.json.
    """
    options = {**locals()}
    from iosr_fast.evaluation.paper.command import Options, reproduce

    with stop_message("stopped; the same command resumes the run", "iosr-fast"):
        reproduce(Options(**options), report)


def report(message: str) -> None:
    say(message, err=True)


def _measure(
    sources: Sequence[Source],
    options: tuple[list[str] | None, list[str] | None, Literal["validation", "loo"] | None],
    json_path: Path | None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Print the tables, and write their rows."""
    from iosr_fast.evaluation import table
    from iosr_fast.evaluation.accuracy_table import run
    from iosr_fast.evaluation.selection import Options
    from iosr_fast.utils.provenance import write_rows

    rows = run(sources, Options(*options, report), table.console())
    if json_path is not None:
        common = facts or table.facts()
        write_rows(json_path, [{**row, **common} for row in rows])
        report(f"wrote {json_path}")
