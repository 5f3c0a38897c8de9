"""Results as tables on the terminal and as JSON, CSV and Markdown files, one row a data set, method, reducer, shots."""

from __future__ import annotations

import csv
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from iosr_fast.pipeline.tables import escaped
from iosr_fast.utils.machine import package_version
from tools.bench import harness
from tools.evaluation.accuracy import AUTO, TUNED_ON, Result
from tools.evaluation.tasks import Source

WIDTH = 150
Row = Mapping[str, Any]


class Named(Protocol):
    """A Source, or whatever else has a data set's name."""

    @property
    def name(self) -> str: ...


def console() -> Console:
    """As wide as the terminal; WIDTH where there is none."""
    return Console(width=None if Console().is_terminal else WIDTH)


def facts(packages: Iterable[str] = ()) -> dict[str, Any]:
    """What a number needs to be believed."""
    names = ("iosr_fast", "numpy", *packages)
    return {
        "device": harness.cpu_description(),
        "versions": {"python": platform.python_version(), **{name: package_version(name) for name in names}},
        "commit": harness.commit(),
    }


def header(source: Named, results: Sequence[Result]) -> str:
    """What the numbers of a table are: data, test images, classes, draws, the meaning of the spread, the tuning."""
    draws = results[0].draws
    images, classes = (_range([getattr(draw, name) for draw in draws]) for name in ("images", "classes"))
    if len(draws) > 1:
        what = f"mean ± standard deviation (std) over {len(draws)} seeds"
    else:
        what = "one draw ± its binomial standard error (se)"
    found = {result.protocol for result in results if result.method != AUTO}
    scored = max(result.draws[0].tuned.scored for result in results)
    told = "; ".join(
        f"{scored} {TUNED_ON[name]}" if name == "validation" else TUNED_ON[name]
        for name in TUNED_ON
        if name in found and name != "none"
    )
    if any(result.method == AUTO for result in results):
        told += f"{'; ' if told else ''}{AUTO}: the support set alone"
    return (
        f"{source.name}: accuracy in % on {images} test images of {classes} classes, {what}; "
        f"parameters chosen on: {told or TUNED_ON['none']}"
    )


def print_accuracy(console: Console, results: Sequence[tuple[Source, Sequence[Result]]]) -> None:
    """Methods x shots; several sources of the same methods stand beside each other."""
    for source, made in results:
        console.print(header(source, made), soft_wrap=True)
        for note in source.notes:
            console.print(f"  {note}", soft_wrap=True)
    several = len(results) > 1
    table = Table("method", "reducer", "tuned on")
    cells: dict[tuple[str, str], list[str]] = {}
    protocols: dict[tuple[str, str], dict[str, None]] = {}
    for source, made in results:
        for shots in source.shots:
            name = f"{shots} shot{'' if shots == 1 else 's'}"
            table.add_column(f"{name}\n{source.name}" if several else name, justify="right")
            for result in made:
                if result.shots == shots:
                    key = (result.method, result.reducer)
                    cells.setdefault(key, []).append(percent(result.mean, result.spread))
                    protocols.setdefault(key, {})[result.protocol] = None
    for key, row in cells.items():
        table.add_row(*key, " / ".join(protocols[key]), *row)
    console.print(table)


def print_parameters(console: Console, results: Sequence[Result]) -> None:
    """What was chosen and how long it took; where there are several seeds each has its value."""
    table = Table("method", "reducer", "data", "shots", "parameters", "tuned to %", "tune s", "fit s")
    for result in results:
        row = result.row()
        table.add_row(
            result.method,
            result.reducer,
            result.source,
            str(result.shots),
            parameters_of(row),
            " | ".join("-" if value is None else f"{100 * value:.1f}" for value in row["tuned_accuracy"]),
            *(f"{sum(row[name]) / len(row[name]):.2f}" for name in ("tune_seconds", "fit_seconds")),
        )
    console.print(table)


def print_overlap(console: Console, rows: Sequence[Row]) -> None:
    first = rows[0]
    console.print(
        f"{first['data']}: cosines of all pairs of {first['images']} images of {first['classes']} classes; reducers "
        "fitted on the support set"
    )
    table = Table("embeddings", "overlap area", "AUROC", "feature variance")
    for row in rows:
        table.add_row(row["embeddings"], *(f"{row[name]:.3f}" for name in OVERLAP))
    console.print(table)


OVERLAP = ("overlap_area", "auroc", "feature_variance")


def parameters_of(row: Row) -> str:
    """alpha 10.6, beta 5.8; of several seeds: alpha 10.6 | 12.1, beta 5.8 | 7.4; auto names what it chose as well."""
    names = dict.fromkeys(name for chosen in row["parameters"] for name in chosen)
    values = [
        f"{name} {' | '.join(f'{chosen[name]:.3g}' if name in chosen else '-' for chosen in row['parameters'])}"
        for name in names
    ]
    return "; ".join([" | ".join(row["chosen"])] * (row["method"] == AUTO) + [", ".join(values)] * bool(values))


def percent(mean: float, spread: float) -> str:
    return f"{100 * mean:.1f} ± {100 * spread:.1f}"


def write_json(path: Path, rows: Sequence[Row]) -> None:
    harness.write_json(path, rows)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """The rows of accuracy; a value that is a list or a dictionary is written as JSON."""
    rows = [row for row in rows if row["bench"] == "accuracy"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: _cell(v) for k, v in row.items()})


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return escaped(value)
    return json.dumps(value) if isinstance(value, list | dict) else value


MARKDOWN = (
    *("data", "method", "reducer", "shots", "accuracy", "spread", "test images", "classes", "seeds", "tuned on"),
    *("tuned to", "parameters", "tune s", "fit s"),
)


def write_markdown(path: Path, rows: Sequence[Row]) -> None:
    """Accuracy, and overlap where there is any, each as one table; what all rows share stands above."""
    versions = ", ".join(f"{name} {found}" for name, found in rows[0]["versions"].items())
    lines = [f"{rows[0]['device']}; {versions}; {rows[0]['commit']}", ""]
    lines += markdown(MARKDOWN, [_cells(row) for row in rows if row["bench"] == "accuracy"])
    overlap = [row for row in rows if row["bench"] == "overlap"]
    if overlap:
        cells = [
            [row["data"], row["embeddings"], *(f"{row[name]:.4f}" for name in OVERLAP), str(row["images"])]
            for row in overlap
        ]
        lines += [
            "",
            *markdown(("data", "embeddings", *(name.replace("_", " ") for name in OVERLAP), "images"), cells),
        ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cells(row: Row) -> list[str]:
    spread = f"std {row['std']:.4f}" if row["se"] is None else f"se {row['se']:.4f}"
    accuracies = ["-" if value is None else f"{value:.4f}" for value in row["tuned_accuracy"]]
    return [
        *(str(row[name]) for name in ("data", "method", "reducer", "shots")),
        f"{row['mean']:.4f}",
        spread,
        *(_range(row[name]) for name in ("test_images", "classes")),
        " ".join(map(str, row["seeds"])),
        row["tuned_on"],
        " ".join(accuracies),
        parameters_of(row).replace("|", "/"),
        *(f"{sum(row[name]) / len(row[name]):.2f}" for name in ("tune_seconds", "fit_seconds")),
    ]


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines."""
    return ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows)]


def _range(values: Sequence[int]) -> str:
    """12, or 12 to 20."""
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"
