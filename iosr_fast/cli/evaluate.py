"""The command `iosr-fast evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from iosr_fast.cli import options as shared
from iosr_fast.cli.command import Group, ListCommand, new_app, say, stop_message, write_figures, write_new
from iosr_fast.cli.options import Html, Json, Runtime, SavedClassifier, SkipBad, argument, echo_first, option, rows_in
from iosr_fast.exceptions import IosrFastError
from iosr_fast.sealed.outputs import check_utf8
from iosr_fast.utils.text import abbreviate

if TYPE_CHECKING:
    from iosr_fast.evaluation.tasks import TaskSource


class Evaluate(Group):
    """Adds the name of a command where it is left out: `CLASSIFIER IMAGES` is `saved CLASSIFIER IMAGES`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = not args or args[0] in ("-h", "--help", *self.commands)
        return super().parse_args(ctx, args if named else ["saved", *args])


evaluate = new_app(
    Evaluate,
    no_args_is_help=True,
    help="""Measure a saved classifier on labelled images:

    \b
    iosr-fast evaluate CLASSIFIER IMAGES --html report.html

    The other commands compare methods. No test image takes part in the choice of a parameter. An option that is marked
    ... takes several words: --shots 1 2 4.""",
)

Methods = Annotated[list[str], option("Names, all, auto, paper (the paper's), or scikit-learn.", metavar="NAME ...")]
Reducers = Annotated[list[str], option("none, centre, pca or pca:RANK.", metavar="NAME ...")]
Shots = Annotated[list[int], option("Images of each class; a smaller class gives all.", min=1, metavar="N ...")]
Seeds = Annotated[int, option("Draws of the support set.", min=1)]
ALL, REDUCERS = ["all"], ["none", "centre", "pca"]
report = partial(say, err=True)


@evaluate.command()
def saved(
    classifier: SavedClassifier,
    images: Annotated[
        Path, argument("IMAGES", "Folder with class folders, CSV file of path and label, or detector file.")
    ],
    nested: shared.Nested = False,
    label_column: shared.LabelColumn = None,
    keywords: shared.Keywords = None,
    html: Html = None,
    json_path: Json = None,
    unknown_images: Annotated[Path | None, option("Images of no class.", "--unknown-images", "--unknown")] = None,
    keep: Annotated[float, option("Share of known images that a rejection of unknown ones keeps.")] = 0.95,
    coverage: Annotated[float, option("Share of label sets that have the label.")] = 0.9,
    root: shared.Root = None,
    runtime: Runtime = "auto",
    skip_bad: SkipBad = False,
) -> None:
    """Measure a saved classifier on labelled images that it was not fitted on.

    First whether the accuracy is as left-out support images had let expect, and which promise of --max-error broke.
    Then the classes and pairs of classes with the most mistakes, log-loss, calibration, and what the promises of label
    sets and of rejection are worth. --html shows the mistakes with their pictures and the nearest examples.

    Where pictures may have several labels, as a CSV file with the column labels has them, figures are of the labels
    given, and say how many labels are found; there are no label sets and no rejection.

    Also written without `saved`: iosr-fast evaluate CLASSIFIER IMAGES.
    """
    from iosr_fast.classifier import Classifier
    from iosr_fast.files.embedding_files import read_rows
    from iosr_fast.files.source import check_files
    from iosr_fast.head.labelled_images import called_as, labelled_images, labels_among, unknown_folder
    from iosr_fast.reports.evaluation_report import evaluation_page

    if not classifier.is_dir():
        raise FileNotFoundError(
            "expected the folder of a saved classifier, or one of the commands features, demo and paper, found no "
            f"folder {classifier}"
        )
    paths: Sequence[Any]
    if (rows := rows_in(classifier, nested=nested, label_column=label_column, keywords=keywords)) is not None:
        source, labels = read_rows([images], rows, html is not None)
        if not labels:
            raise IosrFastError(f"expected labels y beside x in {images}, an .npz file, got none")
        paths, names = source.paths, labels
        others = [] if unknown_images is None else read_rows([unknown_images], rows, html is not None)[0].paths
    else:
        reading: dict[str, Any] = {"nested": nested, "root": root, "label_column": label_column, "keywords": keywords}
        given = labelled_images(images, skip_bad=skip_bad, **reading)
        paths = given.paths
        others = [] if unknown_images is None else unknown_folder(unknown_images)
        if not skip_bad:
            check_files(paths)
    check_utf8([*map(str, paths), *others])
    loaded = Classifier.load(classifier, runtime).set_params(progress=True)
    known = [info.name for info in loaded.classes()]
    if rows is None:
        given = called_as(given, known, loaded.snapshot().paths) if nested else given
        paths, labels, names, *_ = labels_among(given, known, loaded.snapshot().is_multi_label, keywords)
    if foreign := sorted(set(names) - set(known)):
        folders = "" if nested or loaded.snapshot().paths is None else "read nested folders of a tree by --nested, "
        raise IosrFastError(
            f"expected labels among the {len(known)} classes of {classifier} ({abbreviate(known)}), got "
            f"{abbreviate(foreign)}: {folders}rename these or leave them out; images of no class go to --unknown-images"
        )
    found = loaded.evaluate(paths, labels, others, coverage=coverage, keep=keep, skip_bad=skip_bad)
    say(*found.summary().split("\n"))
    first = partial(echo_first, by="--html or --json" if rows is None else "--json")
    worst = sorted((one for one in found.class_results if one.right < one.images), key=lambda one: one.recall)
    first("least often right:", [f"{one.label}: {one.right} of {one.images}" for one in worst])
    mixups = [f"{one.label} taken for {one.other}: {one.mistaken} of {one.images}" for one in found.mixups]
    first("most confused:", mixups)
    first("most probable mistakes:", [f"{one.image}: {one}" for one in found.mistakes], found.mistaken)
    first("unreadable:", [str(error) for error in found.errors], most=len(found.errors))
    if html is not None:
        title = f"Evaluation of {classifier.name} on {images.name}"
        write_new(html, evaluation_page(found, loaded.picture, title, loaded.exif_orientation_))
    if json_path is not None:
        write_figures(json_path, found.to_dict())


