"""Six changes of a Head as data: each makes the next head of one, and is a record of the log.

A change is checked where it is applied, so that one that is read from a file is checked as one that a caller makes.
None encodes an image or compiles a plan: the writer compiles before it publishes the head (store.Store), so that a log
of many changes is replayed at the cost of one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import msgspec
import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.examples import Examples
from iosr_fast.head.head import Head
from iosr_fast.head.ids import class_id, example_id
from iosr_fast.head.method_config import MethodConfig
from iosr_fast.head.names import check_new_name
from iosr_fast.methods import unavailable_reason
from iosr_fast.scoring.validation import check_unit_rows
from iosr_fast.store.bundle_schema import ConfigFacts
from iosr_fast.utils.schema import Natural, Strict

Op = Literal["add_class", "add_examples", "remove_examples", "remove_class", "rename_class", "retune"]
OPS: tuple[Op, ...] = get_args(Op)


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

        Raises ValueError, before anything is made, for a change that does not fit the head: an unknown class or image,
        a name that is none or taken, embeddings of another form, fewer than two classes, a method that would lack what
        it needs.
        """
        names, uids, texts, config, added = head.class_names, head.uids, head.text, head.config, self.added
        at = uids.index(self.uid) if self.uid in uids else None
        if (at is None) != (self.op in ("add_class", "remove_examples", "retune")):
            raise IosrFastError(f"expected {self.op} of a class that is there, got {class_id(self.uid)}")
        if self.text is not None:
            _check_rows("text", self.text[None], head.examples.width)
        if added is not None:
            _check_added(added, self.uid, head)
        examples = head.examples if added is None else head.examples.joined(added)
        match self.op:
            case "add_class":
                if self.uid != head.next_class or texts is None or self.text is None:
                    raise IosrFastError(f"expected a new class {class_id(head.next_class)} with a text embedding")
                check_new_name(self.name, names)
                names, uids = (*names, self.name), (*uids, self.uid)
                texts = np.concatenate([texts, self.text[None]])
            case "remove_class" if at is not None:
                if len(uids) <= 2:
                    raise IosrFastError(
                        f"expected at least two classes to tell apart: {class_id(self.uid)!r} can't be removed"
                    )
                names, uids = names[:at] + names[at + 1 :], uids[:at] + uids[at + 1 :]
                texts = None if texts is None else np.delete(texts, at, axis=0)
                examples = examples.rows(examples.class_ids != self.uid)
            case "rename_class" if at is not None:
                check_new_name(self.name, names[:at] + names[at + 1 :])
                names = (*names[:at], self.name, *names[at + 1 :])
                if self.text is not None and texts is not None:
                    texts = np.concatenate([texts[:at], self.text[None], texts[at + 1 :]])
            case "add_examples" if added is None:
                raise IosrFastError("expected at least one image to add, got none")
            case "remove_examples":
                head.find_examples([example_id(number) for number in self.numbers])
                examples = examples.rows(~np.isin(examples.ids, list(self.numbers)))
            case "retune":
                if self.config is None:
                    raise IosrFastError("expected a method and its parameters, got none")
                ConfigFacts.of(self.config).check(head.version + 1)
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
    def result_ids(self) -> tuple[str, tuple[str, ...]]:
        """The class id, "" for none, and the ids of the images that it adds or removes."""
        numbers = self.numbers if self.added is None else self.added.ids.tolist()
        return class_id(self.uid) if self.uid >= 0 else "", tuple(map(example_id, numbers))

    def encode(self, after: Head) -> bytes:
        """The change as a Record, in MessagePack; `after` is the head that it makes."""
        added, config = self.added, self.config
        fields: dict[str, object] = {"numbers": self.numbers, "classes": len(after.uids), "images": len(after.examples)}
        if self.uid >= 0:
            fields["uid"] = self.uid
        if added is not None:
            parts = {"plain": added.embeddings.plain, "adapted": added.embeddings.adapted}
            if added.queries is not None:
                parts |= {"query_plain": added.queries.plain, "query_adapted": added.queries.adapted}
            fields |= {name: None if rows is None else _packed(rows) for name, rows in parts.items()}
            fields |= {"numbers": tuple(added.ids.tolist()), "pictures": added.pictures}
        if self.text is not None:
            fields["text"] = _packed(self.text)
        if config is not None:
            fields["config"] = msgspec.json.encode(ConfigFacts.of(config), enc_hook=float)
        return msgspec.msgpack.encode(Record(name=self.name, **fields))  # type: ignore[arg-type]


