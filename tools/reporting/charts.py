"""The figures of the page: bars of what each encoder technique gives, and lines of how time grows with size.

matplotlib is imported when the first figure is drawn; which figures exist is known without it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from iosr_fast.utils.require import require
from tools.reporting.load import Results, Row
from tools.reporting.text import natural, number, percent

# Okabe and Ito's palette, which the colour-blind can tell apart.
BLUE, GREEN, ORANGE, GREY, INK = "#0072B2", "#009E73", "#D55E00", "#9A9A9A", "#222222"
LINES = (BLUE, GREEN, ORANGE, "#CC79A7", "#E69F00", "#56B4E9", "#6E6E6E")
# Parts of the names of implementations that are not ours; their lines are dashed.
RIVALS = ("two-pass", "papers-formula", "eager", "torch-fp32")
RUNTIMES = {"eager": "PyTorch", "torch-compile": "torch.compile", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
IMPL = re.compile(r"(?P<runtime>[\w-]+?)(?P<passes>-two-pass|-one-pass)?(-s(?P<first>\d+))?")
ENCODER = re.compile(r"(?P<model>.+)-b(?P<batch>\d+)(-s\d+)?")
SHAPE = re.compile(r"q(?P<queries>\d+)-k(?P<keys>\d+)-d(?P<width>\d+)-c(?P<classes>\d+)")


@dataclass(frozen=True)
class Chart:
    """A figure: its file, title and caption, the files its numbers come from, and how to draw it."""

    file: str
    title: str
    caption: str
    sources: tuple[str, ...]
    draw: Callable[[Path], None]


@dataclass(frozen=True)
class Bar:
    label: str
    row: Row
    colour: str


@dataclass(frozen=True)
class Panel:
    """Lines by name, each of points (x, y); x is logarithmic, y if it spans more than a decade."""

    heading: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def charts(results: Sequence[Results]) -> dict[str, list[Chart]]:
    """The figures that the rows allow, by the bench whose section they stand in."""
    return {
        "encoder": waterfalls(results),
        "scaling-encoder": batch_sweeps(results),
        "scaling-score": score_sweeps(results),
    }


def _grouped(results: Sequence[Results], bench: str, key: Callable[[Row], Any]) -> dict[Any, list[tuple[str, Row]]]:
    """(file, row) of one bench by machine and `key`, in an order that the order of the files does not change."""
    groups: dict[Any, list[tuple[str, Row]]] = {}
    for part in results:
        for row in part.rows.get(bench, []) if part.kind == "rows" else ():
            machine = f"{row.get('device')}, {row.get('threads')} threads"
            groups.setdefault((key(row), machine), []).append((part.name, row))
    order = sorted(groups, key=str)
    return {k: sorted(groups[k], key=lambda item: (natural(str(item[1]["case"])), repr(item))) for k in order}


def _add(
    charts: list[Chart], stem: str, title: str, caption: str, rows: Sequence[tuple[str, Row]], draw: Callable[..., None]
) -> None:
    """Append stem.png, or stem-2.png and so on if another machine's figure has that name."""
    same = sum(re.fullmatch(rf"{re.escape(stem)}(-\d)?\.png", other.file) is not None for other in charts)
    file = f"{stem}-{same + 1}.png" if same else f"{stem}.png"
    charts.append(Chart(file, title, caption, tuple(sorted({name for name, _ in rows})), partial(draw, title=title)))


def _encoder_case(row: Row) -> tuple[str, int]:
    """Model and batch of a case: vit-b-16-b8-s8 is ("vit-b-16", 8)."""
    match = ENCODER.fullmatch(str(row["case"]))
    return (match["model"], int(match["batch"])) if match else (str(row["case"]), 1)


