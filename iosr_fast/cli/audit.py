"""The command `iosr-fast audit`."""

from __future__ import annotations

from iosr_fast.cli.command import say, write_figures, write_new
from iosr_fast.cli.options import Html, Json, SavedClassifier, echo_first, rows_in
from iosr_fast.exceptions import IosrFastError


def audit(classifier: SavedClassifier, html: Html = None, json_path: Json = None) -> None:
    """Find mistakes in a saved classifier's images: wrong labels, duplicates, confused classes.

    Labels that are likely wrong are printed with the label that they should have; where pictures may have several,
    those that are missing, too. --html shows each with its picture and the images that say so, takes the right labels
    and saves them as labels.csv; `iosr-fast fit support/ labels.csv` fits on them. Images are named by their files and
    ids; remove_examples and relabel take ids.
    """
    from iosr_fast.classifier import Classifier
    from iosr_fast.reports.audit_report import audit_page, named

    rows = rows_in(classifier)
    loaded = Classifier.load(classifier)
    if html is not None and rows is not None and not loaded.snapshot().examples.paths:
        raise IosrFastError(f"--html shows pictures, and {classifier} has none: give `paths` to FewShotHead.fit")
    found = loaded.audit()
    say(*found.summary().split("\n"))
    suspects = [(named(one.image, one.path), one) for one in found.likely_wrong]
    wrong = [f"{name}: {one.finding} ({one.suspicion:.0%})" for name, one in suspects]
    echo_first("likely wrong:", wrong, most=20, by="--json" if rows else "--html or --json")
    if html is not None:
        write_new(html, audit_page(found, loaded.picture, f"Audit of {classifier.name}"))
    if json_path is not None:
        write_figures(json_path, found.to_dict())
