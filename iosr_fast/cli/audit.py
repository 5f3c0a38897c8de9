"""The command `iosr-fast audit`."""

from __future__ import annotations

import json

from iosr_fast.cli.options import Html, Json, SavedClassifier, echo_first
from iosr_fast.utils.command import say, write_new


def audit(classifier: SavedClassifier, html: Html = None, json_path: Json = None) -> None:
    """Find mistakes in a saved classifier's images: wrong labels, duplicates, confused classes.

    Labels that are likely wrong are printed with the label that they should have. --html shows each with its picture
    and the images that say so. Images are named by their ids; remove_examples takes these.
    """
    from iosr_fast.classifier import Classifier
    from iosr_fast.reports.audit_report import audit_page

    loaded = Classifier.load(classifier)
    found = loaded.audit()
    say(*found.summary().split("\n"))
    wrong = [f"{one.image}: {one.label} is rather {one.suggested} ({one.suspicion:.0%})" for one in found.likely_wrong]
    echo_first("likely wrong:", wrong, most=20)
    if html is not None:
        write_new(html, audit_page(found, loaded.picture, f"Audit of {classifier.name}"))
    if json_path is not None:
        write_new(json_path, json.dumps(found.to_dict(), indent=1, ensure_ascii=False) + "\n")
