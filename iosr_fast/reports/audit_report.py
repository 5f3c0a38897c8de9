"""The audit of a support set as a page: pictures beside each finding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from iosr_fast.head.labels import SEPARATOR
from iosr_fast.methods.support_audit import LIKELY, Confusion, Duplicate, SupportAudit, Suspect, grouped
from iosr_fast.reports import page

_SHOWN = 100  # of each kind; a phone shows no more
_CORRECTED = (
    "Type or take the right label below an image and save labels.csv. Named after what was fitted before, as in "
    "iosr-fast fit support/ labels.csv, its labels replace the earlier ones. "
)
_SEVERAL = 'Several labels are joined by ";", and ";" alone is none. '
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

    def said(one: Suspect) -> page.Html:
        doubted = one.suggested if one.label is None else one.label
        likely = one.label if one.suggested is None else one.suggested
        left_out = f"; left out, it is {likely} at {page.percent(one.probability, 0)}. Nearest of these:"
        return page.join(
            page.element("p", page.element("b", doubted, class_="bad"), one.finding.removeprefix(str(doubted))),
            page.element("p", "wrong: ", page.bar(one.suspicion)),
            page.note(name(one.image, one.path), left_out),
            pictures(*one.neighbours, look="small row"),
        )

    def suspects(found: list[Suspect]) -> page.Html:
        """What is said of one image."""
        image, path = found[0].image, found[0].path
        right = audit.labels_after([one for one in found if one.suspicion > LIKELY] or found[:1])
        return page.join(
            pictures(image),
            page.note("has: ", labels(audit.label_sets[image])) if audit.label_sets is not None else None,
            *map(said, found),
            None if path is None else page.label_field(path, _joined(right) or SEPARATOR, labels(right)),
        )

    def labels(of_image: Any) -> str:
        return (_joined(of_image) or "no label") if isinstance(of_image, tuple) else str(of_image)

    def pair(one: Duplicate) -> page.Html:
        both = " / ".join(dict.fromkeys((labels(one.label), labels(one.other_label))))
        return page.join(
            pictures(one.image, one.other),
            page.element("p", page.element("b", both)),
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

    several = audit.label_sets is not None
    images = list(grouped(audit.suspects).values())  # an image comes once, as it has one field
    wrong = [found for found in images if found[0].suspicion > LIKELY]
    doubtful = images[len(wrong) :]
    shown = [*wrong[:_SHOWN], *doubtful[:_SHOWN]]
    paths = [found[0].path for found in shown if found[0].path is not None]
    likely, either = len(audit.likely_wrong), "wrong or missing" if several else "wrong"
    estimate = f"by estimate {audit.expected_wrong:.1f} labels are {either}."
    judged = {
        "left-out images": estimate.capitalize(),
        "class names": f"Judged by the class names: {estimate}",
        "nothing": "Each class has one image, so no label can be judged.",
    }[audit.basis]
    counts = {"images": len(audit.suspicion), "classes": len(audit.classes), f"labels likely {either}": likely}
    of_all, in_turn = f"{likely} of {len(audit.suspicion)}", "one of each class at a time"
    if several:
        of_all, in_turn = f"{likely} labels, of {len(wrong)} of {len(audit.suspicion)} images", "in turn"
    return page.document(
        title,
        page.facts({**counts, "near duplicates": len(audit.duplicates)}),
        *(page.element("p", page.element("b", sentence)) for sentence in audit.notes),
        page.section(
            f"Labels likely {either}",
            page.note(f"More likely {either} than right: {of_all}. {judged}"),
            page.note(
                _CORRECTED if paths else "",
                _SEVERAL if paths and several else "",
                _WITHOUT_FILE if len(paths) < len(shown) else "",
            ),
            page.cards(map(suspects, wrong[:_SHOWN]), len(wrong)),
            page.details(
                f"Doubtful labels, more likely right than {either}: {sum(map(len, doubtful))}",
                page.cards(map(suspects, doubtful[:_SHOWN]), len(doubtful)),
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
        page.save_labels(paths, [one.label for one in audit.classes], several) if paths else None,
        scripts=("labels.js",) if paths else (),
        lead=f"Images are left out of the fit {in_turn}, and classified by the others.",
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


def _joined(labels: tuple[Any, ...]) -> str:
    return SEPARATOR.join(map(str, labels))
