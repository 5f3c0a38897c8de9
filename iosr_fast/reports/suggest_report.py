"""Suggestions as a page on which labels are typed and saved as the CSV that `iosr-fast fit` reads."""

from __future__ import annotations

from collections.abc import Sequence

from iosr_fast.files.suggest import FolderSuggestions
from iosr_fast.reports.page import (
    cards,
    element,
    join,
    label_field,
    note,
    page,
    percent,
    picture,
    save_labels,
    thumbnail,
)

_SIDE = 256  # of a picture, in pixels


def suggest_page(suggestions: FolderSuggestions, classes: Sequence[str], title: str, exif_orientation: bool) -> str:
    """The HTML file; `classes` are offered as labels."""
    items, paths = [], [str(path.resolve()) for path in suggestions.paths]
    for k, (path, label, probability) in enumerate(suggestions):
        stands = int(suggestions.stands[k])
        guess = f"taken for {label} at {percent(probability, 0)}; " if label else ""
        items.append(
            join(
                element("div", picture(thumbnail(path, _SIDE, exif_orientation), path.name), class_="large"),
                note(f"{path.name}; {guess}stands for {stands} image{'' if stands == 1 else 's'}"),
                label_field(paths[k]),
            )
        )
    return page(
        title,
        cards(items, len(items)),
        save_labels(paths, classes),
        lead=f"{len(suggestions)} of {suggestions.images} images, the most useful first. Type a label below an image: "
        "a class or a new name. Leave out what belongs to no class. The browser keeps what you type, if it can. Then "
        "save the CSV for iosr-fast fit.",
        scripts=("labels.js",),
    )
