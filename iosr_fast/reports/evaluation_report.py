"""The evaluation of a classifier as a page: figures, confusion, and the mistakes with their pictures."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from iosr_fast.head.quality import MATRIX, Evaluation, Mistake
from iosr_fast.methods.automation import images_needed_for
from iosr_fast.methods.conformal import BINS
from iosr_fast.reports.page import (
    Html,
    bar,
    cards,
    curves,
    details,
    element,
    facts,
    first_of,
    join,
    matrix,
    note,
    page,
    percent,
    picture,
    section,
    short_path,
    table,
    thumbnail,
)

_SHOWN = 100  # rows of a table
_SIDE = 160  # of a picture, in pixels
_SURE = 0.9  # a mistake of this probability is confidently wrong


def evaluation_page(
    found: Evaluation, picture_of: Callable[[str], bytes | None], title: str, exif_orientation: bool = True
) -> str:
    """The HTML file. Images are read again for their pictures; `picture_of` gives the thumbnail of a support image by
    its id, or None."""

    def card(one: Mistake) -> Html:
        return _mistake(one, thumbnail(one.image, _SIDE, exif_orientation), picture_of)

    unknown, sure = found.unknown, int((found.confidence[found.labels != found.predicted] >= _SURE).sum())
    copies = f" {found.copies:,} are near duplicates of support images and say little about new ones."
    confident = f"Confidently wrong first: {sure:,} of {found.wrong:,} have a probability of {_SURE:.0%} or more."
    return page(
        title,
        _verdicts(found),
        facts(
            {
                "images": f"{len(found.labels):,}",
                "classes": len(found.classes),
                "confidently wrong": f"{sure:,}",
                "log-loss": f"{found.reliability.log_loss:.3f}",
                "calibration error": percent(found.reliability.error),
                **({"unknown rejected": percent(unknown.rejected)} if unknown.images and not unknown.reason else {}),
                **({"unreadable": len(found.errors)} if found.errors else {}),
            }
        ),
        _confusion(found),
        section(
            "Mistakes",
            note(first_of(confident, len(found.mistakes), found.wrong) if found.wrong else "None."),
            cards(map(card, found.mistakes)),
        ),
        _classes(found),
        _probabilities(found),
        _automation(found),
        _unknown(found, card),
        section("Unreadable images", *(note(str(error)) for error in found.errors[:_SHOWN])) if found.errors else None,
        lead=f"{len(found.labels):,} labelled images.{copies if found.copies else ''}",
    )


def _confusion(found: Evaluation) -> Html:
    mixups = found.mixups
    rows = [
        (one.label, one.other, bar(one.mistaken / one.images, f"{one.mistaken} of {one.images}"))
        for one in mixups[:_SHOWN]
    ]
    pairs = (
        note(first_of("Pairs of classes, the most frequent first.", len(rows), len(mixups))),
        table(("class", "taken for", "of its images"), rows),
    )
    if not mixups:
        return section("Confusion", note("No image is taken for another class."))
    if len(found.classes) > MATRIX:
        return section("Confusion", *pairs)
    return section(
        "Confusion",
        note("A row is the label of images, a column what they are taken for. Columns have the numbers of rows."),
        matrix(found.classes, found.confusion.tolist()),
        details("Pairs of classes", *pairs),
    )


def _mistake(one: Mistake, small: bytes | None, picture_of: Callable[[str], bytes | None]) -> Html:
    label = None if one.label is None else join(element("b", one.label), " ")
    of_label = "" if one.label is None else f"; {one.label} has {percent(one.label_probability, 0)}"
    words = (
        element("p", label, "taken for ", element("span", one.predicted, class_="bad name")),
        element("p", bar(one.probability)),
        note(short_path(one.image), of_label),
    )
    near = (
        element("figure", picture(picture_of(each.example_id), each.example_id), element("figcaption", each.label))
        for each in one.nearest
    )
    return join(
        element("div", picture(small, str(one.image)), element("div", *words), class_="beside"),
        join(note("Nearest examples:"), element("div", *near, class_="small pictures")) if one.nearest else None,
    )


def _verdicts(found: Evaluation) -> Html:
    """What was expected and promised, and whether these images bear it out."""
    (low, high), (headline, counts) = found.interval, found.promise_verdict
    expected = f", {percent(found.expected)} expected" if found.against_expected else ""
    broke = any(one.judgement == "broke" for one in found.promises)
    both = (
        (
            f"{percent(found.accuracy)} right{expected}",
            f"of such images {100 * low:.1f}–{percent(high)} are right, with 95% confidence. {found.against_expected}",
            found.accuracy_judgement == "below",
        ),
        (headline, counts, broke),
    )
    boxes = (
        element("div", element("h2", _sentence(title), class_="bad" if bad else None), element("p", _sentence(words)))
        for title, words, bad in both
    )
    advice = element("p", _sentence(found.advice), class_="name") if found.advice else None
    return element("section", element("div", *boxes, class_="verdicts"), advice)


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}"


def _classes(found: Evaluation) -> Html:
    rows = [
        (
            one.label,
            bar(one.recall, f"{one.right} of {one.images}") if one.images else "no images",
            bar(one.precision, f"{one.right} of {one.predicted}") if one.predicted else "",
        )
        for one in sorted(found.class_results, key=lambda one: (math.isnan(one.recall), one.recall, one.precision))
    ]
    return section(
        "Classes",
        note(
            "The least often right first. Recall: of its images, those that are right. Precision: of images that are "
            "taken for the class, those that are right."
        ),
        table(("class", "recall", "precision"), rows),
    )


def _probabilities(found: Evaluation) -> Html:
    one, sets = found.reliability, found.sets
    rows = [
        (f"{100 * k / BINS:.0f}–{(k + 1) / BINS:.0%}", int(one.counts[k]), bar(one.confidence[k]), bar(one.right[k]))
        for k in np.flatnonzero(one.counts).tolist()
    ]
    covered = (
        f"Sets of labels for {percent(sets.promised, 0)}: {percent(sets.covered)} have the label, "
        f"{sets.size:.2f} labels on the mean, {percent(sets.empty)} are empty."
    )
    return section(
        "Probabilities",
        note(
            "Images by their largest probability. Where probabilities are as right as they say, both bars of a row are "
            f"as long. Expected calibration error {percent(one.error)}."
        ),
        table(("probability", "images", "mean", "right"), rows),
        note(f"Sets of labels: {sets.reason}." if sets.reason else covered),
    )


def _automation(found: Evaluation) -> Html:
    one, total = found.automation, len(found.labels)
    expected = found.expected_automation.shares[one.shares > 0], one.thresholds[one.shares > 0]
    points = [(row.accepted / total, row.promised, row.wrong / row.accepted) for row in found.promises]
    rows = [
        (
            percent(row.promised),
            element("span", row.judgement, class_="bad" if row.judgement == "broke" else None),
            f"{row.accepted:,} ({percent(share)})",
            f"{row.wrong:,} ({percent(error)})",
            f"{row.explained:,}",
            percent(share_expected),
            f"{least:.3f}",
        )
        for row, (share, _, error), share_expected, least in zip(found.promises, points, *expected, strict=True)
    ]
    lines = {name: [(point[0], point[k]) for point in points] for k, name in ((1, "promised"), (2, "wrong here"))}
    return section(
        "What may be automated",
        note(
            "Of labels that predict(max_error=) accepts at most the promised share is wrong, with 95% confidence. "
            f"{one.can}; 1% takes {images_needed_for(0.01)}.{'' if rows else ' No label is accepted.'}"
        ),
        curves(lines, "labels accepted", "of these wrong", style="max-width:35rem") if len(rows) > 1 else None,
        table(
            (
                "promised",
                "promise",
                "accepted",
                "of these wrong",
                "chance explains",
                "accepted as expected",
                "least probability",
            ),
            rows,
        ),
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
    accepted = 0 if one.reason else round(one.images * (1 - one.rejected))
    auroc = f"the score tells both apart with an AUROC of {one.auroc:.3f}."
    return section(
        "Unknown pictures",
        note(f"{kept} Of {one.images:,} images of no class {rejected}{auroc}"),
        details(
            first_of(f"{accepted:,} images of no class that keep a label.", len(one.accepted), accepted),
            cards(map(card, one.accepted)),
        )
        if one.accepted
        else None,
    )
