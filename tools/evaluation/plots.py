"""Figures of an evaluation, as PNG files. matplotlib is imported when the first is drawn."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.utils.require import require
from tools.evaluation.accuracy import AUTO, TUNED_ON, Result

# The grid of alphas of the paper's public code (akres001/CLIP_fewshot_imo).
PUBLIC_ALPHAS = np.linspace(0.0, 20.0, 200)
FAMILIES = ("tip-adapter", "tip-x", "ape", "gda", "proker")
COLOURS = dict(zip((*FAMILIES, "zero-shot", AUTO), ("C0", "C1", "C2", "C3", "C4", "0.5", "k"), strict=True))
REDUCER_STYLES = {"none": ("o", "C0"), "centre": ("s", "C1"), "pca": ("^", "C2")}
DPI = 120


def family(method: str) -> str:
    return method.removesuffix("++")


def _figure(width: float, height: float) -> Any:
    return require("matplotlib.figure", "train").Figure(figsize=(width, height), layout="constrained")


def _grid(n_panels: int, columns: int, width: float, height: float, along: str) -> tuple[Any, list[Any]]:
    """A figure with n_panels axes on shared scales, in rows of at most `columns`, and what their x axis is."""
    columns = min(columns, n_panels)
    n_rows = -(-n_panels // columns)
    figure = _figure(width * columns, height * n_rows)
    axes = list(figure.subplots(n_rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for i, axis in enumerate(axes[:n_panels]):
        axis.grid(alpha=0.3)
        if i + columns >= n_panels:
            axis.tick_params(labelbottom=True)
            axis.set_xlabel(along)
    for axis in axes[n_panels:]:
        axis.set_axis_off()
    return figure, axes[:n_panels]


def _save(figure: Any, path: Path, title: str) -> None:
    inches = figure.get_size_inches()[0]
    figure.suptitle(textwrap.fill(title, int(11 * inches)), fontsize=10)
    figure.savefig(path, dpi=DPI)


def plot_shots(results: Sequence[Result], path: Path, title: str) -> None:
    """Accuracy against shots, a panel a family of methods; zero-shot and auto in each, to compare with."""
    shown = [name for name in FAMILIES if any(family(result.method) == name for result in results)] or ["methods"]
    figure, axes = _grid(len(shown), 3, 4.2, 3.4, "shots")
    shots = sorted({result.shots for result in results})
    lines: dict[str, Any] = {}
    for axis, name in zip(axes, shown, strict=True):
        for method, reducer in dict.fromkeys((result.method, result.reducer) for result in results):
            own = family(method) == name
            if not own and method not in ("zero-shot", AUTO):
                continue
            line = [result for result in results if (result.method, result.reducer) == (method, reducer)]
            marker, colour = REDUCER_STYLES.get(reducer, ("D", "C3")) if own else ("", COLOURS[method])
            kind = f"{'adapted' if method.endswith('++') else 'plain'}, {reducer}" if own else method
            lines[kind] = axis.errorbar(
                [result.shots for result in line],
                [100 * result.mean for result in line],
                [100 * result.spread for result in line] if method != "zero-shot" else None,
                color=colour,
                marker=marker,
                markersize=4,
                linewidth=1.2,
                capsize=2,
                linestyle="-" if method.endswith("++") or method == AUTO else ":" if method == "zero-shot" else "--",
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(shots, [str(k) for k in shots])
        axis.minorticks_off()
        axis.set_title(name)
    figure.legend(lines.values(), lines.keys(), loc="outside right center", fontsize=8, frameon=False)
    figure.supylabel("accuracy in %", fontsize=10)
    _save(figure, path, title)


def curves_of(results: Sequence[Result]) -> list[Result]:
    """Tip-Adapter's and Tip-Adapter++'s results at the most shots that have an exact curve of their first draw."""
    found = [
        result
        for result in results
        if family(result.method) == "tip-adapter" and result.draws[0].tuned.curve is not None
    ]
    return [result for result in found if result.shots == max(other.shots for other in found)]


def plot_alpha(results: Sequence[Result], path: Path, title: str) -> None:
    """Accuracy on the images that alpha was chosen on against alpha: all of it, and what the public grid sees of it."""
    shown = curves_of(results)
    figure, axes = _grid(len(shown), 2, 6.0, 3.2, "alpha")
    end = max(100.0, *(10 * result.draws[0].tuned.parameters["alpha"] for result in shown))
    for axis, result in zip(axes, shown, strict=True):
        tuned = result.draws[0].tuned
        assert tuned.curve is not None
        edges, right = tuned.curve
        percent = 100 * np.append(right, right[-1]) / tuned.scored
        left = np.append(np.maximum(edges[:-1], 1e-2), max(end, edges[-2]))
        axis.step(left, percent, where="post", color="C0", linewidth=1, label="every alpha, exactly")
        seen = 100 * accuracy_at(tuned.curve, PUBLIC_ALPHAS) / tuned.scored
        label = f"the public grid, 0 to 20: best {seen.max():.2f}%"
        axis.plot(PUBLIC_ALPHAS[1:], seen[1:], ".", color="C1", markersize=4, label=label)
        alpha = tuned.parameters["alpha"]
        label = f"chosen: alpha {alpha:.4g}, {100 * tuned.accuracy:.2f}%; the curve's best: {percent.max():.2f}%"
        axis.plot([alpha], [100 * tuned.accuracy], "*", color="C3", markersize=10, label=label)
        axis.set_xscale("log")
        axis.set_xlim(1e-1, end)
        axis.set_title(f"{result.name}, {result.shots} shots, beta {tuned.parameters['beta']:.3g}", fontsize=10)
        axis.legend(fontsize=7, loc="best")
    figure.supylabel("held-out images right, in %", fontsize=10)
    _save(figure, path, f"{title}: accuracy on the images that alpha was chosen on ({TUNED_ON[shown[0].protocol]})")


def accuracy_at(curve: tuple[np.ndarray, np.ndarray], alphas: np.ndarray) -> np.ndarray:
    """Samples right at each alpha; at an edge, those of the segment above it."""
    edges, right = curve
    segment = np.clip(np.searchsorted(edges, alphas, side="right") - 1, 0, len(right) - 1)
    found: np.ndarray = right[segment]
    return found


def plot_robustness(inside: Sequence[Result], across: Sequence[Result], path: Path, title: str) -> None:
    """Accuracy under the shift against accuracy in-domain at the most shots, one point a method and reducer."""
    figure = _figure(7.5, 6.5)
    axis = figure.subplots()
    shots = max(result.shots for result in inside)
    shifted = {(result.method, result.reducer): result for result in across if result.shots == shots}
    ends: list[float] = []
    unshown = ""
    for result in inside:
        other = shifted.get((result.method, result.reducer))
        if result.shots != shots or other is None:
            continue
        x, y = 100 * result.mean, 100 * other.mean
        if result.method == "zero-shot":  # far from all others, and no support set shifts it
            unshown = f"; zero-shot, not shown: {x:.1f} and {y:.1f}"
            continue
        ends += [x, y]
        marker = REDUCER_STYLES.get(result.reducer, ("D", ""))[0] if result.method != AUTO else "*"
        adapted = result.method.endswith("++") or result.method == AUTO
        colour = COLOURS[family(result.method)]
        fill = colour if adapted else "none"
        axis.errorbar(
            x, y, 100 * other.spread, 100 * result.spread, color=colour, marker=marker, markerfacecolor=fill,
            markersize=9 if result.method == AUTO else 6, elinewidth=0.5, capsize=0, linestyle="",
        )  # fmt: skip
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    axis.plot([low, high], [low, high], color="0.7", linewidth=1, zorder=0)
    axis.annotate("no loss", (high, high), xytext=(-40, -2), textcoords="offset points", fontsize=8, color="0.5")
    axis.set_xlabel("in-domain accuracy in %: styles mixed")
    axis.set_ylabel("shifted accuracy in %: queries in styles that the support lacks")
    axis.grid(alpha=0.3)
    for name in dict.fromkeys(family(result.method) for result in inside if result.method != "zero-shot"):
        axis.plot([], [], "*" if name == AUTO else "o", color=COLOURS[name], label=name)
    axis.legend(fontsize=8, frameon=False, loc="upper left")
    told = (
        f"{title}, {shots} shots; circle: as it is, square: centre, triangle: pca; filled: adapted embeddings; "
        f"bars: {'se' if inside[0].std is None else 'std over seeds'}{unshown}"
    )
    _save(figure, path, told)


def plot_sweep(rows: Sequence[Mapping[str, Any]], method: str, shots: int, path: Path) -> None:
    """Accuracy against the encoder's measured cost, on validation and on test, a line a width; square: no adapter."""
    figure = _figure(11, 4.6)
    axes = figure.subplots(1, 2, sharex=True)
    panels = (("validation", "validation_accuracy", "2"), ("test", "test_accuracy", str(shots)))
    for axis, (name, key, k) in zip(axes, panels, strict=True):
        for i, width in enumerate(dict.fromkeys(row["bottleneck"] for row in rows)):
            line = sorted((row for row in rows if row["bottleneck"] == width), key=lambda row: row["cost"])
            cells = [row[key][method][k] for row in line]
            axis.errorbar(
                [row["cost"] for row in line],
                [100 * cell["mean"] for cell in cells],
                [100 * (cell["std"] if cell["se"] is None else cell["se"]) for cell in cells],
                marker="s" if width is None else "o",
                markersize=4,
                capsize=2,
                elinewidth=0.6,
                linewidth=1,
                color="0.4" if width is None else f"C{i - 1}",
                label="no adapter" if width is None else f"bottleneck {width}",
            )
            for row, cell in zip(line, cells, strict=True):
                if width is not None:
                    axis.annotate(
                        f"{row['first_adapted_block']}",
                        (row["cost"], 100 * cell["mean"]),
                        xytext=(4, 5),
                        textcoords="offset points",
                        fontsize=9,
                        color=f"C{i - 1}",
                    )
        axis.set_title(f"{name} concepts, {k} shots", fontsize=10)
        axis.set_xlabel("encoder's cost, in plain passes")
        axis.set_ylabel("accuracy in %")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False, loc="lower right")
    _save(figure, path, f"{method} by the adapter's first block (the number at a point) and width")
