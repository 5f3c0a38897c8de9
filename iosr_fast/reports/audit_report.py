"""The audit of a support set as a page: pictures beside each finding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from iosr_fast.methods.learning_curve import LearningCurve
from iosr_fast.methods.support_audit import SupportAudit, Suspect
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
    note,
    page,
    percent,
    picture,
    section,
    table,
)

_SHOWN = 100  # of each kind; a phone shows no more


def audit_page(audit: SupportAudit, picture_of: Callable[[Any], bytes | None], title: str) -> str:
    """The HTML file; `picture_of` gives the thumbnail of an image by its name in the audit, or None."""
    return page(
        title,
        facts(
            {
                "images": len(audit.images),
                "classes": len(audit.classes),
                "labels likely wrong": len(audit.likely_wrong),
                "near duplicates": len(audit.duplicates),
            }
        ),
        _suspects(audit, picture_of),
        section(
            "Near duplicates",
            _first(
                "Pairs that are as good as equal for the encoder; within a class they count as one image. Of a pair "
                "under two labels, one label is wrong or the classes overlap."
                if audit.duplicates
                else "None.",
                len(audit.duplicates),
            ),
            cards(
                join(
                    _pictures(picture_of, (pair.image, pair.other)),
                    element("p", _pair(pair.label, pair.other_label), class_="name"),
                    note(f"{pair.image} and {pair.other}, cosine {pair.cosine:.4f}"),
                )
                for pair in audit.duplicates[:_SHOWN]
            ),
        ),
        section(
            "Confused classes",
            _first(
                "Pairs that take at least a tenth of each other's probability."
                if audit.confusions
                else "No pair takes a tenth of the other's probability.",
                len(audit.confusions),
            ),
            _table(
                ("class", "other class", "left-out images", "taken for the other", "probability there"),
                [(one.label, one.other, one.images, one.mistaken, bar(one.share)) for one in audit.confusions[:_SHOWN]],
            ),
        ),
        _classes(audit),
        _curve(audit.curve),
        lead="Images are left out of the fit one of each class at a time, and classified by the others.",
    )


def _first(sentence: str, count: int) -> Html:
    return note(first_of(sentence, _SHOWN, count))


def _suspects(audit: SupportAudit, picture_of: Callable[[Any], bytes | None]) -> Html:
    likely = audit.likely_wrong
    judged = {
        "left-out images": f"By estimate {audit.expected_wrong:.1f} labels are wrong.",
        "class names": f"Judged by the class names: by estimate {audit.expected_wrong:.1f} labels are wrong.",
        "nothing": "Each class has one image, so no label can be judged.",
    }[audit.basis]
    doubtful = audit.suspects[len(likely) :]
    return section(
        "Labels likely wrong",
        _first(f"More likely wrong than right: {len(likely)} of {len(audit.images)}. {judged}", len(likely)),
        cards(_suspect(one, picture_of) for one in likely[:_SHOWN]),
        details(
            f"{len(doubtful)} doubtful labels, more likely right than wrong",
            cards(_suspect(one, picture_of) for one in doubtful[:_SHOWN]),
        )
        if doubtful
        else None,
    )


def _suspect(one: Suspect, picture_of: Callable[[Any], bytes | None]) -> Html:
    return join(
        _pictures(picture_of, (one.image,)),
        element("p", element("span", one.label, class_="bad name"), f" is rather {one.suggested}"),
        element("p", "wrong: ", bar(one.suspicion)),
        note(f"{one.image}; left out, it is {one.suggested} at {percent(one.probability, 0)}. Nearest of these:"),
        element("div", _pictures(picture_of, one.neighbours), class_="small"),
    )


def _classes(audit: SupportAudit) -> Html:
    heads = ("class", "images", "distinct", "left-out images right", "variety", "advice")
    rows = [
        (
            one.label,
            one.images,
            one.distinct,
            bar(one.right / one.scored, f"{one.right} of {one.scored}") if one.scored else "",
            "" if one.variety != one.variety else f"{one.variety:.2f}",
            one.advice,
        )
        for one in audit.classes
    ]
    urgent = [row for row, one in zip(rows, audit.classes, strict=True) if one.advice]
    worst = sorted(audit.classes, key=lambda one: one.right / one.scored if one.scored else 1.0)
    order = [audit.classes.index(one) for one in worst]
    return section(
        "Classes",
        _first("Classes that need other or more images." if urgent else "No class lacks images.", len(urgent)),
        _table(heads, urgent[:_SHOWN]),
        details("All classes, the least often right first", _table(heads, [rows[k] for k in order])),
        note("Variety: the mean distance of two images of the class, 1 as in the usual class."),
    )


def _curve(curve: LearningCurve) -> Html | None:
    if not curve.points:
        return None
    measured = [(point.images, point.accuracy) for point in curve.points]
    series = {"left-out images": measured}
    if curve.twice == curve.twice:
        series["estimate (not measured)"] = [(curve.images, curve.now), (2 * curve.images, curve.twice)]
        said = f"Twice as many images of each class would bring {100 * curve.gain:+.1f} points by estimate."
    else:
        said = "With two images a class there is a single point; more images show what more would bring."
    return section(
        "What more images would bring", note(said), line_chart(series, "images of each class", "right", x_log=True)
    )


def _pictures(picture_of: Callable[[Any], bytes | None], images: tuple[Any, ...]) -> Html:
    return element("div", *(picture(picture_of(image), str(image)) for image in images), class_="pictures")


def _pair(label: Any, other: Any) -> str:
    return str(label) if label == other else f"{label} / {other}"


def _table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> Html | None:
    return table(heads, rows) if rows else None
