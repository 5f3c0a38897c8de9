"""What models of one support set share while they are judged, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

_T = TypeVar("_T")
MOST = 1 << 28  # bytes


class Memory:
    """Values by their keys, of at most MOST bytes together: the one that was asked for least recently goes first."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[object, int]] = {}

    def get(self, key: Hashable, n_bytes: int, make: Callable[[], _T]) -> _T:
        """The value of a key, made if it is not kept; one of more than MOST bytes is never kept."""
        entry = self._kept.pop(key, None)
        value: _T = make() if entry is None else entry[0]  # type: ignore[assignment]
        if n_bytes <= MOST:
            while sum(size for _, size in self._kept.values()) + n_bytes > MOST:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = value, n_bytes
        return value
