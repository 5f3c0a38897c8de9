"""Figures of an evaluation as PNG files. matplotlib is imported when the first is drawn."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.utils.require import require
from tools.evaluation.accuracy import AUTO, TUNED_ON, Result

# The grid of alphas of the paper's public code (akres001/CLIP_fewshot_imo).
PUBLIC_ALPHAS = np.linspace(0.0, 20.0, 200)
FAMILIES = ("tip-adapter", "tip-x", "ape", "gda", "proker")
REFERENCES = {"zero-shot": "0.5", AUTO: "k"}  # drawn in every panel, with their colours
REDUCER_STYLES = {"none": ("o", "C0"), "centre": ("s", "C1"), "pca": ("^", "C2")}
DPI = 120


def family(method: str) -> str:
    return method.removesuffix("++")


def _grid(n_panels: int, columns: int, width: float, height: float, x_label: str) -> tuple[Any, list[Any]]:
    """A figure with n_panels axes on shared scales, in rows of at most `columns`."""
    columns = min(columns, n_panels)
    n_rows = -(-n_panels // columns)
    size = (width * columns, height * n_rows)
    figure = require("matplotlib.figure", "train").Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(n_rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for i, axis in enumerate(axes[:n_panels]):
        axis.grid(alpha=0.3)
        if i + columns >= n_panels:
            axis.tick_params(labelbottom=True)
            axis.set_xlabel(x_label)
    for axis in axes[n_panels:]:
        axis.set_axis_off()
    return figure, axes[:n_panels]


def _save(figure: Any, path: Path, title: str) -> None:
    inches = figure.get_size_inches()[0]
    figure.suptitle(textwrap.fill(title, int(11 * inches)), fontsize=10)
    figure.savefig(path, dpi=DPI)


def plot_shots(results: Sequence[Result], path: Path, title: str) -> None:
    """Accuracy against shots, a panel a family of methods; zero-shot and auto in each for comparison."""
    shown = [name for name in FAMILIES if any(family(result.method) == name for result in results)] or ["methods"]
    figure, axes = _grid(len(shown), 3, 4.2, 3.4, "shots")
    shots = sorted({result.shots for result in results})
    lines: dict[str, Any] = {}
    for axis, name in zip(axes, shown, strict=True):
        for method, reducer in dict.fromkeys((result.method, result.reducer) for result in results):
            own = family(method) == name
            if not own and method not in REFERENCES:
                continue
            line = [result for result in results if (result.method, result.reducer) == (method, reducer)]
            marker, colour = REDUCER_STYLES.get(reducer, ("D", "C3")) if own else ("", REFERENCES[method])
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
    curves = [r for r in results if family(r.method) == "tip-adapter" and r.draws[0].tuned.curve is not None]
    return [result for result in curves if result.shots == max(other.shots for other in curves)]


def plot_alpha(results: Sequence[Result], path: Path, title: str) -> None:
    """Accuracy against alpha, on the images that alpha was chosen on: exactly, and at the public grid's points."""
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
    counts: np.ndarray = right[segment]
    return counts
