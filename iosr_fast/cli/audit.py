"""The command `iosr-fast audit`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from iosr_fast.cli.options import SavedClassifier
from iosr_fast.utils.command import new_file, new_page, say, write_new

_SHOWN = 20


def audit(
    classifier: SavedClassifier,
    html: Annotated[
        Path | None, typer.Option(callback=new_page, help="Write a page with the pictures here, one file.")
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", callback=new_file, help="Write the findings here, as JSON.")
    ] = None,
) -> None:
    """Find mistakes in a saved classifier's images: wrong labels, duplicates, confused classes.

    Labels that are likely wrong are printed with the label that they should have. --html shows each with its picture
    and the images that say so. Images are named by their ids; remove_examples takes these.
    """
    from iosr_fast.classifier import Classifier
    from iosr_fast.reports.audit_report import audit_page

    loaded = Classifier.load(classifier)
    found = loaded.audit()
    say(*found.summary().split("\n"))
    for suspect in found.likely_wrong[:_SHOWN]:
        say(f"  {suspect.image}: {suspect.label} is rather {suspect.suggested} ({suspect.suspicion:.0%})")
    if (more := len(found.likely_wrong) - _SHOWN) > 0:
        say(f"  and {more} more; --html or --json lists them")
    if html is not None:
        write_new(html, audit_page(found, loaded.picture, f"Audit of {classifier.name}"))
    if json_path is not None:
        write_new(json_path, json.dumps(found.to_dict(), indent=1, ensure_ascii=False) + "\n")
