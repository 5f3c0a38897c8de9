"""The evaluation of a classifier as a page: figures, confusion, and the mistakes with their pictures."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from iosr_fast.head.quality import MATRIX, Evaluation
from iosr_fast.head.quality_parts import Mistake, Mixup, SetCoverage, UnknownResult
from iosr_fast.methods.automation import images_needed_for
from iosr_fast.methods.conformal import BINS
from iosr_fast.methods.judgement import once
from iosr_fast.reports import page

_SURE = 0.9  # a mistake of this probability is confidently wrong


def evaluation_page(
    found: Evaluation, picture_of: Callable[[str], bytes | None], title: str, exif_orientation: bool = True
) -> str:
    """The HTML file. Images are read again for their pictures; `picture_of` gives the thumbnail of a support image by
    its id, or None."""

    def photo(one: Mistake) -> page.Html:
        return page.photo(one.image, str(one.image), exif_orientation)

    def pair(one: Mixup) -> page.Html:
        same = [each for each in found.mistakes if (each.label, each.predicted) == (one.label, one.other)]
        near = [each.example_id for mistake in same for each in mistake.nearest if each.label == one.other]
        sides = *map(photo, same[:1]), *(page.picture(picture_of(name), name) for name in near[:1])
        return page.join(
            page.element("div", *sides, class_="row"),
            page.element("p", page.element("b", one.label), " taken for ", page.element("b", one.other, class_="bad")),
            page.element("p", page.ratio(one.mistaken, one.images)),
        )

    def card(one: Mistake) -> page.Html:
        label, of_label = None, ""
        if one.label is not None:
            label = page.join(page.element("b", one.label), " ")
            of_label = f"; {one.label} has {page.percent(one.label_probability, 0)}"
        said = "taken for ", page.element("b", one.predicted, class_="bad")
        missed = "missed", None
        words = (
            page.element("p", label, *(missed if one.predicted is None else said)),
            page.element("p", page.bar(one.label_probability if one.predicted is None else one.probability)),
            page.note(page.breaking(page.short_path(one.image)), of_label),
        )
        near = []
        for each in one.nearest:
            small, caption = page.picture(picture_of(each.example_id), each.example_id), each.label
            near.append(page.element("figure", small, page.element("figcaption", caption)))
        return page.join(
            page.element("div", photo(one), page.element("div", *words), class_="beside"),
            page.note("Nearest examples:" if near else ""),
            page.element("div", *near, class_="small row"),
        )

    unknown, several, sure = found.unknown, found.is_multi_label, int((found.wrong_confidence >= _SURE).sum())
    parts = (found.copies, "near duplicates of support images"), (found.siblings, "siblings of support images")
    alike = " and ".join(f"{number:,} are {what}" for number, what in parts if number)
    alike = alike and f" {alike}: these say little about new pictures."
    confident = f"Confidently wrong first: {sure:,} of {found.wrong:,} have a probability of {_SURE:.0%} or more."
    if several:
        confident = (
            f"{found.wrong:,} labels given are wrong, {sure:,} of them with a probability of {_SURE:.0%} or more; "
            f"{found.missed:,} labels are missed. The surest first."
        )
    return page.document(
        title,
        _verdicts(found),
        page.facts(
            {
                "images": f"{len(found.labels):,}",
                "classes": len(found.classes),
                "labels given": f"{found.answers:,}" if several else None,
                "labels found": page.percent(found.found) if several else None,
                "mean average precision": None if (ap := found.average_precision) is None else f"{ap:.3f}",
                "confidently wrong": f"{sure:,}",
                "log-loss": f"{found.reliability.log_loss:.3f}",
                "calibration error": page.percent(found.reliability.error),
                "unknown rejected": page.percent(unknown.rejected)
                if unknown and unknown.images and not unknown.reason
                else None,
                "unreadable": len(found.errors) or None,
            }
        ),
        None if found.confusion is None else _confusion(found, found.confusion, pair),
        page.section(
            "Mistakes",
            page.note(confident if found.mistaken else "None."),
            page.cards(map(card, found.mistakes), found.mistaken),
        ),
        _classes(found),
        _probabilities(found),
        _automation(found),
        None if unknown is None else _unknown(unknown, card),
        page.unreadable(found.errors),
        lead=f"{len(found.labels):,} labelled images.{alike}",
    )


def _confusion(found: Evaluation, confusion: np.ndarray, pair: Callable[[Mixup], page.Html]) -> page.Html:
    mixups = found.mixups
    if not mixups:
        return page.section("Confusion", page.note("No image is taken for another class."))
    pairs = page.cards(map(pair, mixups), shown=4, least=11)
    words, matrix = "Pairs of classes, the most frequent first.", None
    if len(found.classes) <= MATRIX:
        words = f"A row is the label of images, a column, by the number of a row, what they are taken for. {words}"
        matrix = page.matrix(found.classes, confusion.tolist())
    pairs = page.element("div", pairs, style="flex:1 1 24rem")
    sides = page.element("div", matrix, pairs, class_="row", style="align-items:start;gap:1.5rem")
    return page.section("Confusion", page.note(words), sides)


def _verdicts(found: Evaluation) -> page.Html:
    """What was expected and promised, and whether these images bear it out."""
    low, high = found.interval
    expected = f", {page.percent(found.expected_at_sizes[0])} expected" if found.against_expected else ""
    what = "labels" if found.is_multi_label else "images"
    right = f"{page.percent(found.accuracy)}{' of labels given' if found.is_multi_label else ''} right{expected}"
    counting = "" if found.is_multi_label else once(len(found.labels), found.count)
    such = f"{page.percent(found.reliability.accuracy)}{counting}; " if counting else ""
    such += f"of such {what} {100 * low:.1f}–{page.percent(high)} are right, with 95% confidence. "
    boxes = []
    for (title, words), bad in (
        ((right, such + found.against_expected), found.accuracy_judgement == "below"),
        (found.promise_verdict, any(one.judgement == "broke" for one in found.promises)),
    ):
        head = page.element("h2", _sentence(title), class_="bad" if bad else None)
        boxes.append(page.join(head, page.element("p", _sentence(words))))
    advice = [page.element("p", page.element("b", _sentence(one))) for one in (found.advice, *found.warnings) if one]
    return page.element("section", page.cards(boxes, least=24), *advice)


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}"


def _classes(found: Evaluation) -> page.Html:
    rows = [
        {
            "class": one.label,
            "recall": page.ratio(one.right, one.images, "no images"),
            "precision": page.ratio(one.right, one.predicted),
        }
        for one in sorted(found.class_results, key=lambda one: (math.isnan(one.recall), one.recall, one.precision))
    ]
    return page.section(
        "Classes",
        page.note(
            "The least often right first. Recall: of its images, those that are right. Precision: of images that are "
            "taken for the class, those that are right."
        ),
        page.table(rows),
    )


def _probabilities(found: Evaluation) -> page.Html:
    one, what = found.reliability, "labels" if found.is_multi_label else "images"
    rows = [
        {
            "probability": f"{100 * k / BINS:.0f}–{(k + 1) / BINS:.0%}",
            what: int(one.counts[k]),
            "mean": page.bar(one.confidence[k]),
            "right": page.bar(one.right[k]),
        }
        for k in np.flatnonzero(one.counts).tolist()
    ]
    of_what = "Labels given by their probability." if found.is_multi_label else "Images by their largest probability."
    return page.section(
        "Probabilities",
        page.note(
            f"{of_what} Where probabilities are as right as they say, both bars of a row are "
            f"as long. Expected calibration error {page.percent(one.error)}."
        ),
        page.table(rows),
        None if found.sets is None else page.note(_sets(found.sets)),
    )


def _sets(one: SetCoverage) -> str:
    if one.reason:
        return f"Sets of labels: {one.reason}."
    return (
        f"Sets of labels for {page.percent(one.promised, 0)}: {page.percent(one.covered)} have the label, "
        f"{one.size:.2f} labels on the mean, {page.percent(one.empty)} are empty."
    )


def _automation(found: Evaluation) -> page.Html:
    one, total = found.automation, found.answers
    expected = found.expected_automation.shares[one.shares > 0], one.thresholds[one.shares > 0]
    points = [(row.accepted / total, row.promised, row.share) for row in found.promises]
    by_level = found.by_level or [[] for _ in points]
    rows = [
        {
            "promised": page.percent(row.promised),
            "promise": page.element("span", row.judgement, class_="bad" if row.judgement == "broke" else None),
            **{f"level {k}": f"{page.percent(part)} ({bad:.1%} wrong)" if part else "" for k, (part, bad) in of_levels},
            "accepted": f"{row.accepted:,} ({page.percent(share)})",
            "of these wrong": f"{row.wrong:,} ({page.percent(error)})",
            **({"of all labels found": page.percent(of_all)} if found.is_multi_label else {}),
            "compatible": f"up to {row.explained:,}",
            "accepted as expected": page.percent(share_expected),
            "least probability": f"{least:.3f}",
        }
        for row, (share, _, error), of_all, of_levels, share_expected, least in zip(
            found.promises, points, found.promises_found, map(enumerate, by_level), *expected, strict=True
        )
    ]
    lines = {name: [(point[0], point[k]) for point in points] for k, name in ((1, "promised"), (2, "wrong here"))}
    return page.section(
        "What may be automated",
        page.note(
            "Of labels that predict(max_error=) accepts at most the promised share is wrong, with 95% confidence. "
            f"{one.can}; 1% takes {images_needed_for(0.01)}.{'' if rows else ' No label is accepted.'}"
            f"{' Level 0 is of classes, 1 of the deepest nodes.' if found.by_level else ''}"
        ),
        page.curves(lines, "labels accepted", "of these wrong", style="max-width:35rem") if len(rows) > 1 else None,
        page.table(rows),
    )


def _unknown(one: UnknownResult, card: Callable[[Mistake], page.Html]) -> page.Html:
    kept, promised, rejected = (page.percent(share) for share in (one.kept, one.promised, one.rejected))
    sentence = f"{kept} of the images above keep their label where {promised} are promised."
    sentence = f"Nothing is rejected: {one.reason}." if one.reason else sentence
    if not one.images:
        return page.section("Unknown pictures", page.note(sentence, " No images of other classes were given."))
    rejected = "" if one.reason else f"{rejected} are rejected; "
    accepted = 0 if one.reason else round(one.images * (1 - one.rejected))
    auroc = f"the score tells both apart with an AUROC of {one.auroc:.3f}."
    return page.section(
        "Unknown pictures",
        page.note(f"{sentence} Of {one.images:,} images of no class {rejected}{auroc}"),
        page.details(
            f"{accepted:,} images of no class that keep a label.", page.cards(map(card, one.accepted), accepted)
        ),
    )
