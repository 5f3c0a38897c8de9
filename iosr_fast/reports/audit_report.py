"""The audit of a support set as a page: pictures beside each finding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from iosr_fast.methods.support_audit import Confusion, Duplicate, SupportAudit, Suspect
from iosr_fast.reports import page

_SHOWN = 100  # of each kind; a phone shows no more
_CORRECTED = (
    "Type or take the right label below an image and save labels.csv. Named after what was fitted before, as in "
    "iosr-fast fit support/ labels.csv, its labels replace the earlier ones. "
)
_DUPLICATES = (
    "Pairs that are as good as equal for the encoder; within a class they count as one image. Of a pair under two "
    "labels, one label is wrong or the classes overlap."
)
_WITHOUT_FILE = "An image without a file has no field: Classifier.remove_examples takes its id."


def named(image: Any, path: str | None) -> str:
    """An image's file, where it is known, and its id: "lemon/4.jpg (e83)"."""
    return str(image) if path is None else f"{page.short_path(path)} ({image})"


def audit_page(audit: SupportAudit, picture_of: Callable[[Any], bytes | None], title: str) -> str:
    """The HTML file; `picture_of` gives the thumbnail of an image by its name in the audit, or None."""

    def pictures(*images: Any, look: str = "row") -> page.Html:
        return page.element("div", *(page.picture(picture_of(image), str(image)) for image in images), class_=look)

    def name(image: Any, path: str | None) -> page.Html:
        return page.element("span", page.breaking(named(image, path)), title=path)

    def suspect(one: Suspect) -> page.Html:
        left_out = f"; left out, it is {one.suggested} at {page.percent(one.probability, 0)}. Nearest of these:"
        return page.join(
            pictures(one.image),
            page.element("p", page.element("b", one.label, class_="bad"), f" is rather {one.suggested}"),
            page.element("p", "wrong: ", page.bar(one.suspicion)),
            page.note(name(one.image, one.path), left_out),
            pictures(*one.neighbours, look="small row"),
            None if one.path is None else page.label_field(one.path, one.suggested),
        )

    def pair(one: Duplicate) -> page.Html:
        labels = " / ".join(dict.fromkeys((str(one.label), str(one.other_label))))
        return page.join(
            pictures(one.image, one.other),
            page.element("p", page.element("b", labels)),
            page.note(name(one.image, one.path), " and ", name(one.other, one.other_path)),
            page.note(f"cosine {one.cosine:.4f}"),
        )

    def confusion(one: Confusion) -> page.Html:
        return page.join(
            pictures(*one.examples),
            page.element("p", page.element("b", one.label), " and ", page.element("b", one.other)),
            page.element("p", page.bar(one.share, f"{one.share:.0%} of the probability")),
            page.note(f"{one.mistaken} of {one.images} left-out images are taken for the other class."),
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
    return page.document(
        title,
        page.facts({**counts, "near duplicates": len(audit.duplicates)}),
        *(page.element("p", page.element("b", sentence)) for sentence in audit.notes),
        page.section(
            "Labels likely wrong",
            page.note(f"More likely wrong than right: {likely} of {len(audit.suspicion)}. {judged}"),
            page.note(_CORRECTED if paths else "", _WITHOUT_FILE if len(paths) < len(shown) else ""),
            page.cards(map(suspect, audit.likely_wrong[:_SHOWN]), likely),
            page.details(
                f"Doubtful labels, more likely right than wrong: {len(doubtful)}",
                page.cards(map(suspect, doubtful[:_SHOWN]), len(doubtful)),
                unfolded=not likely,  # of few images the exchanged ones may be here
            ),
        ),
        page.section(
            "Near duplicates",
            page.note(_DUPLICATES if audit.duplicates else "None."),
            page.cards(map(pair, audit.duplicates[:_SHOWN]), len(audit.duplicates)),
        ),
        page.section(
            "Confused classes",
            page.note(
                "Pairs that take at least a tenth of each other's probability. The images are those that do so most."
                if audit.confusions
                else "No pair takes a tenth of the other's probability."
            ),
            page.cards(map(confusion, audit.confusions[:_SHOWN]), len(audit.confusions)),
        ),
        _classes(audit),
        page.save_labels(paths, [one.label for one in audit.classes]) if paths else None,
        scripts=("labels.js",) if paths else (),
        lead="Images are left out of the fit one of each class at a time, and classified by the others.",
    )


def _classes(audit: SupportAudit) -> page.Html:
    rows = [
        {
            "class": one.label,
            "images": one.images,
            "distinct": one.distinct,
            "left-out images right": page.ratio(one.right, one.scored),
            "variety": "" if one.variety != one.variety else f"{one.variety:.2f}",
            "advice": page.element("p", one.advice) if one.advice else "",
        }
        for one in sorted(audit.classes, key=lambda one: one.right / one.scored if one.scored else 1.0)
    ]
    urgent = [row for row in rows if row["advice"]]
    return page.section(
        "Classes",
        page.note("Classes that need other or more images." if urgent else "No class lacks images."),
        page.table(urgent, _SHOWN),
        page.details("All classes, the least often right first", page.table(rows)),
        page.note("Variety: the mean distance of two images of the class, 1 as in the usual class."),
    )