def waterfalls(results: Sequence[Results]) -> list[Chart]:
    """A figure for each model, batch and machine with at least two techniques."""
    figures: list[Chart] = []
    precision = _grouped(results, "precision", _encoder_case)
    for key, rows in _grouped(results, "encoder", _encoder_case).items():
        (model, batch), machine = key
        bars, one_pass = encoder_bars([row for _, row in rows])
        if len(bars) < 2:
            continue
        narrow = sorted(precision.get(key, []), key=lambda item: -item[1]["runtime_ms"])
        bars += [Bar(f"precision: {row['impl']}", row, GREEN) for _, row in narrow]
        title = f"What each step gives: {model}, batch {batch}"
        caption = (
            f"Both embeddings of {batch} pictures, {machine}: ms a batch, and the speed-up over the first bar. Orange: "
            "the public way; grey: the same two passes, compiled; blue: ours in fp32"
        )
        if narrow:
            caption += "; green: the precision benchmark, whose own fp32 shows how far the two runs agree"
        if one_pass is not None:
            caption += "; dashed: the fastest compiled plain pass, which gives no adapted embedding"
        caption += "." if model == "demo" else ". The weights are random, which changes no speed."
        _add(figures, f"waterfall-{model}", title, caption, [*rows, *narrow], partial(draw_bars, bars, one_pass))
    return figures


def encoder_bars(rows: Sequence[Row]) -> tuple[list[Bar], Row | None]:
    """Bars for rows of one encoder case, and the row of the fastest compiled plain pass.

    Shown are two passes with the adapters as late as they are measured, and ours from there and from block 0 on.
    """
    by_kind: dict[tuple[str, str, int], Row] = {}
    for row in rows:
        match = IMPL.fullmatch(str(row["impl"]))
        if match is not None and match["runtime"] in RUNTIMES:
            by_kind[match["passes"] or "", match["runtime"], int(match["first"] or -1)] = row
    late = max((first for passes, _, first in by_kind if passes == "-two-pass"), default=0)
    bars = []
    for runtime, name in RUNTIMES.items():
        if row := by_kind.get(("-two-pass", runtime, late)):
            bars.append(Bar(f"two passes, {name}", row, ORANGE if runtime == "eager" else GREY))
    for first in sorted({0, late}):
        for runtime, name in RUNTIMES.items():
            if row := by_kind.get(("", runtime, first)):
                bars.append(Bar(f"fused, adapters from block {first}, {name}", row, BLUE))
    one_pass = [row for (passes, _, _), row in by_kind.items() if passes == "-one-pass"]
    return bars, min(one_pass, key=lambda row: float(row["runtime_ms"]), default=None)


def batch_sweeps(results: Sequence[Results]) -> list[Chart]:
    """A figure for each model and machine with several batch sizes: pictures a second."""
    figures: list[Chart] = []
    for (model, machine), rows in _grouped(results, "scaling-encoder", lambda row: _encoder_case(row)[0]).items():
        lines: dict[str, list[tuple[float, float]]] = {}
        for _, row in rows:
            batch = _encoder_case(row)[1]
            lines.setdefault(_line(row), []).append((batch, 1e3 * batch / row["runtime_ms"]))
        if max(map(len, lines.values())) > 1:
            panels = [Panel("", "batch", "pictures a second, both embeddings", lines)]
            caption = f"{machine}; higher is better."
            title = f"Throughput and batch size: {model}"
            _add(figures, f"throughput-{model}", title, caption, rows, partial(draw_lines, panels))
    return figures


def score_sweeps(results: Sequence[Results]) -> list[Chart]:
    """A figure for each machine: a panel for each of classes, keys and queries that varies alone."""
    figures: list[Chart] = []
    for (_, machine), rows in _grouped(results, "scaling-score", lambda row: "").items():
        if panels := [panel for along in ("classes", "keys", "queries") if (panel := _swept(rows, along))]:
            title = f"Scoring with more {', '.join(panel.x_label for panel in panels)}"
            caption = f"{machine}; lower is better; the other sizes stand above each panel."
            _add(figures, "scaling-score", title, caption, rows, partial(draw_lines, panels))
    return figures


