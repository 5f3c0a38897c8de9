"""The labels of many images as a page: pictures by label, those that are least sure first."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from statistics import fmean

from iosr_fast.files.tables import Labelled
from iosr_fast.reports import page

_PICTURES = 300  # of all labels; a page of so many has 2 MB
_OPEN = 12  # of them, of a label, that are in sight at once
_UNSURE = 0.5


def predictions_page(
    rows: Iterable[Labelled],
    title: str,
    unread: int = 0,
    unknown_label: str | None = None,
    exif_orientation: bool = True,
) -> str:
    """The HTML file. `unread` images can't be read, whether rows name them or not; `unknown_label` is the word for
    rejected pictures, which come first, those that were nearly kept before others. Pictures whose label is accepted are
    counted alone.

    Labels share the pictures evenly; each shows one at least.
    """
    rejected = unknown_label or ""

    def order(row: Labelled) -> tuple[bool, str, float]:
        known = row.label != rejected
        return known, row.label, row.probability if known else row.unknown_score

    rows = list(rows)
    good = sorted((row for row in rows if not row.error), key=order)
    groups = {label: list(group) for label, group in groupby(good, key=lambda row: row.label)}
    looks = {label: [row for row in group if not row.accepted] for label, group in groups.items()}
    share = max(1, _PICTURES // max(1, sum(map(bool, looks.values()))))
    left_out = len(good) - sum(min(share, len(look)) for look in looks.values())
    promised = any(row.accepted is not None for row in good)
    without = f" {left_out:,} of {len(good):,} images are left out of this page; the table counts them."
    lines = [
        {
            "label": label,
            "images": len(group),
            **({"need a look": len(looks[label])} if promised else {}),
            "probability on the mean": page.bar(fmean(probabilities)),
            "least": page.bar(probabilities[0]),
        }
        for label, group in groups.items()
        if (probabilities := sorted(row.probability for row in group))
    ]
    return page.document(
        title,
        page.facts(
            {
                "images": f"{len(good):,}",
                "labels": len(groups),
                rejected: len(groups.get(rejected, ())) or None,
                f"probability below {_UNSURE:.0%}": f"{sum(row.probability < _UNSURE for row in good):,}",
                "need a look": f"{sum(map(len, looks.values())):,}" if promised else None,
                "unreadable": f"{unread:,}" if unread else None,
            }
        ),
        page.section("Labels", page.table(lines)),
        *(_group(label, look, share, label == rejected, exif_orientation) for label, look in looks.items()),
        page.unreadable([f"{row.path}: {row.error}" for row in rows if row.error]),
        lead=f"For each label the least probable images{' that need a look' if promised else ''} first."
        f"{without if left_out else ''}",
    )


def _group(label: str, group: list[Labelled], share: int, rejected: bool, exif_orientation: bool) -> page.Html | None:
    if not group:
        return None
    tiles = (
        page.join(
            page.photo(row.path, row.path, exif_orientation),
            page.element("p", page.bar(row.probability)),
            page.note(page.short_path(row.path)),
        )
        for row in group[:share]
    )
    words = f"{len(group):,} image{'' if len(group) == 1 else 's'}."
    if rejected:
        words += " Those that were nearly kept come first; the bar is the probability of the most likely class."
    return page.section(label, page.note(words), page.cards(tiles, len(group), _OPEN, 8.5, "large"))
