"""Six changes, each a function from one Head to the next; a change as data; its line in a log.

None of them encodes an image or compiles a plan: the next head computes its plan when it is first asked for it. So a
change costs one compilation of the method, by the writer before it publishes the head (store.Store), and a log of many
changes is replayed at the cost of one.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec
import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.examples import Examples
from iosr_fast.head.head import Head
from iosr_fast.head.method_config import MethodConfig
from iosr_fast.methods import unavailable_reason
from iosr_fast.store.bundle_schema import TunedFacts
from iosr_fast.utils.schema import facts_to_json

Op = Literal["add_class", "add_examples", "remove_examples", "remove_class", "rename_class", "retune"]
OPS: tuple[Op, ...] = ("add_class", "add_examples", "remove_examples", "remove_class", "rename_class", "retune")
_RECIPE = ("method", "parameters", "reducer_name", "factor", "key_precision")


def add_class(head: Head, name: str, text: np.ndarray, added: Examples | None) -> Head:
    """The head with one more class, by its text embedding (D,); `added`, its images, have the class id next_class."""
    assert head.text is not None
    examples = head.examples if added is None else head.examples.joined(added)
    return _next(
        head,
        class_names=(*head.class_names, name),
        uids=(*head.uids, head.next_class),
        text=np.concatenate([head.text, text[None]]),
        examples=examples,
        next_class=head.next_class + 1,
        next_example=head.next_example if added is None else int(added.ids.max()) + 1,
    )


def add_examples(head: Head, added: Examples) -> Head:
    """The head with more support images of its classes."""
    return _next(head, examples=head.examples.joined(added), next_example=int(added.ids.max()) + 1)


def remove_examples(head: Head, numbers: Sequence[int]) -> Head:
    """The head without some support images."""
    return _next(head, examples=head.examples.rows(~np.isin(head.examples.ids, list(numbers))))


def remove_class(head: Head, uid: int) -> Head:
    """The head without a class and its support images."""
    at = head.uids.index(uid)
    return _next(
        head,
        class_names=head.class_names[:at] + head.class_names[at + 1 :],
        uids=head.uids[:at] + head.uids[at + 1 :],
        text=None if head.text is None else np.delete(head.text, at, axis=0),
        examples=head.examples.rows(head.examples.class_ids != uid),
    )


def rename_class(head: Head, uid: int, name: str, text: np.ndarray | None) -> Head:
    """The head with another name of a class, and another text embedding (D,); without `text` the plan stays."""
    at = head.uids.index(uid)
    names = (*head.class_names[:at], name, *head.class_names[at + 1 :])
    if text is None:
        return _next(head, class_names=names).with_computed(plan=head.computed("plan"))
    assert head.text is not None
    rows = head.text.copy()
    rows[at] = text
    return _next(head, class_names=names, text=rows)


def retune(head: Head, config: MethodConfig) -> Head:
    """The same classes and images with another method or other parameters; its reducer is fitted on the images."""
    return _next(head, config=config.fitted(head.support))


def _next(head: Head, **fields: Any) -> Head:
    """The head with these fields, one version later. Raises IosrFastError where its method lacks what it needs."""
    after = replace(head, version=head.version + 1, **fields)
    if (reason := unavailable_reason(after.config.method, after.support)) is not None:
        raise IosrFastError(f"the change is refused, and nothing was changed: {reason}")
    return after


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
        """The head after this change, its plan not compiled yet. Raises ValueError if it does not fit the head."""
        match self.op:
            case "add_class":
                assert self.text is not None
                return add_class(head, self.name, self.text, self.added)
            case "add_examples":
                assert self.added is not None
                return add_examples(head, self.added)
            case "remove_examples":
                return remove_examples(head, self.numbers)
            case "remove_class":
                return remove_class(head, self.uid)
            case "rename_class":
                return rename_class(head, self.uid, self.name, self.text)
            case "retune":
                assert self.config is not None
                return retune(head, self.config)

    @property
    def example_numbers(self) -> tuple[int, ...]:
        """The numbers of the images that it adds or removes."""
        return self.numbers if self.added is None else tuple(self.added.ids.tolist())

    def to_json(self) -> dict[str, Any]:
        """JSON-ready and lossless: arrays as base64 of little-endian float32."""
        line: dict[str, Any] = {"op": self.op, "text": _packed(self.text)}
        line |= {"class": self.uid if self.uid >= 0 else None, "name": self.name or None}
        line["examples"] = list(self.example_numbers) or None
        if self.added is not None:
            shown = [None if picture is None else base64.b64encode(picture).decode() for picture in self.added.pictures]
            parts = {"embeddings": _packed_rows(self.added.embeddings), "queries": _packed_rows(self.added.queries)}
            line |= {"pictures": shown, **parts}
        if self.config is not None:
            line["recipe"] = {name: getattr(self.config, name) for name in _RECIPE}
            line["tuned"] = self.config.tuned and facts_to_json(TunedFacts.of(self.config.tuned))
        return {name: value for name, value in line.items() if value is not None}

    @classmethod
    def from_json(cls, line: Mapping[str, Any], width: int) -> Change:
        """The inverse of `to_json`, for embeddings of `width` channels. Raises KeyError, TypeError or ValueError."""
        if line["op"] not in OPS:
            raise IosrFastError(f"expected an op of {', '.join(OPS)}, got {line['op']!r}")
        added, uid, numbers, text = None, line.get("class", -1), line.get("examples", ()), None
        if "embeddings" in line:
            pictures = tuple(None if p is None else base64.b64decode(p) for p in line["pictures"])
            embeddings, queries = (_unpacked_rows(line.get(name), width) for name in ("embeddings", "queries"))
            assert embeddings is not None
            ids, numbers = np.array(numbers, np.int64), ()
            if not len(ids) == len(embeddings) == len(pictures):
                raise IosrFastError(
                    f"expected {len(ids)} embeddings and pictures, got {len(embeddings)} and {len(pictures)}"
                )
            added = Examples(embeddings, np.full(len(ids), uid, np.int64), ids, pictures, queries)
        if "text" in line:
            text = _unpacked(line["text"], width)[0]
        tuned = msgspec.convert(line["tuned"], TunedFacts).tuned() if "tuned" in line else None
        config = MethodConfig(**line["recipe"], tuned=tuned) if "recipe" in line else None
        return cls(line["op"], uid, line.get("name", ""), text, added, tuple(numbers), config)


def _packed(array: np.ndarray | None) -> str | None:
    return None if array is None else base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode()


def _packed_rows(rows: Embeddings | None) -> dict[str, str | None] | None:
    parts = {} if rows is None else {"plain": _packed(rows.plain), "adapted": _packed(rows.adapted)}
    return {name: part for name, part in parts.items() if part is not None} or None


def _unpacked(text: str, width: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4").reshape(-1, width).astype(np.float32)


def _unpacked_rows(parts: Mapping[str, str] | None, width: int) -> Embeddings | None:
    if parts is None:
        return None
    return Embeddings(*(_unpacked(parts[name], width) if name in parts else None for name in ("plain", "adapted")))
