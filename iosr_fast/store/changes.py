"""Changes of a Head: each is a struct that makes the next head of one, and a record of the log.

A change is checked where it is applied, so that one that is read from a file is checked as one that a caller makes.
None encodes an image or compiles a plan: the writer does before it publishes the head (store.Store), so that a log of
many changes is replayed at the cost of one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import msgspec
import numpy as np
from msgspec import structs

from iosr_fast.exceptions import DamagedFileError, IosrFastError
from iosr_fast.head.class_tree import check_nodes
from iosr_fast.head.examples import Examples
from iosr_fast.head.fit import NO_TREE
from iosr_fast.head.head import OF_SUPPORT, Head
from iosr_fast.head.ids import class_id, example_id
from iosr_fast.head.labels import SEPARATOR
from iosr_fast.head.names import check_new_name, check_separable
from iosr_fast.methods.config import Config
from iosr_fast.methods.tree import Path
from iosr_fast.scoring.validation import check_unit_rows
from iosr_fast.sealed.schema import Natural, Strict
from iosr_fast.store.bundle_arrays import SUPPORT, TABLE, parts_of, value_at

# What is computed of a head and knows no tree, then what knows no names of classes.
TREELESS = (*OF_SUPPORT, "calibration", "temperature", "unknown")
NAMELESS = (*TREELESS, "judged")
_PLACES = "head.text", "head.examples."
# The arrays that a change may bring, as a bundle names them.
_ROWS = [name for name, form in TABLE[SUPPORT].items() if form.unit and form.place.startswith(_PLACES)]


@dataclass(frozen=True)
class ChangeResult:
    """What a change did: the version that it made, its class, "" for none or several, and the examples that it added or
    removed.

    >>> ChangeResult(version=2, class_id="~3", example_ids=("~12", "~13")).version
    2
    """

    version: int
    class_id: str = ""
    example_ids: tuple[str, ...] = ()


class Change(Strict, frozen=True, kw_only=True, omit_defaults=True):
    """What makes the next head of one. The log has its fields in MessagePack, beside `op`; `classes` and `images` count
    those of the head that it makes, and are known once it is made."""

    op: ClassVar[str]
    classes: Natural | None = None
    images: Natural | None = None

    @abstractmethod
    def apply(self, head: Head) -> Head:
        """The next version of the head, its plan not compiled yet.

        Raises ValueError for a change that does not fit the head: an unknown class or image, a name or node that is
        none or taken, embeddings of another form, fewer than two classes, a method that would lack what it needs.
        """

    def encode(self, made: Head) -> bytes:
        """The record of the change that makes this head."""
        return msgspec.msgpack.encode(structs.replace(self, classes=len(made.uids), images=len(made.examples)))

    def replay(self, head: Head) -> Head:
        """As `apply`, of a record. Raises ValueError, too, where another head is made than it says."""
        made = self.apply(head)
        if (len(made.uids), len(made.examples)) != (self.classes, self.images):
            raise IosrFastError(f"expected {self.classes} classes and {self.images} images after it, got others")
        return made

    def result_ids(self, before: Head) -> tuple[str, tuple[str, ...]]:
        """The class id, "" for none or several, and the ids of the images that it adds to or removes from `before`."""
        uids = {*self.classes_of(before)}
        return class_id(*uids) if len(uids) == 1 else "", tuple(map(example_id, getattr(self, "numbers", ())))

    def classes_of(self, before: Head) -> Iterable[int]:
        """The uids of the classes that it changes."""
        return [self.uid] if hasattr(self, "uid") else []


class AddExamples(Change, frozen=True, omit_defaults=True):
    """More support images of a class: their numbers, pictures, paths and groups, as of Examples, and in `arrays` their
    embeddings (_to_bytes). Where images may have several labels, they have those of the `others`, too, or with `uid`
    None no label."""

    op = "add_examples"
    uid: Natural | None
    numbers: tuple[Natural, ...] = ()
    pictures: tuple[bytes | None, ...] = ()
    paths: tuple[str | None, ...] = ()
    groups: tuple[Natural, ...] = ()
    arrays: dict[str, bytes] = msgspec.field(default_factory=dict)
    others: tuple[Natural, ...] = ()

    @property
    def labels(self) -> tuple[int, ...]:
        """The classes of the images."""
        return () if self.uid is None else (self.uid, *self.others)

    def classes_of(self, before: Head) -> Iterable[int]:
        return self.labels

    @classmethod
    def of(cls, uid: int | None, added: Examples | None, text: np.ndarray | None = None, **fields: Any) -> Self:
        """The change that adds numbered images to a class, or a class with its text embedding (D,)."""
        columns: dict[str, Any] = {}
        if added is not None:
            groups = () if added.groups is None else tuple(added.groups.tolist())
            columns = {"numbers": (*added.ids.tolist(),), "groups": groups}
            columns |= {"pictures": added.pictures, "paths": added.paths}
        return cls(uid, **columns, arrays=_to_bytes(text, added), **fields)

    def apply(self, head: Head) -> Head:
        _check_labels(head, self.labels)
        if not self.numbers:
            raise IosrFastError("expected images for add_examples, got none")
        return _next(head, **self._fields(head))

    def _fields(self, head: Head) -> dict[str, Any]:
        """What the next head has of `arrays` and images. Raises ValueError unless these are numbered after those of the
        head and of the same form."""
        n, first, old = len(self.numbers), head.next_example, head.examples
        fields = _from_bytes(self.arrays, n, head, self.op)
        rows = fields.pop("examples", {})
        if self.numbers != (*range(first, first + n),) or ("embeddings" in rows) != (n > 0):
            raise IosrFastError(f"expected images with ids from {example_id(first)} on")
        for name, least in (("pictures", n), ("paths", 0), ("groups", 0)):
            if (count := len(getattr(self, name))) not in (least, n):
                raise IosrFastError(f"expected {name} for {n} images, got {count}")
        if not n:
            return fields
        groups = np.array(self.groups, np.int64) if self.groups else None
        several = head.is_multi_label
        class_ids, owners = np.repeat(np.array(self.labels, np.int64), n), np.tile(np.arange(n), len(self.labels))
        columns = np.array(self.numbers, np.int64), self.pictures, rows.get("queries"), groups, self.paths
        added = Examples(rows["embeddings"], class_ids, *columns, owners if several else None)
        if len(old) and (old.embeddings.adapted is None) != (added.embeddings.adapted is None):
            raise IosrFastError("expected adapted embeddings where the other images have them, and nowhere else")
        return {**fields, "examples": old.joined(added), "next_example": first + n}


class AddClass(AddExamples, frozen=True, kw_only=True, omit_defaults=True):
    """A new class with its name, images if any, in `arrays` the text embedding where classes have one, and the names of
    the nodes above it, from the root's child down. Where images may have several labels, `known` support images get
    this one, too."""

    op = "add_class"
    name: str
    path: Path = ()
    known: tuple[Natural, ...] = ()

    def apply(self, head: Head) -> Head:
        if self.uid != head.next_class:
            raise IosrFastError(f"expected a new class {class_id(head.next_class)}, got one of number {self.uid}")
        _check_name(head, self.name, head.class_names)
        fields = self._fields(head)
        if head.text is not None:
            if "text" not in fields:
                raise IosrFastError("expected the text embedding of a new class, got none")
            fields["text"] = np.concatenate([head.text, fields["text"]])
        if self.known:
            if not head.is_multi_label:
                raise IosrFastError("expected no known images for a class, as each has one label, got some")
            head.find_examples([example_id(number) for number in self.known])
            examples = fields.get("examples", head.examples)
            fields["examples"] = examples.with_label(np.isin(examples.ids, self.known), self.uid)
        names, paths = (*head.class_names, self.name), (*head.tree.paths, self.path)
        fields |= {"class_names": names, "uids": (*head.uids, head.next_class), "next_class": head.next_class + 1}
        return _next(head, paths=paths, **fields)


class Relabel(Change, frozen=True, omit_defaults=True):
    """Support images, by their numbers, that have other labels from now on: one, or where images may have several any
    number."""

    op = "relabel"
    numbers: tuple[Natural, ...]
    labels: tuple[Natural, ...]

    def apply(self, head: Head) -> Head:
        head.find_examples([example_id(number) for number in self.numbers])
        _check_labels(head, self.labels)
        chosen = np.isin(head.examples.ids, self.numbers)
        return _next(head, examples=head.examples.relabelled(chosen, self.labels))

    def classes_of(self, before: Head) -> Iterable[int]:
        return self.labels


class RemoveExamples(Change, frozen=True, omit_defaults=True):
    """Support images that go, by their numbers."""

    op = "remove_examples"
    numbers: tuple[Natural, ...]

    def apply(self, head: Head) -> Head:
        head.find_examples([example_id(number) for number in self.numbers])
        return _next(head, examples=head.examples.rows(~np.isin(head.examples.ids, self.numbers)))

    def classes_of(self, before: Head) -> Iterable[int]:
        classes: list[int] = before.examples.rows(np.isin(before.examples.ids, self.numbers)).class_ids.tolist()
        return classes


class RemoveClass(Change, frozen=True, omit_defaults=True):
    """A class that goes, with its images and those of calibrate_on; where images may have several labels, these stay
    and lose the label."""

    op = "remove_class"
    uid: Natural

    def apply(self, head: Head) -> Head:
        at = _position(head, self)
        if len(head.uids) <= 2:
            raise IosrFastError(f"expected at least two classes to tell apart: {class_id(self.uid)!r} can't be removed")
        kept = {name: _put(getattr(head, name), at) for name in ("class_names", "uids")}
        for name in ("examples", "calibration_images"):
            if (images := getattr(head, name)) is not None:
                kept[name] = images.without_class(self.uid)
        text = None if head.text is None else np.delete(head.text, at, axis=0)
        return _next(head, text=text, paths=_put(head.tree.paths, at), **kept)


class RenameClass(Change, frozen=True, omit_defaults=True):
    """Another name of a class, and in `arrays` its text embedding where that changes."""

    op = "rename_class"
    uid: Natural
    name: str
    arrays: dict[str, bytes] = msgspec.field(default_factory=dict)

    @classmethod
    def of(cls, uid: int, name: str, text: np.ndarray | None = None) -> RenameClass:
        """The change; `text` is (D,)."""
        return cls(uid, name, _to_bytes(text))

    def apply(self, head: Head) -> Head:
        at = _position(head, self)
        _check_name(head, self.name, _put(head.class_names, at))
        names = _put(head.class_names, at, self.name)
        text = _from_bytes(self.arrays, 0, head, self.op).get("text")
        if head.text is None or text is None:
            return _next(head, NAMELESS, class_names=names)
        return _next(head, class_names=names, text=np.concatenate([head.text[:at], text, head.text[at + 1 :]]))


class MoveClass(Change, frozen=True, omit_defaults=True):
    """Another place of a class in the tree: the names of the nodes above it, from the root's child down."""

    op = "move_class"
    uid: Natural
    path: Path = ()

    def apply(self, head: Head) -> Head:
        return _next(head, TREELESS, paths=_put(head.tree.paths, _position(head, self), self.path))


