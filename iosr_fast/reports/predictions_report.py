"""The labels of many images as a page: pictures by label, those that are least sure first."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

from iosr_fast.files.tables import Labelled
from iosr_fast.reports.page import (
    Html,
    bar,
    cards,
    details,
    element,
    facts,
    first_of,
    join,
    long_table,
    note,
    page,
    picture,
    section,
    short_path,
)
from iosr_fast.reports.thumbnail import thumbnail

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
    rejected pictures, which come first, those that were nearly kept before others.

    Labels share the pictures evenly, except that one with fewer images leaves its rest to the others.
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
    count, shown = sum(map(len, groups.values())), _shares({label: len(groups[label]) for label in labels})
    unsure = sum(row.probability < _UNSURE for group in groups.values() for row in group)
    left_out = count - sum(shown.values())
    lines = [
        (label, len(group), bar(fmean(row.probability for row in group)), bar(min(row.probability for row in group)))
        for label in labels
        if (group := groups[label])
    ]
    return page(
        title,
        facts(
            {
                "images": f"{count:,}",
                "labels": len(labels),
                **({unknown_label: len(groups[unknown_label])} if unknown_label in groups else {}),
                f"probability below {_UNSURE:.0%}": f"{unsure:,}",
                **({"unreadable": f"{unread:,}"} if unread else {}),
            }
        ),
        section("Labels", long_table(("label", "images", "probability on the mean", "least"), lines)),
        *(
            _group(label, groups[label], shown[label], label == unknown_label, exif_orientation)
            for label in labels
            if shown[label]
        ),
        section(
            "Unreadable images",
            note(first_of("", _ERRORS, len(errors))) if len(errors) > _ERRORS else None,
            *(note(f"{row.path}: {row.error}") for row in errors[:_ERRORS]),
        )
        if errors
        else None,
        lead="For each label the least probable images first."
        + (f" {left_out:,} of {count:,} images are left out of this page; the table counts them." if left_out else ""),
    )


def _shares(counts: dict[str, int]) -> dict[str, int]:
    """How many images of each label are shown."""
    shown, rest = {}, _PICTURES
    for place, label in enumerate(sorted(counts, key=counts.__getitem__)):
        shown[label] = min(counts[label], rest // (len(counts) - place))
        rest -= shown[label]
    return shown


def _group(label: str, group: list[Labelled], shown: int, rejected: bool, exif_orientation: bool) -> Html:
    items = [
        join(
            picture(thumbnail(row.path, _SIDE, exif_orientation), row.path),
            element("p", bar(row.probability)),
            note(short_path(row.path)),
        )
        for row in group[:shown]
    ]
    said = f"{len(group):,} image{'' if len(group) == 1 else 's'}."
    if rejected:
        said += " Those that were nearly kept come first; the bar is the probability of the most likely class."
    more = items[_OPEN:]
    tiles = join(cards(items[:_OPEN]), details(f"{len(more)} more", cards(more)) if more else None)
    return section(label, note(first_of(said, shown, len(group))), element("div", tiles, class_="tiles"))
