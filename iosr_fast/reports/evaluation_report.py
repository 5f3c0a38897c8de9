"""The evaluation of a classifier as a page: figures, and the mistakes with their pictures."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from iosr_fast.head.evaluation import MATRIX, Evaluation, Mistake
from iosr_fast.methods.conformal import BINS
from iosr_fast.reports.page import (
    Html,
    bar,
    cards,
    details,
    element,
    facts,
    first_of,
    join,
    line_chart,
    long_table,
    matrix,
    note,
    page,
    percent,
    picture,
    section,
    short_path,
    table,
)
from iosr_fast.reports.thumbnail import thumbnail

_SHOWN = 100  # rows of a table
_OPEN = 24  # mistakes, and rows of a table, that are in sight at once
_SIDE = 160  # of a picture, in pixels


def evaluation_page(
    found: Evaluation, picture_of: Callable[[str], bytes | None], title: str, exif_orientation: bool = True
) -> str:
    """The HTML file. Images are read again for their pictures; `picture_of` gives the thumbnail of a support image by
    its id, or None."""

    def card(one: Mistake) -> Html:
        small = thumbnail(one.image, _SIDE, exif_orientation)
        return _mistake(one, small, picture_of)

    low, high = found.interval
    unknown, more = found.unknown, len(found.mistakes) - _OPEN
    lead = "" if math.isnan(found.expected) else f" Left-out support images let expect {percent(found.expected)}."
    if found.copies:
        lead += f" {found.copies:,} are near duplicates of support images and say little about new ones."
    return page(
        title,
        facts(
            {
                "images right": percent(found.accuracy),
                "95% interval": f"{100 * low:.1f}–{percent(high)}",
                "images": f"{len(found.labels):,}",
                "classes": len(found.classes),
                "log-loss": f"{found.reliability.log_loss:.3f}",
                "calibration error": percent(found.reliability.error),
                **({"unknown rejected": percent(unknown.rejected)} if unknown.images and not unknown.reason else {}),
                **({"unreadable": len(found.errors)} if found.errors else {}),
            }
        ),
        section(
            "Mistakes",
            note(first_of("Wrong labels, the most probable first.", len(found.mistakes), found.wrong))
            if found.wrong
            else note("None."),
            cards(map(card, found.mistakes[:_OPEN])),
            details(f"{more} more", cards(map(card, found.mistakes[_OPEN:]))) if more > 0 else None,
        ),
        _confusion(found),
        _classes(found),
        _probabilities(found),
        _unknown(found, card),
        section("Unreadable images", *(note(str(error)) for error in found.errors[:_SHOWN])) if found.errors else None,
        lead=f"{len(found.labels):,} labelled images.{lead}",
    )


def _mistake(one: Mistake, small: bytes | None, picture_of: Callable[[str], bytes | None]) -> Html:
    name = str(one.image)
    of_label = "" if one.label is None else f"; {one.label} has {percent(one.label_probability, 0)}"
    label = None if one.label is None else join(element("b", one.label), " ")
    near = (
        element("figure", picture(picture_of(each.example_id), each.example_id), element("figcaption", each.label))
        for each in one.nearest
    )
    return join(
        element(
            "div",
            picture(small, name),
            element(
                "div",
                element("p", label, "taken for ", element("span", one.predicted, class_="bad name")),
                element("p", bar(one.probability)),
                note(short_path(one.image), of_label),
            ),
            class_="beside",
        ),
        join(note("Nearest examples:"), element("div", *near, class_="small pictures")) if one.nearest else None,
    )


def _confusion(found: Evaluation) -> Html:
    mixups, count = found.mixups, len(found.classes)
    rows = [
        (one.label, one.other, bar(one.mistaken / one.images, f"{one.mistaken} of {one.images}"))
        for one in mixups[:_SHOWN]
    ]
    pairs = long_table(("class", "taken for", "of its images"), rows, _OPEN) if rows else None
    listed = note(first_of("Pairs of classes, the most frequent first.", len(rows), len(mixups)))
    if count > MATRIX:
        return section("Confused classes", listed if rows else note("No image is taken for another class."), pairs)
    return section(
        "Confusion matrix",
        note("A row is the label of images, a column what they are taken for. Columns have the numbers of rows."),
        matrix(found.classes, found.confusion.tolist()),
        details("Pairs of classes, the most frequent first", listed, pairs) if rows else None,
    )


def _classes(found: Evaluation) -> Html:
    results = sorted(found.class_results, key=lambda one: (math.isnan(one.recall), one.recall, one.precision))
    rows = [
        (
            one.label,
            bar(one.recall, f"{one.right} of {one.images}") if one.images else "no images",
            bar(one.precision, f"{one.right} of {one.predicted}") if one.predicted else "",
        )
        for one in results
    ]
    return section(
        "Classes",
        note(
            "The least often right first. Recall: of its images, those that are right. Precision: of images that are "
            "taken for the class, those that are right."
        ),
        long_table(("class", "recall", "precision"), rows, _OPEN),
    )


def _probabilities(found: Evaluation) -> Html:
    reliability, sets = found.reliability, found.sets
    bins = np.flatnonzero(reliability.counts).tolist()
    points = [(float(reliability.confidence[k]), float(reliability.right[k])) for k in bins]
    rows = [
        (
            f"{k / BINS:.0%} to {(k + 1) / BINS:.0%}",
            int(reliability.counts[k]),
            percent(reliability.confidence[k]),
            percent(reliability.right[k]),
        )
        for k in bins
    ]
    promised = (
        f"Sets of labels for {percent(sets.promised, 0)}: {percent(sets.covered)} have the label, "
        f"{sets.size:.2f} labels on the mean, "
        f"{percent(sets.empty)} are empty."
    )
    return section(
        "Probabilities",
        note(
            "Images by their largest probability: on the dashed line probabilities are as right as they say. "
            f"Expected calibration error {percent(reliability.error)}."
        ),
        line_chart({"images of these probabilities": points}, "probability", "right", diagonal=True),
        details("As a table", table(("probability", "images", "mean", "right"), rows)),
        note(f"Sets of labels: {sets.reason}." if sets.reason else promised),
    )


def _unknown(found: Evaluation, card: Callable[[Mistake], Html]) -> Html:
    one = found.unknown
    kept = (
        f"Nothing is rejected: {one.reason}."
        if one.reason
        else f"{percent(one.kept)} of the images above keep their label where {percent(one.promised)} are promised."
    )
    if not one.images:
        return section("Unknown pictures", note(kept, " No images of other classes were given."))
    rejected = "" if one.reason else f"{percent(one.rejected)} are rejected; "
    shown = one.accepted[:_OPEN]
    accepted = 0 if one.reason else round(one.images * (1 - one.rejected))
    return section(
        "Unknown pictures",
        note(
            f"{kept} Of {one.images:,} images of no class {rejected}the score tells both apart with an AUROC of "
            f"{one.auroc:.3f}."
        ),
        details(
            first_of(f"{accepted:,} images of no class that keep a label.", len(shown), accepted),
            cards(map(card, shown)),
        )
        if shown
        else None,
    )
