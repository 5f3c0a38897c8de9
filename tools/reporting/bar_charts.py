"""Bars: what pipelines reach, and what fewer bits give and cost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tools.reporting import style
from tools.reporting.load import Results
from tools.reporting.style import Found, Plot
from tools.reporting.text import short
from tools.reporting.waterfall import runtime_label


def pipelines(results: Sequence[Results]) -> list[Plot]:
    """A figure for each case and machine: pictures a second."""
    made: list[Plot] = []
    found = [one for one in style.rows_of(results, "pipeline") if one.row.get("rate") is not None]
    for (case, unit, where), rows in style.groups(
        found, lambda row: (row["case"], row.get("rate_unit"), style.machine(row))
    ):
        title = f"Folders of pictures: {case}"
        told = f"{where}; {unit}, more is better. What only encodes is the limit."
        # Its bar would leave no room for the others to differ.
        decoding = [one for one in rows if one.row["impl"] == "decode-only"]
        if decoding and len(rows) > 1:
            told = f"{told[:-1]}; decoding alone does {short(decoding[0].row['rate'])}."
            shown = [one for one in rows if one not in decoding]
        else:
            shown = list(rows)
        draw = partial(draw_pipeline, shown, str(unit), title)
        made.append(Plot(style.free_name("pipeline", made), title, told, style.sources(rows), draw))
    return made


def draw_pipeline(rows: Sequence[Found], unit: str, title: str, path: Path) -> None:
    shown = sorted(rows, key=lambda one: (-one.row["rate"], str(one.row["impl"])))
    made = style.figure(style.WIDTH, 0.9 + 0.42 * len(shown))
    axis = made.subplots()
    impls = [str(one.row["impl"]) for one in shown]
    tints = [
        style.RIVAL if style.is_rival(impl) else style.GREY if impl.endswith("-only") else style.OURS for impl in impls
    ]
    style.bars(axis, impls, [one.row["rate"] for one in shown], tints, [short(one.row["rate"]) for one in shown])
    axis.set_xlabel(unit, fontsize=9)
    style.save(made, path, title)


def precisions(results: Sequence[Results]) -> list[Plot]:
    """A figure for each case and machine that has an fp32 row to compare with."""
    made: list[Plot] = []
    for (case, where), rows in style.groups(
        style.rows_of(results, "precision"), lambda row: (row["case"], style.machine(row))
    ):
        base = [one for one in rows if one.row.get("precision") == "fp32"]
        if not base or len(rows) < 2:
            continue
        title = f"Fewer bits: {case}"
        told = (
            f"{where}; speed against the fastest fp32 of the same run, the least cosine with fp32's embeddings, and "
            "accuracy where the weights are not random."
        )
        name = style.free_name(f"precision-{case}", made)
        fastest = min(base, key=lambda one: (one.row["runtime_ms"], str(one.row["impl"])))
        made.append(Plot(name, title, told, style.sources(rows), partial(draw_precision, rows, fastest, title)))
    return made


def draw_precision(rows: Sequence[Found], base: Found, title: str, path: Path) -> None:
    shown = sorted(rows, key=lambda one: (-one.row["runtime_ms"], str(one.row["impl"])))
    panels = [key for key in ("min_cosine", "accuracy") if any(one.row.get(key) is not None for one in shown)]
    made = style.figure(style.WIDTH, 1.0 + 0.4 * len(shown))
    grid = made.subplots(1, 1 + len(panels), sharey=True, squeeze=False, width_ratios=[2.2, *[1] * len(panels)])[0]
    names = [f"{runtime_label(one.row)}, {one.row.get('precision')}" for one in shown]
    gains = [base.row["runtime_ms"] / one.row["runtime_ms"] for one in shown]
    tints = [style.GREY if one.row.get("precision") == "fp32" else style.OURS for one in shown]
    style.bars(grid[0], names, gains, tints, [f"{gain:.2f}x" for gain in gains])
    grid[0].axvline(1.0, color=style.INK, linewidth=1, linestyle=(0, (4, 3)), zorder=3)
    grid[0].set_xlabel("times as fast as fp32", fontsize=9)
    for axis, key in zip(grid[1:], panels, strict=True):
        scale, digits = (100, 1) if key == "accuracy" else (1, 4)
        for y, one in enumerate(shown):
            value = one.row.get(key)
            if value is None:
                continue
            error = one.row.get("accuracy_std") if key == "accuracy" else None
            axis.errorbar(
                scale * value,
                y,
                xerr=None if error is None else scale * error,
                fmt="o",
                color=tints[y],
                markersize=5,
                capsize=2,
            )
            axis.annotate(
                f"{scale * value:.{digits}f}",
                (scale * value, y),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
            )
        axis.margins(x=0.35)
        axis.locator_params(axis="x", nbins=2 if key == "min_cosine" else 3)
        axis.ticklabel_format(axis="x", useOffset=False)
        axis.set_xlabel("accuracy in %" if key == "accuracy" else "least cosine with fp32", fontsize=9)
        style.clean(axis, "x")
        axis.tick_params(axis="y", length=0, labelleft=False)
    style.save(made, path, title)
