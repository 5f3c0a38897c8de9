"""The labels of many images as a page: pictures by label, those that are least sure first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean

from iosr_fast.files.tables import Answer, Labelled
from iosr_fast.head.labels import SEPARATOR
from iosr_fast.reports import page

_PICTURES = 2000  # of all labels; a page of so many has 35 MB
_OPEN = 12  # of them, of a label, that are in sight at once
_UNSURE = 0.5
_NO_LABEL = "(no label)"


def predictions_page(
    rows: Iterable[Labelled],
    title: str,
    unread: int = 0,
    unknown_label: str | None = None,
    exif_orientation: bool = True,
    classes: Sequence[str] = (),
) -> str:
    """The HTML file. `unread` images can't be read, whether rows name them or not; `unknown_label` is the word for
    rejected pictures, which come first, those that were nearly kept before others. Pictures whose label is accepted are
    counted alone. `classes` are offered as labels.

    Labels share the pictures evenly; each shows one at least. A picture of several labels is shown once, at the least
    sure one of those that are not accepted; those without a label come first.
    """
    rejected = unknown_label or ""
    none = (Answer(rejected, math.nan),)

    def least_sure(row: Labelled) -> Answer:
        return min(row.answers or none, key=lambda one: (bool(one.accepted), one.probability))

    def order(row: Labelled) -> tuple[bool, str, float]:
        one = least_sure(row)
        known = one.label != rejected
        return known, one.label, one.probability if known else row.unknown_score

    rows = list(rows)
    good = sorted((row for row in rows if not row.error), key=order)
    several = any(row.several is not None for row in good)
    answers = [answer for row in good for answer in row.answers or none]
    in_order = sorted(answers, key=lambda one: (one.label != rejected, one.label))
    groups = {label: list(group) for label, group in groupby(in_order, key=lambda one: one.label)}
    doubtful = groupby((row for row in good if not least_sure(row).accepted), key=lambda row: least_sure(row).label)
    looks = {label: list(group) for label, group in doubtful}
    total = sum(map(len, looks.values()))
    share = total if total <= _PICTURES else max(1, _PICTURES // len(looks))
    paths = [str(Path(row.path).resolve()) for look in looks.values() for row in look[:share]]
    left_out = len(good) - len(paths)
    promised = any(one.accepted is not None for one in answers)
    without = f" {left_out:,} of {len(good):,} images are left out of this page; the table counts them."
    lines = [
        {
            "label": label or _NO_LABEL,
            "images": len(group),
            **({"need a look": sum(not one.accepted for one in group)} if promised else {}),
            "probability on the mean": page.bar(fmean(probabilities)) if label else "",
            "least": page.bar(probabilities[0]) if label else "",
        }
        for label, group in groups.items()
        if (probabilities := sorted(one.probability for one in group))
    ]

    def bar(one: Answer) -> page.Html:
        words = f"{page.percent(one.probability, 0)} {one.label}{', accepted' if one.accepted else ''}"
        return page.element("p", page.bar(one.probability, words if several else ""))

    def card(row: Labelled) -> page.Html:
        suggested = SEPARATOR.join(one.label for one in row.answers if one.label != rejected)
        return page.join(
            page.large_photo(row.path, exif_orientation),
            *map(bar, row.answers),
            page.note(page.breaking(page.short_path(row.path))),
            page.label_field(str(Path(row.path).resolve()), suggested or None),
        )

    def section(label: str, look: list[Labelled]) -> page.Html:
        note = f"{len(look):,} image{'' if len(look) == 1 else 's'}."
        if label and label == rejected:
            note += " Those that were nearly kept come first; the bar is the probability of the most likely class."
        return page.section(
            label or _NO_LABEL, page.note(note), page.cards(map(card, look[:share]), len(look), _OPEN, 10.5, "large")
        )

    names = [label or _NO_LABEL for label in looks]
    choices = [page.element("option", name or "all", value=name) for name in ("", *names)]
    choose = page.element("select", *choices, class_="button", style="display:block")
    words = page.element("input", type="search")
    fields = [page.element("label", *each, class_="quiet") for each in (("Path or label", words), ("Label", choose))]
    search = page.element("div", *fields, id="filter", class_="row") if paths else None
    return page.document(
        title,
        page.facts(
            {
                "images": f"{len(good):,}",
                "labels": len(groups) - ("" in groups),
                rejected or "no label": len(groups.get(rejected, ())) or None,
                f"probability below {_UNSURE:.0%}": f"{sum(one.probability < _UNSURE for one in answers):,}",
                "need a look": f"{total:,}" if promised else None,
                "unreadable": f"{unread:,}" if unread else None,
            }
        ),
        page.section("Labels", page.table(lines), search),
        *(section(label, look) for label, look in looks.items()),
        page.unreadable([f"{row.path}: {row.error}" for row in rows if row.error]),
        page.save_labels(paths, classes, several) if paths else None,
        scripts=("labels.js", "pictures.js") if paths else (),
        lead=f"For each label the least probable images{' that need a look' if promised else ''} first. "
        f"{'An image of several labels is shown once, at its least sure one. ' if several else ''}"
        f"{'Type or take labels and save labels.csv for iosr-fast fit.' if paths else ''}{without if left_out else ''}",
    )
