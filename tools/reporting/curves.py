"""Lines: throughput against latency, and scoring's time with more classes, keys and queries."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tools.reporting import style
from tools.reporting.load import Results
from tools.reporting.style import Found, Plot
from tools.reporting.text import number
from tools.reporting.waterfall import model_name, parse_case

SHAPE = re.compile(r"q(?P<q>\d+)-k(?P<k>\d+)-d(?P<d>\d+)-c(?P<c>\d+)")
AXES = {"c": "classes", "k": "keys", "q": "queries"}


def throughputs(results: Sequence[Results]) -> list[Plot]:
    """A figure for each model and machine whose rows have at least two batch sizes."""
    found = [one for one in style.rows_of(results, "scaling-encoder") if parse_case(str(one.row["case"])) is not None]
    made: list[Plot] = []
    for (model, where), rows in style.groups(found, lambda row: (_parsed(row)[0], style.machine(row))):
        if len({_parsed(one.row)[1] for one in rows}) < 2:
            continue
        title = f"Throughput against latency: {model_name(model)}"
        told = f"{where}; a point a batch size, which stands beside it; up and to the left is better."
        draw = partial(draw_throughput, rows, title)
        name = style.free_name(f"throughput-{model}", made)
        made.append(Plot(name, title, told, style.sources(rows), draw))
    return made


def _parsed(row: Any) -> tuple[str, int, int | None]:
    parsed = parse_case(str(row["case"]))
    assert parsed is not None
    return parsed


def draw_throughput(rows: Sequence[Found], title: str, path: Path) -> None:
    made = style.figure(style.WIDTH, 4.4)
    axis = made.subplots()
    impls = list(dict.fromkeys(style.series(one.row) for one in rows))
    last: list[tuple[float, float, str, str]] = []
    top, bottom = _outer(rows)
    for impl, (colour, marker) in style.colours(impls).items():
        line = sorted(
            (_parsed(one.row)[1], float(one.row["runtime_ms"])) for one in rows if style.series(one.row) == impl
        )
        x, y = [ms for _, ms in line], [1e3 * batch / ms for batch, ms in line]
        dashes = "--" if style.is_rival(impl) else "-"
        axis.plot(x, y, marker=marker, color=colour, linewidth=1.6, markersize=5, linestyle=dashes)
        # Between the outer two there is no room for numbers; the points stand in the same order there.
        for (batch, ms), rate in zip(line, y, strict=True):
            if impl in (top, bottom):
                axis.annotate(
                    f"{batch}", (ms, rate), xytext=(0, 6 if impl == top else -13), textcoords="offset points",
                    fontsize=8, color=colour, ha="center",
                )  # fmt: skip
        last.append((x[-1], y[-1], impl, colour))
    axis.set_xscale("log")
    axis.set_ylim(0, 1.1 * max(1e3 * _parsed(one.row)[1] / one.row["runtime_ms"] for one in rows))
    plain_ticks(axis.xaxis)
    axis.set_xlabel("ms a batch", fontsize=9)
    axis.set_ylabel("pictures a second, both embeddings", fontsize=9)
    style.clean(axis, "both")
    style.ends(axis, last)
    style.save(made, path, title)


def _outer(rows: Sequence[Found]) -> tuple[str, str]:
    """The implementations with the fastest and the slowest row at the largest batch."""
    largest = max(_parsed(one.row)[1] for one in rows)
    ordered = sorted((one.row["runtime_ms"], style.series(one.row)) for one in rows if _parsed(one.row)[1] == largest)
    return ordered[0][1], ordered[-1][1]


def plain_ticks(axis: Any, decades: int = 2) -> None:
    """1, 10, 100 rather than powers of ten; 1, 2, 5, 10 where the axis spans less than `decades` decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    if high < 10**decades * low:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value < 1000 else f"{value:,.0f}"))
    axis.set_minor_formatter(NullFormatter())


def shape(row: Any) -> dict[str, int] | None:
    made = SHAPE.search(str(row["case"]))
    return None if made is None else {name: int(value) for name, value in made.groupdict().items()}


def swept(rows: Sequence[Found], along: str) -> list[Found]:
    """The rows whose shapes differ along one axis alone, most shapes first; empty where there are fewer than two."""
    fixed: dict[tuple[int, ...], list[Found]] = {}
    for one in rows:
        found = shape(one.row)
        if found is not None:
            fixed.setdefault(tuple(found[name] for name in "qkdc" if name != along), []).append(one)

    def lengths(part: list[Found]) -> int:
        return len({str(one.row["case"]) for one in part})

    best = max(fixed.values(), key=lengths, default=[])
    return best if lengths(best) > 1 else []


def scalings(results: Sequence[Results]) -> list[Plot]:
    """A figure for each machine: a panel for each of classes, keys and queries that varies alone."""
    made: list[Plot] = []
    for where, rows in style.groups(style.rows_of(results, "scaling-score"), style.machine):
        panels = {along: part for along in AXES if (part := swept(rows, along))}
        if not panels:
            continue
        title = "Scoring with more " + ", ".join(AXES[along] for along in panels)
        told = f"{where}; both axes logarithmic, lower is better; the other sizes stand above each panel."
        used = [one for part in panels.values() for one in part]
        made.append(
            Plot(
                style.free_name("scaling-score", made),
                title,
                told,
                style.sources(used),
                partial(draw_scaling, panels, title),
            )
        )
    return made


def draw_scaling(panels: dict[str, list[Found]], title: str, path: Path) -> None:
    made = style.figure(style.WIDTH + 1.5, 3.9)
    axes = made.subplots(1, len(panels), squeeze=False)[0]
    impls = list(dict.fromkeys(style.series(one.row) for part in panels.values() for one in part))
    handles: dict[str, Any] = {}
    for axis, (along, rows) in zip(axes, panels.items(), strict=True):
        for impl, (colour, marker) in style.colours(impls).items():
            line = sorted(
                ((shape(one.row) or {})[along], one.row["runtime_ms"]) for one in rows if style.series(one.row) == impl
            )
            if line:
                dashes = "--" if style.is_rival(impl) else "-"
                handles[impl] = axis.plot(
                    *zip(*line, strict=True), color=colour, marker=marker, markersize=4, linewidth=1.5, linestyle=dashes
                )[0]
        fixed = shape(rows[0].row) or {}
        others = {**AXES, "d": "wide"}
        told = ", ".join(f"{number(fixed[name])} {others[name]}" for name in "qkcd" if name != along)
        axis.set_title(told, fontsize=8.5, color=style.INK)
        axis.set_xscale("log")
        axis.set_yscale("log")
        plain_ticks(axis.xaxis, decades=1)
        plain_ticks(axis.yaxis)
        axis.set_xlabel(AXES[along], fontsize=9)
        style.clean(axis, "both")
    axes[0].set_ylabel("ms", fontsize=9)
    last = {impl: line for impl, line in handles.items() if line.axes is axes[-1]}
    if len(last) == len(impls):
        style.ends(axes[-1], [(*line.get_xydata()[-1], impl, line.get_color()) for impl, line in last.items()])
    else:
        names = {"loc": "outside lower center", "ncols": min(4, len(handles)), "fontsize": 8.5, "frameon": False}
        made.legend(handles.values(), handles.keys(), **names)
    style.save(made, path, title)
