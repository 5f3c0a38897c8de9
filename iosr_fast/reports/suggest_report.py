"""Suggestions as a page on which labels are typed and saved as the CSV that `iosr-fast fit` reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from iosr_fast.files.suggest import FolderSuggestions
from iosr_fast.reports import page


def suggest_page(suggestions: FolderSuggestions, classes: Sequence[str], title: str, exif_orientation: bool) -> str:
    """The HTML file; `classes` are offered as labels."""
    paths = [str(Path(path).resolve()) for path in suggestions.paths]
    items = []
    for (_, label, probability), path, stands in zip(suggestions, paths, suggestions.stands.tolist(), strict=True):
        guess = f"taken for {label} at {page.percent(probability, 0)}; " if label else ""
        words = page.note(f"{Path(path).name}; {guess}stands for {stands} image{'' if stands == 1 else 's'}")
        items.append(page.join(page.large_photo(path, exif_orientation), words, page.label_field(path, label or None)))
    return page.document(
        title,
        page.cards(items, shown=len(items), look="large"),
        page.save_labels(paths, classes),
        lead=f"{len(suggestions)} of {suggestions.images} images, the most useful first. Type a label below an image: "
        "a class or a new name. Leave out what belongs to no class. The browser keeps what you type, if it can. Then "
        "save the CSV for iosr-fast fit.",
        scripts=("labels.js", "pictures.js"),
    )
