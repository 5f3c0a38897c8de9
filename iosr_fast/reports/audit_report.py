"""The audit of a support set as a page: pictures beside each finding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    label_field,
    note,
    page,
    percent,
    picture,
    save_labels,
    section,
    short_path,
    table,
)

_SHOWN = 100  # of each kind; a phone shows no more
_CORRECTED = (
    "Type or take the right label below an image and save labels.csv. Named after what was fitted before, as in "
    "iosr-fast fit support/ labels.csv, its labels replace the earlier ones. "
)
_WITHOUT_FILE = "An image without a file has no field: Classifier.remove_examples takes its id."


def named(image: Any, path: str | None) -> str:
    """An image's file, where it is known, and its id: "lemon/4.jpg (e83)"."""
    return str(image) if path is None else f"{short_path(path)} ({image})"


def audit_page(audit: SupportAudit, picture_of: Callable[[Any], bytes | None], title: str) -> str:
    """The HTML file; `picture_of` gives the thumbnail of an image by its name in the audit, or None."""

    def pictures(*images: Any, look: str = "pictures") -> Html:
        return element("div", *(picture(picture_of(image), str(image)) for image in images), class_=look)

    def name(image: Any, path: str | None) -> Html:
        return element("span", named(image, path), title=path)

    def suspect(one: Suspect) -> Html:
        left_out = f"; left out, it is {one.suggested} at {percent(one.probability, 0)}. Nearest of these:"
        return join(
            pictures(one.image),
            element("p", element("span", one.label, class_="bad name"), f" is rather {one.suggested}"),
            element("p", "wrong: ", bar(one.suspicion)),
            note(name(one.image, one.path), left_out),
            pictures(*one.neighbours, look="small pictures"),
            None if one.path is None else label_field(one.path, one.suggested),
        )

    likely, doubtful = len(audit.likely_wrong), audit.suspects[len(audit.likely_wrong) :]
    shown = [*audit.likely_wrong[:_SHOWN], *doubtful[:_SHOWN]]
    paths = [one.path for one in shown if one.path is not None]
    judged = {
        "left-out images": f"By estimate {audit.expected_wrong:.1f} labels are wrong.",
        "class names": f"Judged by the class names: by estimate {audit.expected_wrong:.1f} labels are wrong.",
        "nothing": "Each class has one image, so no label can be judged.",
    }[audit.basis]
    counts = {"images": len(audit.suspicion), "classes": len(audit.classes), "labels likely wrong": likely}
    return page(
        title,
        facts({**counts, "near duplicates": len(audit.duplicates)}),
        *(element("p", element("b", sentence)) for sentence in audit.notes),
        section(
            "Labels likely wrong",
            _first(f"More likely wrong than right: {likely} of {len(audit.suspicion)}. {judged}", likely),
            note(_CORRECTED if paths else "", _WITHOUT_FILE if len(paths) < len(shown) else "") if shown else None,
            cards(map(suspect, audit.likely_wrong[:_SHOWN])),
            details(
                f"{len(doubtful)} doubtful labels, more likely right than wrong",
                cards(map(suspect, doubtful[:_SHOWN])),
            )
            if doubtful
            else None,
        ),
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
                    pictures(pair.image, pair.other),
                    element("p", " / ".join(dict.fromkeys((str(pair.label), str(pair.other_label)))), class_="name"),
                    note(name(pair.image, pair.path), " and ", name(pair.other, pair.other_path)),
                    note(f"cosine {pair.cosine:.4f}"),
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
            table(
                ("class", "other class", "left-out images", "taken for the other", "probability there"),
                [(one.label, one.other, one.images, one.mistaken, bar(one.share)) for one in audit.confusions[:_SHOWN]],
            ),
        ),
        _classes(audit),
        save_labels(paths, [one.label for one in audit.classes]) if paths else None,
        scripts=("labels.js",) if paths else (),
        lead="Images are left out of the fit one of each class at a time, and classified by the others.",
    )


def _first(sentence: str, count: int) -> Html:
    return note(first_of(sentence, _SHOWN, count))


def _classes(audit: SupportAudit) -> Html:
    heads = ("class", "images", "distinct", "left-out images right", "variety", "advice")
    rows = [
        (
            one.label,
            one.images,
            one.distinct,
            bar(one.right / one.scored, f"{one.right} of {one.scored}") if one.scored else "",
            "" if one.variety != one.variety else f"{one.variety:.2f}",
            element("p", one.advice) if one.advice else "",
        )
        for one in sorted(audit.classes, key=lambda one: one.right / one.scored if one.scored else 1.0)
    ]
    urgent = [row for row in rows if row[-1]]
    return section(
        "Classes",
        _first("Classes that need other or more images." if urgent else "No class lacks images.", len(urgent)),
        table(heads, urgent[:_SHOWN]),
        details("All classes, the least often right first", table(heads, rows)),
        note("Variety: the mean distance of two images of the class, 1 as in the usual class."),
    )
