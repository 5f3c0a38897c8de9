"""Suggestions as a page on which labels are typed and saved as the CSV that `iosr-fast fit` reads."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from iosr_fast.files.suggest import FolderSuggestions
from iosr_fast.reports.page import cards, element, join, note, page, percent, picture, thumbnail

_SIDE = 256  # of a picture, in pixels


def suggest_page(suggestions: FolderSuggestions, classes: Sequence[str], title: str, exif_orientation: bool) -> str:
    """The HTML file; `classes` are offered as labels."""
    items = []
    for k, (path, label, probability) in enumerate(suggestions):
        stands = int(suggestions.stands[k])
        guess = f"taken for {label} at {percent(probability, 0)}; " if label else ""
        field = element("input", id=f"label-{k}", list="classes", data_path=str(path.resolve()), autocomplete="off")
        items.append(
            join(
                element("div", picture(thumbnail(path, _SIDE, exif_orientation), path.name), class_="large"),
                note(f"{path.name}; {guess}stands for {stands} image{'' if stands == 1 else 's'}"),
                element("label", "Label", for_=f"label-{k}", class_="quiet"),
                field,
            )
        )
    key = sha256("\0".join(str(path.resolve()) for path in suggestions.paths).encode()).hexdigest()
    return page(
        title,
        element("datalist", *(element("option", value=name) for name in classes), id="classes"),
        cards(items, len(items)),
        element(
            "div",
            element("button", "Save labels.csv", id="save", type="button", class_="button strong", data_key=key),
            element("span", id="status", role="status", class_="quiet"),
            class_="row actions",
        ),
        lead=f"{len(suggestions)} of {suggestions.images} images, the most useful first. Type a label below an image: "
        "a class or a new name. Leave out what belongs to no class. The browser keeps what you type, if it can. Then "
        "save the CSV for iosr-fast fit.",
        scripts=("labels.js",),
    )
