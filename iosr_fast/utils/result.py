"""Result: what pandas and notebooks show of a result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from iosr_fast.utils.require import require
from iosr_fast.utils.short_repr import table_repr


class Result(ABC):
    """A result that pandas and notebooks show: its columns, lists and arrays of one length, and a summary."""

    __repr__ = table_repr

    @abstractmethod
    def _columns(self) -> Mapping[str, Any]: ...

    def summary(self) -> str:
        """What was found, a line each."""
        return ""

    def to_frame(self) -> Any:
        """A pandas.DataFrame of the result. Raises MissingPackageError without pandas."""
        return require("pandas").DataFrame(self._columns())

    def _repr_html_(self) -> str:
        from iosr_fast.utils.html import overview

        return overview(self.summary(), self._columns())
