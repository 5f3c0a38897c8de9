"""The labels of many images as a page: pictures by label, those that are least sure first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean

from iosr_fast.files.tables import Labelled
from iosr_fast.reports import page

_PICTURES = 2000  # of all labels; a page of so many has 35 MB
_OPEN = 12  # of them, of a label, that are in sight at once
_UNSURE = 0.5


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

    Labels share the pictures evenly; each shows one at least.
    """
    rejected = unknown_label or ""

    def order(row: Labelled) -> tuple[bool, str, float]:
        known = row.label != rejected
        return known, row.label, row.probability if known else row.unknown_score

    rows = list(rows)
    good = sorted((row for row in rows if not row.error), key=order)
    groups = {label: list(group) for label, group in groupby(good, key=lambda row: row.label)}
    looks = {label: look for label, group in groups.items() if (look := [row for row in group if not row.accepted])}
    total = sum(map(len, looks.values()))
    share = total if total <= _PICTURES else max(1, _PICTURES // len(looks))
    paths = [str(Path(row.path).resolve()) for look in looks.values() for row in look[:share]]
    left_out = len(good) - len(paths)
    promised = any(row.accepted is not None for row in good)
    without = f" {left_out:,} of {len(good):,} images are left out of this page; the table counts them."
    lines = [
        {
            "label": label,
            "images": len(group),
            **({"need a look": len(looks.get(label, ()))} if promised else {}),
            "probability on the mean": page.bar(fmean(probabilities)),
            "least": page.bar(probabilities[0]),
        }
        for label, group in groups.items()
        if (probabilities := sorted(row.probability for row in group))
    ]

    def card(row: Labelled) -> page.Html:
        return page.join(
            page.large_photo(row.path, exif_orientation),
            page.element("p", page.bar(row.probability)),
            page.note(page.breaking(page.short_path(row.path))),
            page.label_field(str(Path(row.path).resolve()), None if row.label == rejected else row.label),
        )

    def section(label: str, look: list[Labelled]) -> page.Html:
        note = f"{len(look):,} image{'' if len(look) == 1 else 's'}."
        if label == rejected:
            note += " Those that were nearly kept come first; the bar is the probability of the most likely class."
        return page.section(
            label, page.note(note), page.cards(map(card, look[:share]), len(look), _OPEN, 10.5, "large")
        )

    choices = [page.element("option", label or "all", value=label) for label in ("", *looks)]
    choose = page.element("select", *choices, class_="button", style="display:block")
    words = page.element("input", type="search")
    fields = [page.element("label", *each, class_="quiet") for each in (("Path or label", words), ("Label", choose))]
    search = page.element("div", *fields, id="filter", class_="row") if paths else None
    return page.document(
        title,
        page.facts(
            {
                "images": f"{len(good):,}",
                "labels": len(groups),
                rejected: len(groups.get(rejected, ())) or None,
                f"probability below {_UNSURE:.0%}": f"{sum(row.probability < _UNSURE for row in good):,}",
                "need a look": f"{total:,}" if promised else None,
                "unreadable": f"{unread:,}" if unread else None,
            }
        ),
        page.section("Labels", page.table(lines), search),
        *(section(label, look) for label, look in looks.items()),
        page.unreadable([f"{row.path}: {row.error}" for row in rows if row.error]),
        page.save_labels(paths, classes) if paths else None,
        scripts=("labels.js", "pictures.js") if paths else (),
        lead=f"For each label the least probable images{' that need a look' if promised else ''} first. "
        f"{'Type or take labels and save labels.csv for iosr-fast fit.' if paths else ''}{without if left_out else ''}",
    )