class Retune(Change, frozen=True, omit_defaults=True):
    """Another method or other parameters: a Config as JSON, which has no NaN."""

    op = "retune"
    config: bytes

    @classmethod
    def of(cls, config: Config) -> Retune:
        """The change to this method and these parameters."""
        return cls(msgspec.json.encode(config, enc_hook=float))

    def apply(self, head: Head) -> Head:
        config = msgspec.json.decode(self.config, type=Config)
        config.check(head.version + 1)
        return _next(head, config=config, reducer=config.fit_reducer(head.support))


_KINDS: dict[str, type[Change]] = {
    kind.op: kind
    for kind in (AddClass, AddExamples, Relabel, RemoveExamples, RemoveClass, RenameClass, MoveClass, Retune)
}


def decode(op: str, record: bytes) -> Change:
    """The change of a record. Raises ValueError for a record that no change is written as."""
    if op not in _KINDS:
        raise DamagedFileError(f"expected a change of {', '.join(_KINDS)}, got {op!r}")
    return msgspec.msgpack.decode(record, type=_KINDS[op])


def _next(head: Head, kept: tuple[str, ...] = (), **fields: Any) -> Head:
    """The next version with these fields, for which the cached properties `kept` stay."""
    if "paths" in fields and not any(fields["paths"]):
        fields["paths"] = None
    made = replace(head, version=head.version + 1, **fields)
    if made.paths is not None and made.is_multi_label:
        raise IosrFastError(NO_TREE)
    check_nodes(made.paths or (), made.class_names)
    if (reason := made.config.unavailable_reason(made.support)) is not None:
        raise IosrFastError(f"the change is refused, and nothing was changed: {reason}")
    return made.with_computed(**{name: head.computed(name) for name in kept})


