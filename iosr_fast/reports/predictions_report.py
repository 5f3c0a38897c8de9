"""The labels of many images as a page: pictures by label, those that are least sure first."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

from iosr_fast.files.tables import Labelled
from iosr_fast.reports.page import (
    Html,
    bar,
    cards,
    element,
    facts,
    first_of,
    join,
    note,
    page,
    picture,
    section,
    short_path,
    table,
    thumbnail,
)

_PICTURES = 300  # of all labels; a page of so many has 2 MB
_OPEN = 12  # of them, of a label, that are in sight at once
_ERRORS = 100
_SIDE = 160  # of a picture, in pixels
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
    groups: dict[str, list[Labelled]] = {}
    errors = []
    for row in rows:
        if row.error:
            errors.append(row)
        else:
            groups.setdefault(row.label, []).append(row)
    labels = sorted(groups, key=lambda label: (label != unknown_label, label))
    for label, group in groups.items():
        group.sort(key=lambda row: row.unknown_score if label == unknown_label else row.probability)
    looks = {label: [row for row in groups[label] if not row.accepted] for label in labels}
    count, share = sum(map(len, groups.values())), max(1, _PICTURES // max(1, sum(map(bool, looks.values()))))
    unsure = sum(row.probability < _UNSURE for group in groups.values() for row in group)
    promised = any(row.accepted is not None for group in groups.values() for row in group)
    look, left_out = sum(map(len, looks.values())), count - sum(len(group[:share]) for group in looks.values())
    lines = [
        (label, len(probabilities), *[len(looks[label])] * promised, bar(fmean(probabilities)), bar(min(probabilities)))
        for label in labels
        if (probabilities := [row.probability for row in groups[label]])
    ]
    heads = ("label", "images", *["need a look"] * promised, "probability on the mean", "least")
    return page(
        title,
        facts(
            {
                "images": f"{count:,}",
                "labels": len(labels),
                **({unknown_label: len(groups[unknown_label])} if unknown_label in groups else {}),
                f"probability below {_UNSURE:.0%}": f"{unsure:,}",
                **({"need a look": f"{look:,}"} if promised else {}),
                **({"unreadable": f"{unread:,}"} if unread else {}),
            }
        ),
        section("Labels", table(heads, lines)),
        *(
            _group(label, group, share, label == unknown_label, exif_orientation)
            for label, group in looks.items()
            if group
        ),
        section(
            "Unreadable images",
            note(first_of("", _ERRORS, len(errors))) if len(errors) > _ERRORS else None,
            *(note(f"{row.path}: {row.error}") for row in errors[:_ERRORS]),
        )
        if errors
        else None,
        lead=f"For each label the least probable images{' that need a look' if promised else ''} first."
        + (f" {left_out:,} of {count:,} images are left out of this page; the table counts them." if left_out else ""),
    )


def _group(label: str, group: list[Labelled], share: int, rejected: bool, exif_orientation: bool) -> Html:
    tiles = (
        join(
            picture(thumbnail(row.path, _SIDE, exif_orientation), row.path),
            element("p", bar(row.probability)),
            note(short_path(row.path)),
        )
        for row in group[:share]
    )
    words = f"{len(group):,} image{'' if len(group) == 1 else 's'}."
    if rejected:
        words += " Those that were nearly kept come first; the bar is the probability of the most likely class."
    shown = element("div", cards(tiles, _OPEN), class_="tiles")
    return section(label, note(first_of(words, min(share, len(group)), len(group))), shown)
