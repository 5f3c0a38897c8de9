"""The labels of whole pictures in an export of Label Studio: the choices of its tasks."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.detector_files import DetectorFile, LabelStudio
from iosr_fast.images.listing import refuse_url
from iosr_fast.utils.text import abbreviate

log = logging.getLogger(__name__)


def read_choices(document: DetectorFile, root: str | Path | None) -> list[tuple[str, frozenset[str]]] | None:
    """The picture of each task that was annotated, and its choices; None for a file without choices of whole pictures,
    and for one with rectangles, whose labels are those of boxes.

    Of several annotations the one of the ground truth counts, or the last; cancelled ones never do. Tasks without one
    are left out. Warnings count both. Raises IosrFastError for choices of several questions, and as DetectorFile.boxes.
    """
    if not isinstance(document.format, LabelStudio):
        return None
    with document.damages():
        tasks = [(path, drawn) for _, path, drawn in document.format.tasks()]
        results = [one for _, drawn in tasks for annotation in drawn for one in annotation["result"]]
        if any(one["type"] in ("rectangle", "rectanglelabels") for one in results):
            return None
        questions = sorted({one["from_name"] for one in results if _is_choice(one)})
        if len(questions) > 1:
            named = abbreviate(questions)
            raise IosrFastError(f"expected choices of one question (from_name), got {named}: leave those of one in it")
        found, differing = list[tuple[str, frozenset[str]]](), 0
        for path, drawn in tasks if questions else ():
            if drawn:
                refuse_url(path)
                answers = [_choices(one["result"]) for one in sorted(drawn, key=_rank)]
                differing += len({*answers}) > 1
                found.append((document.picture(path, root), answers[-1]))
    if not questions:
        return None
    if left_out := len(tasks) - len(found):
        log.warning("%s: left out %d of %d tasks, which have no annotation", document.file, left_out, len(tasks))
    if differing:
        text = "%s: the annotations of %d tasks differ: the last counts, or that of the ground truth"
        log.warning(text, document.file, differing)
    none, most = sum(not labels for _, labels in found), max(len(labels) for _, labels in found)
    if none and most == 1:
        text = "%s: pictures may have several labels, as %d of %d have none; if each has one, label these"
        log.warning(text, document.file, none, len(found))
    return found


def _is_choice(one: Any) -> bool:
    """Of the whole picture: a choice for a region has its shape beside."""
    return one["type"] == "choices" and one["value"].keys() == {"choices"}


def _choices(result: Iterable[Any]) -> frozenset[str]:
    listed = [one["value"]["choices"] for one in result if _is_choice(one)]
    if wrong := [one for one in listed if not isinstance(one, list) or not all(isinstance(name, str) for name in one)]:
        raise IosrFastError(f"expected a list of choices, got {wrong[0]!r:.80}")
    return frozenset(name.strip() for names in listed for name in names)


def _rank(annotation: Any) -> tuple[bool, str]:
    """What later annotations have more of; times are ISO 8601 in UTC."""
    return bool(annotation.get("ground_truth")), str(annotation.get("updated_at") or annotation.get("created_at") or "")
