"""How the figures of the page look: colours that the colour-blind can tell apart, light ground, no decoration.

matplotlib is imported when the first figure is drawn; which figures there are is known without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iosr_fast.utils.require import require
from tools.reporting.load import Results, Row
from tools.reporting.text import natural

DPI = 120
WIDTH = 8.0  # inches: 960 pixels, a README's width
# Okabe and Ito's palette: ours, rivals, what stands between.
OURS, SECOND, RIVAL, THIRD, GREY, INK = "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#9A9A9A", "#222222"
# Behind labels that a line may cross.
BOX = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
SERIES = (OURS, SECOND, THIRD, "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")

# What a row's implementation is called where it is not ours, and where it is what the public code does.
RIVALS = ("two-pass", "papers-formula", "eager-best", "torch-fp32", "obvious-script", "eager")
PUBLIC = ("papers-formula", "obvious-script", "eager-two-pass")


@dataclass(frozen=True)
class Plot:
    """A figure that the rows allow: its file, what it says, the files it is drawn from, and how to draw it."""

    file: str
    title: str
    told: str
    sources: tuple[str, ...]
    draw: Callable[[Path], None]


@dataclass(frozen=True)
class Found:
    """A row and the file that it is in."""

    name: str
    row: Row


def rows_of(results: Sequence[Results], bench: str) -> list[Found]:
    """CPU rows of one bench, of all files, in an order that the files' own order does not change."""
    found = [Found(part.name, row) for part in results if part.kind == "rows" for row in part.rows.get(bench, [])]
    return sorted(
        found,
        key=lambda one: (one.name, natural(str(one.row.get("case"))), natural(str(one.row.get("impl"))), repr(one.row)),
    )


def machine(row: Row) -> str:
    """Rows may stand beside each other in a figure only where this agrees."""
    threads = row.get("threads")
    return f"{row.get('device', 'device not told')}" + (f", {threads} threads" if threads is not None else "")


def series(row: Row) -> str:
    """A line's name: the implementation, and its precision where that is not fp32 and the name does not say it."""
    impl, bits = str(row["impl"]), str(row.get("precision") or "fp32")
    return impl if bits == "fp32" or bits in impl else f"{impl}:{bits}"


def sources(found: Sequence[Found]) -> tuple[str, ...]:
    return tuple(sorted({one.name for one in found}))


def groups(found: Sequence[Found], key: Any) -> list[tuple[Any, list[Found]]]:
    made: dict[Any, list[Found]] = {}
    for one in found:
        made.setdefault(key(one.row), []).append(one)
    return sorted(made.items(), key=lambda item: str(item[0]))


def is_rival(impl: str) -> bool:
    return any(name in impl for name in RIVALS)


def free_name(stem: str, made: Sequence[Plot]) -> str:
    """stem.png, or where another machine's figure has that name, stem-2.png and so on."""
    taken = {plot.file for plot in made}
    names = [f"{stem}.png", *(f"{stem}-{i}.png" for i in range(2, len(made) + 2))]
    return next(name for name in names if name not in taken)


def colours(impls: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each: ours in colours, the public way orange, other rivals grey."""
    made: dict[str, tuple[str, str]] = {}
    ours = [impl for impl in impls if not is_rival(impl)]
    for i, impl in enumerate(impls):
        if impl in ours:
            made[impl] = (SERIES[ours.index(impl) % len(SERIES)], MARKERS[i % len(MARKERS)])
        else:
            made[impl] = (RIVAL if any(name in impl for name in PUBLIC) else "#6E6E6E", MARKERS[i % len(MARKERS)])
    return made


def figure(width: float, height: float) -> Any:
    return require("matplotlib.figure", "train").Figure(
        figsize=(width, height), layout="constrained", facecolor="white"
    )


def clean(axis: Any, grid: str = "") -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#BBBBBB")
    axis.tick_params(colors=INK, labelsize=9, length=3)
    axis.set_axisbelow(True)
    if grid:
        axis.grid(axis=grid, color="#E6E6E6", linewidth=0.8)


def bars(
    axis: Any, names: Sequence[str], values: Sequence[float], colours: Sequence[str], labels: Sequence[str]
) -> None:
    """Horizontal bars from the top down, each with its name before and its number behind it."""
    places = range(len(names))
    axis.barh(places, values, color=colours, height=0.66)
    for y, value, label in zip(places, values, labels, strict=True):
        axis.annotate(
            label, (value, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9, color=INK, bbox=BOX
        )
    axis.set_yticks(places, names, fontsize=9.5)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlim(0, 1.22 * max(values))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,g}" if value < 1e6 else f"{value:,.0f}")
    clean(axis, "x")
    axis.tick_params(axis="y", length=0)


def ends(axis: Any, lines: Sequence[tuple[float, float, str, str]], gap: float = 12.0) -> None:
    """Names at the ends of lines, (x, y, name, colour) each, moved apart by `gap` points where they would overlap."""
    axis.figure.draw_without_rendering()
    scale = 72.0 / axis.figure.dpi
    heights = {name: axis.transData.transform((x, y))[1] * scale for x, y, name, _ in lines}
    below = None
    for x, y, name, colour in sorted(lines, key=lambda line: heights[line[2]]):
        wanted = heights[name] if below is None else max(heights[name], below + gap)
        below = wanted
        axis.annotate(
            name, (x, y), xytext=(7, wanted - heights[name]), textcoords="offset points", va="center", fontsize=9,
            color=colour, annotation_clip=False,
        )  # fmt: skip


def save(made: Any, path: Path, title: str) -> None:
    made.suptitle(title, fontsize=11, x=0.01, ha="left", color=INK, fontweight="bold")
    made.savefig(path, dpi=DPI, metadata={"Software": None})
