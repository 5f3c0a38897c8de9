"""Changes of a classifier as data: their fields, how they turn one Head into another, their line in a log."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.examples import Examples
from iosr_fast.head.head import Head
from iosr_fast.head.method_config import MethodConfig
from iosr_fast.store.tuned_facts import tuned_from_json, tuned_to_json

Op = Literal["add_class", "add_examples", "remove_examples", "remove_class", "rename_class", "retune"]
OPS: tuple[Op, ...] = ("add_class", "add_examples", "remove_examples", "remove_class", "rename_class", "retune")


@dataclass(frozen=True)
class ChangeResult:
    """What a change did: the version that it made, its class ("" for none), the examples that it added or removed.

    >>> ChangeResult(version=2, class_id="~3", example_ids=("~12", "~13")).version
    2
    """

    version: int
    class_id: str = ""
    example_ids: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Change:
    """A change with all that is needed to apply it again to the same head: embeddings, not images.

    op       its kind
    uid      its class (add_class: the new one)
    name     add_class and rename_class
    text     (D,) float32, the class's text embedding: add_class, and rename_class where it changes
    added    add_class and add_examples: the support images, numbered
    numbers  remove_examples: the numbers of the images
    config   retune: the method, its parameters, the reducer's name and the evidence; its reducer is fitted when it is
             applied
    """

    op: Op
    uid: int = -1
    name: str = ""
    text: np.ndarray | None = None
    added: Examples | None = None
    numbers: tuple[int, ...] = ()
    config: MethodConfig | None = None

    def apply(self, head: Head) -> Head:
        """The head after this change. Raises ValueError if it does not fit the head."""
        if self.op == "add_class":
            assert self.text is not None
            return head.adding_class(self.name, self.text, self.added)
        if self.op == "add_examples":
            assert self.added is not None
            return head.adding(self.added)
        if self.op == "remove_examples":
            return head.removing(self.numbers)
        if self.op == "remove_class":
            return head.removing_class(self.uid)
        if self.op == "rename_class":
            return head.renaming(self.uid, self.name, self.text)
        assert self.config is not None
        return head.with_config(self.config.fitted(head.support))

    @property
    def example_numbers(self) -> tuple[int, ...]:
        """The numbers of the images that it adds or removes."""
        return self.numbers if self.added is None else tuple(self.added.ids.tolist())

    def to_json(self) -> dict[str, Any]:
        """JSON-ready and lossless: arrays as base64 of little-endian float32."""
        line: dict[str, Any] = {"op": self.op}
        if self.uid >= 0:
            line["class"] = self.uid
        if self.name:
            line["name"] = self.name
        if self.text is not None:
            line["text"] = _packed(self.text)
        if self.numbers:
            line["examples"] = list(self.numbers)
        if self.added is not None:
            line["examples"] = self.added.ids.tolist()
            line["pictures"] = [None if p is None else base64.b64encode(p).decode() for p in self.added.pictures]
            for name, rows in (("embeddings", self.added.embeddings), ("queries", self.added.queries)):
                if rows is not None:
                    line[name] = {
                        part: _packed(array)
                        for part, array in (("plain", rows.plain), ("adapted", rows.adapted))
                        if array is not None
                    }
        if self.config is not None:
            line["recipe"] = {
                name: getattr(self.config, name)
                for name in ("method", "parameters", "reducer_name", "factor", "key_precision")
            }
            if self.config.tuned is not None:
                line["tuned"] = tuned_to_json(self.config.tuned)
        return line

    @classmethod
    def from_json(cls, line: Mapping[str, Any], width: int) -> Change:
        """The inverse of `to_json`, for embeddings of `width` channels. Raises KeyError, TypeError or ValueError."""
        if line["op"] not in OPS:
            raise IosrFastError(f"expected an op of {', '.join(OPS)}, got {line['op']!r}")
        added = None
        if "embeddings" in line:
            pictures = tuple(None if p is None else base64.b64decode(p) for p in line["pictures"])
            embeddings, queries = (_unpacked_rows(line.get(name), width) for name in ("embeddings", "queries"))
            assert embeddings is not None
            ids = np.array(line["examples"], np.int64)
            if not len(ids) == len(embeddings) == len(pictures):
                raise IosrFastError(
                    f"expected {len(ids)} embeddings and pictures, got {len(embeddings)} and {len(pictures)}"
                )
            added = Examples(embeddings, np.full(len(ids), line["class"], np.int64), ids, pictures, queries)
        tuned = tuned_from_json(line["tuned"]) if "tuned" in line else None
        return cls(
            line["op"],
            line.get("class", -1),
            line.get("name", ""),
            _unpacked(line["text"], width)[0] if "text" in line else None,
            added,
            tuple(line.get("examples", ())) if added is None else (),
            MethodConfig(**line["recipe"], tuned=tuned) if "recipe" in line else None,
        )


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode()


def _unpacked(text: str, width: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4").reshape(-1, width).astype(np.float32)


def _unpacked_rows(parts: Mapping[str, str] | None, width: int) -> Embeddings | None:
    if parts is None:
        return None
    adapted = _unpacked(parts["adapted"], width) if "adapted" in parts else None
    return Embeddings(_unpacked(parts["plain"], width), adapted)
