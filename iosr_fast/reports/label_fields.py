"""Fields for labels below pictures, saved as the CSV of path and label that `iosr-fast fit` reads (labels.js)."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from typing import Any

from iosr_fast.reports.page import Html, element, join


def label_field(path: str, suggested: Any = None) -> Html:
    """The field of an image, by its absolute path; a button takes the `suggested` class."""
    field = element("input", list="classes", data_path=path, autocomplete="off")
    button = element("button", f"Take {suggested}", type="button", class_="button", data_label=suggested)
    return join(element("label", "Label", field, class_="quiet"), None if suggested is None else button)


def save_labels(paths: Iterable[str], classes: Iterable[Any]) -> Html:
    """The button that saves the labels of these images; `classes` are offered in their fields."""
    key = sha256("\0".join(paths).encode()).hexdigest()
    return join(
        element("datalist", *(element("option", value=name) for name in classes), id="classes"),
        element(
            "div",
            element("button", "Save labels.csv", id="save", type="button", class_="button strong", data_key=key),
            element("span", id="status", role="status", class_="quiet"),
            class_="row actions",
        ),
    )