def _position(head: Head, change: Any) -> int:
    """Where the head has the class of a change."""
    if change.uid not in head.uids:
        raise IosrFastError(f"expected a class to {change.op}, got {class_id(change.uid)}")
    return head.uids.index(change.uid)


def _check_labels(head: Head, uids: Sequence[int]) -> None:
    """Raise IosrFastError unless images of the head may have these labels together."""
    several = head.is_multi_label
    if (len(uids) != 1 and not several) or len({*uids}) < len(uids) or not {*uids} <= {*head.uids}:
        expected = "classes that are there, each once" if several else "one class that is there"
        raise IosrFastError(f"expected {expected}, got {', '.join(map(class_id, uids)) or 'none'}")


def _check_name(head: Head, name: str, others: Sequence[str]) -> None:
    """The name of a class beside those of others, of a log, too."""
    check_new_name(name, others, saved=True)
    if head.is_multi_label:
        check_separable((name,), SEPARATOR)


def _put(column: tuple[Any, ...], at: int, *value: Any) -> tuple[Any, ...]:
    """A column of classes with another value at a place, or without one."""
    return (*column[:at], *value, *column[at + 1 :])


def _to_bytes(text: np.ndarray | None, added: Examples | None = None) -> dict[str, bytes]:
    """A text embedding (D,) and the embeddings of images as little-endian float32, named as in bundles."""
    head = SimpleNamespace(text=None if text is None else text[None], examples=added)
    rows = {name: value_at({"head": head}, TABLE[SUPPORT][name].place) for name in _ROWS}
    return {name: np.ascontiguousarray(one, "<f4").tobytes() for name, one in rows.items() if one is not None}


def _from_bytes(arrays: dict[str, bytes], n: int, head: Head, op: str) -> dict[str, Any]:
    """The arrays at their places in a Head (bundle_arrays.parts_of). Raises ValueError for others than a text embedding
    where there may be one, and embeddings of n images."""
    if unknown := sorted(arrays.keys() - {*_ROWS}):
        raise IosrFastError(f"expected arrays among {', '.join(_ROWS)}, got {', '.join(unknown)}")
    if "text" in arrays and (head.text is None or op == "add_examples"):
        raise IosrFastError(f"expected no text embedding to {op}, got one")
    width = head.examples.width
    rows = {name: np.frombuffer(data, "<f4").reshape(-1, width) for name, data in arrays.items()}
    for name, array in rows.items():
        shape = 1 if name == "text" else n, width
        if array.shape != shape or not len(array):
            raise IosrFastError(f"expected {name} of shape {shape}, got {array.shape}")
        check_unit_rows(name, array)
    return dict(parts_of(SUPPORT, rows).get("head", {}))
