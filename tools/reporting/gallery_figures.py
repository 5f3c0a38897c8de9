"""The figures of the gallery: accuracy by shots and method, a grid of classified pictures, what predictions rest on."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from iosr_fast.state.predictions import ClassScore, Prediction
from tools.reporting.charts import BLUE, GREEN, INK, LINES, ORANGE, clean_axis, new_figure, save_figure
from tools.reporting.load import Row

COLUMNS = 6
PARTS = {"texts": BLUE, "examples": LINES[4], "adapter": LINES[3]}  # of a logit
RIGHT, WRONG = "\N{CHECK MARK}", "\N{BALLOT X}"


@dataclass(frozen=True)
class Answer:
    """A picture (H, W, 3) uint8 of the class `truth`, and the label and probability that it got."""

    picture: np.ndarray
    truth: str
    label: str
    probability: float

    @property
    def right(self) -> bool:
        return self.label == self.truth


# An answer, its reasons, and a thumbnail (WebP) of each nearest support picture.
Explained = tuple[Answer, Prediction, Sequence[bytes]]


def draw_accuracy(rows: Sequence[Row], path: Path) -> None:
    """A panel for methods on plain embeddings and one for those on adapted ones: means and standard deviations."""
    figure = new_figure(9.0, 4.2)
    panels = figure.subplots(1, 2, sharey=True)
    families = list(dict.fromkeys(row["method"].removesuffix("++") for row in rows))
    for axis, heading, adapted in zip(panels, ("plain embeddings", "with the adapter"), (False, True), strict=True):
        shown = [row for row in rows if (row["method"].endswith("++") or row["method"] == "auto") == adapted]
        methods = list(dict.fromkeys(row["method"] for row in shown))
        for i, method in enumerate(methods):
            own = sorted((row for row in shown if row["method"] == method), key=lambda row: row["shots"])
            shots, means, spreads = (np.array([row[key] for row in own]) for key in ("shots", "mean", "std"))
            shots = shots * 1.04 ** (i - (len(methods) - 1) / 2)  # so that bars do not hide one another
            colour = LINES[families.index(method.removesuffix("++")) % len(LINES)]
            style = {"color": colour, "marker": "o", "markersize": 4, "linewidth": 1.3, "capsize": 2.5, "elinewidth": 1}
            axis.errorbar(shots, 100 * means, 100 * spreads, label=method, **style)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({row["shots"] for row in rows}))
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_ylim(0, 110 * max(row["mean"] for row in rows))
        axis.set_title(heading, fontsize=9.5, color=INK)
        axis.set_xlabel("pictures of a class", fontsize=9)
        axis.legend(fontsize=8.5, frameon=False, loc="upper left")
        clean_axis(axis, "y")
    panels[0].set_ylabel("accuracy, %", fontsize=9)
    save_figure(figure, path, "Accuracy by shots and method")


def draw_grid(answers: Sequence[Answer], path: Path) -> None:
    """Each picture with its label and probability, and its true class where the label is wrong."""
    n_rows = -(-len(answers) // COLUMNS)
    figure = new_figure(9.0, 0.4 + 1.75 * n_rows)
    axes = list(figure.subplots(n_rows, COLUMNS, squeeze=False).flat)
    for axis, answer in zip(axes, answers, strict=False):
        _show(axis, answer.picture, GREEN if answer.right else ORANGE)
        _caption(axis, answer)
    for axis in axes[len(answers) :]:
        axis.set_axis_off()
    save_figure(figure, path, "Pictures of a folder and their labels")


def draw_explanations(explained: Sequence[Explained], path: Path) -> None:
    """A row for each picture: the picture, the parts of its highest logits, and its nearest support pictures."""
    most = max(len(thumbnails) for _, _, thumbnails in explained)
    figure = new_figure(9.0, 0.4 + 2.4 * len(explained))
    grid = figure.add_gridspec(len(explained), 2 + most, width_ratios=[1, 2.6, *[0.75] * most])
    parts = None
    for i, (answer, prediction, thumbnails) in enumerate(explained):
        axis = figure.add_subplot(grid[i, 0])
        _show(axis, answer.picture, GREEN if answer.right else ORANGE)
        _caption(axis, answer)
        parts = figure.add_subplot(grid[i, 1], sharex=parts)
        _draw_parts(parts, prediction)
        for j, (thumbnail, neighbour) in enumerate(zip(thumbnails, prediction.nearest, strict=True)):
            axis = figure.add_subplot(grid[i, 2 + j])
            _show(axis, _decoded(thumbnail), "#BBBBBB")
            axis.set_xlabel(f"{fill(neighbour.label, 12)}\ncosine {neighbour.similarity:.2f}", fontsize=8, color=INK)
            if j == 0:
                axis.set_title("nearest support pictures", fontsize=8.5, color=INK, loc="left")
    save_figure(figure, path, "What two predictions rest on")


def _parts(one: ClassScore) -> dict[str, float]:
    return {"texts": one.zero_shot, "examples": one.cache - one.adapter, "adapter": one.adapter}


def _draw_parts(axis: Any, prediction: Prediction) -> None:
    """The parts of the highest logits, stacked. Each starts at its minimum over these classes, as on the server's page:
    softmax depends on differences only. A part that no class has is left out."""
    top, rows = prediction.top, range(len(prediction.top))
    used = [name for name in PARTS if any(_parts(one)[name] for one in top)]
    ends = np.zeros(len(top))
    for name in used:
        lengths = np.array([_parts(one)[name] for one in top])
        lengths -= lengths.min()
        axis.barh(rows, lengths, 0.5, left=ends, color=PARTS[name], label=name)
        ends += lengths
    for y, (one, end) in enumerate(zip(top, ends, strict=True)):
        place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8.5}
        axis.annotate(f"{one.probability:.0%}", (end, y), **place)
    axis.set_yticks(rows, [f"{fill(one.label, 22)}\n{_sum(one, used)}" for one in top])
    axis.set_xlim(0, max(axis.get_xlim()[1], 1.15 * max(ends)))
    axis.invert_yaxis()
    clean_axis(axis, "x")
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=8, frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)


def _sum(one: ClassScore, used: Sequence[str]) -> str:
    first, *others = (_parts(one)[name] for name in used)
    signed = "".join(f" {'-' if value < 0 else '+'} {abs(value):.1f}" for value in others)
    return f"{first:.1f}{signed} = {one.logit:.1f}"


def _show(axis: Any, picture: np.ndarray, colour: str) -> None:
    axis.imshow(picture, interpolation="bilinear")
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set(color=colour, linewidth=2)


def _caption(axis: Any, answer: Answer) -> None:
    text = f"{RIGHT if answer.right else WRONG} {fill(answer.label, 18)}\n{answer.probability:.0%}"
    if not answer.right:
        text += f"\ntruth: {fill(answer.truth, 17)}"
    axis.set_xlabel(text, fontsize=8, color=INK)


def _decoded(thumbnail: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(thumbnail), formats=["WEBP"]).convert("RGB"))
