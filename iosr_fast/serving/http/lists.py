"""Pages of classes and of support images: a long list is asked for piece by piece, and each is made in a thread."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import asdict
from typing import Any

from fastapi import Query

from iosr_fast.state.ids import CLASS_ID, EXAMPLE_ID, class_id, example_id, example_number, uid_of
from iosr_fast.state.state import State

PAGE = 1_000
_NEXT = "the `next` of the page before; none for the first page"
LIMIT = Query(PAGE, ge=1, le=PAGE, description="how many at most")
AFTER_CLASS = Query(None, pattern=f"^{CLASS_ID}$", description=_NEXT)
AFTER_EXAMPLE = Query(None, pattern=f"^{EXAMPLE_ID}$", description=_NEXT)


def class_page(state: State, limit: int, after: str | None) -> dict[str, Any]:
    """At most `limit` classes whose ids come after one, which may be gone by now; `next` where there are more."""
    start = -1 if after is None else uid_of(after)
    assert start is not None
    found = state.classes(start, limit)
    more = bool(found) and found[-1].class_id != class_id(state.uids[-1])
    return {
        "version": state.version,
        "total": len(state.uids),
        "classes": [asdict(info) for info in found],
        "next": found[-1].class_id if more else None,
    }


def example_page(state: State, given: str, limit: int, after: str | None) -> dict[str, Any] | None:
    """Likewise the support images of a class by its id; None where there is no such class."""
    uid = uid_of(given)
    if uid is None or state.name_of(given) is None:
        return None
    numbers = state.examples_of(uid)
    start = 0 if after is None else bisect_right(numbers, example_number(after) or 0)
    found = numbers[start : start + limit]
    return {
        "version": state.version,
        "class_id": given,
        "example_ids": [example_id(number) for number in found],
        "next": example_id(found[-1]) if start + limit < len(numbers) else None,
    }
