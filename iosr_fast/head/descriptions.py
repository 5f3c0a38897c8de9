"""Descriptions of classes: what a caller or a file gives, checked before a CLIP is opened."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from iosr_fast.backbones.prompts import MAX_TEXTS, text_fault
from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.csv_text import check_columns, read_rows
from iosr_fast.utils.text import abbreviate, did_you_mean


def check_descriptions(given: Any, names: Sequence[str], templates: Sequence[str] | None) -> dict[str, list[str]]:
    """The descriptions of each class that has some, out of `given`, a mapping of `names` to lists of texts, or None.

    Raises IosrFastError for anything else, a text that is none (text_fault), and a class without a text where
    `templates` is empty.
    """
    if not isinstance(given, Mapping | None):
        raise IosrFastError(f"expected descriptions as lists of texts by class name, got {type(given).__name__}")
    found = dict(given or {})
    known = frozenset(names)
    if unknown := [str(name) for name in found if name not in known]:
        near = did_you_mean(unknown[0], names, 3) or f"the classes are {abbreviate(names)}"
        raise IosrFastError(f"expected descriptions of classes by name, got {abbreviate(unknown)}; {near}")
    for name, texts in found.items():
        if not isinstance(texts, list | tuple) or not 1 <= len(texts) <= MAX_TEXTS:
            raise IosrFastError(f"expected a list of 1 to {MAX_TEXTS:,} descriptions of {name!r}, got {texts!r:.80}")
        for text in texts:
            if fault := text_fault(text):
                raise IosrFastError(f"expected descriptions of {name!r}, got {text!r:.80}, {fault}")
    if templates is not None and not templates and (missing := [name for name in names if name not in found]):
        raise IosrFastError(f"expected descriptions of each class with templates=[], got none of {abbreviate(missing)}")
    return {name: list(texts) for name, texts in found.items()}


def read_descriptions(file: str | Path) -> Any:
    """For `check_descriptions`: a .json file of an object of lists, or a CSV file with a row of class and text each."""
    file = Path(file)
    if file.suffix.lower() == ".json":
        try:
            return json.loads(file.read_text("utf-8-sig"), object_pairs_hook=_distinct)
        except ValueError as error:
            raise IosrFastError(f"can't read {file} as JSON in UTF-8: {error}") from error
    columns, rows = read_rows(file)
    check_columns(columns, file, ("class", "text"), ", or give a .json file of an object of lists")
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row["class"].strip(), []).append(row["text"])
    return found


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a name is there twice among {abbreviate([name for name, _ in pairs])}")
    return found