@evaluate.command(cls=ListCommand)
def features(
    files: Annotated[list[str], argument("FILE ...", ".npz files of embeddings and labels; 'demo': the demo's.")],
    methods: Methods = ALL,
    reducers: Reducers = REDUCERS,
    shots: Annotated[list[int] | None, option("Images a class [default: all].", min=1, metavar="N ...")] = None,
    seeds: Annotated[int | None, option("Draws of the support set [default: 1; demo 3].", min=1)] = None,
    text: Annotated[bool, option("Use the file's text embeddings.")] = True,
    unequal: Annotated[bool, option("Leave half of the classes a quarter of their images.", "--unequal")] = False,
    json_path: Json = None,
) -> None:
    """Compare methods on your own embeddings. Several FILEs get a table each, and one of their means.

    Arrays of FILE: support1_x (N, D) and support1_y (N,) for one image of each class, support2_x and so on; test_x and
    test_y; and, if you have them, val_x and val_y, text (C, D), tau, and embeddings of the adapter as support1_xa,
    test_xa and val_xa. Parameters are chosen on the validation set if FILE has one, otherwise by leave-one-out on the
    support set; auto always uses the latter.

    The method 'scikit-learn' stands for four of its classifiers, which see no texts: compare with --no-text too.
    """
    from iosr_fast.evaluation.features import open_sources
    from iosr_fast.evaluation.tasks import with_unequal_classes

    sources = open_sources(files, shots, seeds, text)
    if unequal:
        sources = [with_unequal_classes(source) for source in sources]
    _compare(sources, methods, reducers, json_path)


@evaluate.command(cls=ListCommand)
def demo(
    methods: Methods = ALL,
    reducers: Reducers = REDUCERS,
    shots: Shots = [1, 2, 4],
    seeds: Seeds = 3,
    adapter: Annotated[Path | None, option("An adapter file instead of the demo's.")] = None,
    json_path: Json = None,
) -> None:
    """Compare methods on the demo's held-out concepts."""
    from iosr_fast.evaluation.demo import open_demo

    report("encoding the demo's held-out concepts")
    source = open_demo(shots, seeds, adapter or "auto")
    _compare([source], methods, reducers, json_path, {} if adapter is None else {"adapter": adapter.name})


@evaluate.command(cls=ListCommand)
def paper(
    root: Annotated[Path, argument("ROOT", "The folder that holds the data sets.")],
    model: Annotated[str, option("A model of open_clip, or demo.")],
    pretrained: Annotated[str | None, option("A pretrained tag of open_clip, or a weights file.")] = None,
    adapter: Annotated[str, option("An adapter file; auto: the demo's for the demo.")] = "auto",
    data: Annotated[list[str], option("Names of data sets, or 'all'.", metavar="SET ...")] = ALL,
    methods: Annotated[
        list[str], option("Names, 'paper' (the paper's), 'all', or 'scikit-learn'.", metavar="NAME ...")
    ] = ["paper"],
    shots: Shots = [1, 2, 4, 8, 16],
    seeds: Seeds = 3,
    views: Annotated[int, option("Random views averaged into each key; 1: none.", min=1)] = 10,
    out: Annotated[Path | None, option("Folder of the run [default: in the user's cache].")] = None,
) -> None:
    """Run the paper's experiments (Kravets & Namboodiri, BMVC 2024, arXiv 2409.11338).

    The tables have all combinations of shots, seeds, data sets and methods, with and without the adapter (++). Files
    that are missing from ROOT are listed with their sources. Every cell of a table is a file in OUT/MODEL/cells, so the
    same command resumes an interrupted run; more data sets, methods, shots and seeds may be added to the same OUT. The
    rows are also written to OUT/MODEL/results.json. MODEL has a hash of the weights, the adapter and VIEWS.
    """
    options = {**locals()}
    from iosr_fast.evaluation.paper.run import run

    with stop_message("stopped; the same command resumes the run"):
        run(**options, report=report)


def _compare(
    sources: Sequence[TaskSource],
    methods: Sequence[str],
    reducers: Sequence[str],
    json_path: Path | None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Print the tables of every source, and write their rows."""
    from iosr_fast.evaluation import table
    from iosr_fast.evaluation.comparison import compare, method_names, pairs_of
    from iosr_fast.evaluation.provenance import write_rows

    pairs, out = pairs_of(method_names(methods), reducers), table.console()
    comparisons = []
    for source in sources:
        comparisons.append(compare(source, pairs, report))
        table.print_comparison(out, comparisons[-1])
    table.print_means(out, comparisons)
    if json_path is not None:
        rows = [result.row() for comparison in comparisons for result in comparison.results]
        common = {**table.facts(("torch", "scikit-learn")), **(facts or {})}
        write_rows(json_path, [{**row, **common} for row in rows])
        report(f"wrote {json_path}")