class Record(Strict, frozen=True, kw_only=True, omit_defaults=True):
    """A change in the log: arrays are little-endian float32, `config` is JSON; `classes` and `images` count those of
    the head that it makes."""

    classes: Natural
    images: Natural
    uid: Natural | None = None
    name: str = ""
    text: bytes | None = None
    numbers: tuple[Natural, ...] = ()
    plain: bytes | None = None
    adapted: bytes | None = None
    query_plain: bytes | None = None
    query_adapted: bytes | None = None
    pictures: tuple[bytes | None, ...] = ()
    config: bytes | None = None

    def apply(self, op: str, head: Head) -> Head:
        """The head that the change leads to. Raises ValueError for a record that no change is written as."""
        after = self.change(op, head.examples.width).apply(head)
        if (len(after.uids), len(after.examples)) != (self.classes, self.images):
            raise IosrFastError(f"expected {self.classes} classes and {self.images} images after it, got others")
        return after

    def change(self, op: str, width: int) -> Change:
        """The inverse of `Change.encode`, for embeddings of `width` channels."""
        if op not in OPS:
            raise IosrFastError(f"expected an op of {', '.join(OPS)}, got {op!r}")
        uid, added, numbers = -1 if self.uid is None else self.uid, None, self.numbers
        config = None if self.config is None else msgspec.json.decode(self.config, type=ConfigFacts).config(None)
        if self.plain is not None:
            ids, numbers = np.array(self.numbers, np.int64), ()
            embeddings = Embeddings(_unpacked(self.plain, width), _unpacked(self.adapted, width))
            queries = None
            if self.query_plain is not None:
                queries = Embeddings(_unpacked(self.query_plain, width), _unpacked(self.query_adapted, width))
            added = Examples(embeddings, np.full(len(ids), uid, np.int64), ids, self.pictures, queries)
        text = None if self.text is None else np.frombuffer(self.text, "<f4").astype(np.float32)
        return Change(op, uid, self.name, text, added, numbers, config)


def _check_added(added: Examples, uid: int, head: Head) -> None:
    """Raise ValueError unless these are new images of one class, numbered after those of the head, and like them."""
    first, n, old = head.next_example, len(added), head.examples
    if not n or added.ids.tolist() != list(range(first, first + n)) or (added.class_ids != uid).any():
        raise IosrFastError(f"expected images of {class_id(uid)} with ids from {example_id(first)} on, got others")
    if len(added.pictures) != n:
        raise IosrFastError(f"expected {n} pictures or None for them, got {len(added.pictures)}")
    if len(old) and (old.embeddings.adapted is None) != (added.embeddings.adapted is None):
        raise IosrFastError("expected adapted embeddings where the other images have them, and nowhere else")
    for name, rows in (("embeddings", added.embeddings), ("queries", added.queries)):
        for part in () if rows is None else (rows.plain, rows.adapted):
            if part is not None:
                _check_rows(name, part, old.width, n)


def _check_rows(name: str, rows: np.ndarray, width: int, n: int = 1) -> None:
    if rows.shape != (n, width):
        raise IosrFastError(f"expected {name} of {n} rows of {width} channels, got the shape {rows.shape}")
    check_unit_rows(name, rows)


def _packed(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array, "<f4").tobytes()


def _unpacked(rows: bytes | None, width: int) -> np.ndarray | None:
    return None if rows is None else np.frombuffer(rows, "<f4").reshape(-1, width).astype(np.float32)