def _swept(rows: Sequence[tuple[str, Row]], along: str) -> Panel | None:
    """The largest set of rows whose shapes differ in `along` only; None without two such shapes."""
    by_others: dict[tuple[tuple[str, int], ...], dict[str, list[tuple[float, float]]]] = {}
    for _, row in rows:
        if match := SHAPE.search(str(row["case"])):
            shape = {name: int(value) for name, value in match.groupdict().items()}
            x = shape.pop(along)
            by_others.setdefault(tuple(shape.items()), {}).setdefault(_line(row), []).append((x, row["runtime_ms"]))
    others, lines = max(by_others.items(), key=lambda item: max(map(len, item[1].values())), default=((), {}))
    if not lines or max(map(len, lines.values())) < 2:
        return None
    return Panel(", ".join(f"{number(value)} {name}" for name, value in others), along, "ms", lines)


def _line(row: Row) -> str:
    """The implementation, and its precision if that is not fp32 and not in the name."""
    impl, bits = str(row["impl"]), str(row.get("precision") or "fp32")
    return impl if bits == "fp32" or bits in impl else f"{impl}:{bits}"


def draw_bars(bars: Sequence[Bar], one_pass: Row | None, path: Path, title: str) -> None:
    """Horizontal bars from the top down, each with its time, its speed-up over the first, and its accuracy."""
    figure = new_figure(8.0, 0.9 + 0.36 * len(bars))
    axis = figure.subplots()
    times = [float(bar.row["runtime_ms"]) for bar in bars]
    axis.barh(range(len(bars)), times, color=[bar.colour for bar in bars], height=0.66)
    for y, (bar, ms) in enumerate(zip(bars, times, strict=True)):
        label = f"{number(ms)} ms" + (f"   {times[0] / ms:.2f}x" if y else "")
        if bar.row.get("accuracy") is not None:
            label += f"   {percent(bar.row['accuracy'], bar.row.get('accuracy_std'))} %"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}  # the dashed line may cross a label
        axis.annotate(label, (ms, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9, bbox=box)
    axis.set_yticks(range(len(bars)), [bar.label for bar in bars], fontsize=9.5)
    axis.set_ylim(len(bars) - 0.4, -0.6)
    axis.set_xlim(0, 1.3 * max(times))
    axis.set_xlabel("ms a batch", fontsize=9)
    if one_pass is not None:
        axis.axvline(one_pass["runtime_ms"], color=INK, linewidth=1, linestyle="--", zorder=2.5)
    clean_axis(axis, "x")
    save_figure(figure, path, title)


def draw_lines(panels: Sequence[Panel], path: Path, title: str) -> None:
    figure = new_figure(max(7.0, 3.2 * len(panels)), 4.2)
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    handles: dict[str, Any] = {}
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, points in panel.lines.items():
            dashes = "--" if any(rival in name for rival in RIVALS) else "-"
            colour = LINES[names.index(name) % len(LINES)]
            style = {"color": colour, "linestyle": dashes, "marker": "o", "markersize": 4, "linewidth": 1.5}
            handles[name] = axis.semilogx(*zip(*sorted(points), strict=True), **style)[0]
        values = [y for points in panel.lines.values() for _, y in points]
        if max(values) > 10 * min(values):
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, 1.1 * max(values))
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}")
        axis.set_title(panel.heading, fontsize=8.5, color=INK)
        axis.set_xlabel(panel.x_label, fontsize=9)
        axis.set_ylabel(panel.y_label, fontsize=9)
        clean_axis(axis, "both")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8.5, frameon=False)
    save_figure(figure, path, title)


def new_figure(width: float, height: float) -> Any:
    return require("matplotlib.figure", "train").Figure((width, height), layout="constrained", facecolor="white")


def clean_axis(axis: Any, grid: str) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=INK, labelsize=9, length=3)
    axis.set_axisbelow(True)
    axis.grid(axis=grid, color="#E6E6E6", linewidth=0.8)


def save_figure(figure: Any, path: Path, title: str) -> None:
    """As PNG or WebP, by the suffix of `path`."""
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", color=INK, fontweight="bold")
    webp = {"pil_kwargs": {"lossless": True, "method": 6}}
    figure.savefig(path, dpi=120, **webp if path.suffix == ".webp" else {"metadata": {"Software": None}})
