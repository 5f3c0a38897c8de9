"""Six changes of a Head as data, which a log stores: each makes the next head of one.

None encodes an image or compiles a plan. The writer compiles once, before it publishes the head (store.Store), so that
a log of many changes is replayed at the cost of one.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

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
OPS: tuple[Op, ...] = get_args(Op)
_RECIPE = ("method", "parameters", "reducer_name", "factor", "key_precision")


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
    config   retune: the method, its parameters, the reducer's name and the search
    """

    op: Op
    uid: int = -1
    name: str = ""
    text: np.ndarray | None = None
    added: Examples | None = None
    numbers: tuple[int, ...] = ()
    config: MethodConfig | None = None

    def apply(self, head: Head) -> Head:
        """The next version of the head, its plan not compiled yet; another name without another text keeps the plan.

        Raises IosrFastError where the method would lack what it needs, and ValueError if it does not fit the head.
        """
        names, uids, texts, config, added = head.class_names, head.uids, head.text, head.config, self.added
        examples = head.examples if added is None else head.examples.joined(added)
        match self.op:
            case "add_class":
                assert texts is not None and self.text is not None
                names, uids = (*names, self.name), (*uids, head.next_class)
                texts = np.concatenate([texts, self.text[None]])
            case "remove_class":
                at = uids.index(self.uid)
                names, uids = names[:at] + names[at + 1 :], uids[:at] + uids[at + 1 :]
                texts = None if texts is None else np.delete(texts, at, axis=0)
                examples = examples.rows(examples.class_ids != self.uid)
            case "rename_class":
                at = uids.index(self.uid)
                names = (*names[:at], self.name, *names[at + 1 :])
                if self.text is not None:
                    assert texts is not None
                    texts = np.concatenate([texts[:at], self.text[None], texts[at + 1 :]])
            case "remove_examples":
                examples = examples.rows(~np.isin(examples.ids, list(self.numbers)))
            case "retune":
                assert self.config is not None
                config = self.config.fitted(head.support)  # fits the reducer
        after = replace(
            head,
            class_names=names,
            uids=uids,
            text=texts,
            examples=examples,
            config=config,
            version=head.version + 1,
            next_class=head.next_class + (self.op == "add_class"),
            next_example=head.next_example if added is None else int(added.ids.max()) + 1,
        )
        if (reason := unavailable_reason(config.method, after.support)) is not None:
            raise IosrFastError(f"the change is refused, and nothing was changed: {reason}")
        keeps_plan = self.op == "rename_class" and self.text is None
        return after.with_computed(plan=head.computed("plan")) if keeps_plan else after

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
