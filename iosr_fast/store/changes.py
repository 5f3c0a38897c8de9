"""Seven changes of a Head as data: each makes the next head of one, and is a record of the log.

A change is checked where it is applied, so that one that is read from a file is checked as one that a caller makes.
None encodes an image or compiles a plan: the writer does before it publishes the head (store.Store), so that a log of
many changes is replayed at the cost of one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import msgspec
import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.class_tree import check_nodes
from iosr_fast.head.examples import Examples
from iosr_fast.head.head import Head
from iosr_fast.head.ids import class_id, example_id
from iosr_fast.head.names import check_new_name
from iosr_fast.methods.config import Config
from iosr_fast.methods.tree import Path
from iosr_fast.scoring.validation import check_unit_rows
from iosr_fast.sealed.schema import Natural, Strict

Op = Literal["add_class", "add_examples", "remove_examples", "remove_class", "rename_class", "move_class", "retune"]
# What is computed of a head and knows no tree, then what knows no names of classes.
TREELESS = ("support", "plan", "look_alikes", "folds", "out_of_fold", "calibration", "temperature", "unknown")
NAMELESS = (*TREELESS, "judged")
_ARRAYS = ("text", "plain", "adapted", "query_plain", "query_adapted")


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


@dataclass(frozen=True, eq=False)
class Change:
    """A change with all that is needed to apply it again to the same head: embeddings, not images.

    op       its kind
    uid      its class (add_class: the new one)
    name     add_class and rename_class
    text     (D,) float32, the embedding of its name, where classes have one: add_class, rename_class where it changes
    added    add_class and add_examples: the support images, numbered
    numbers  remove_examples: the numbers of the images
    config   retune: the method, its parameters, the reducer's name and the search
    path     add_class and move_class: the names of the nodes above the class, from the root's child down
    """

    op: Op
    uid: int = -1
    name: str = ""
    text: np.ndarray | None = None
    added: Examples | None = None
    numbers: tuple[int, ...] = ()
    config: Config | None = None
    path: Path = ()

    def apply(self, head: Head) -> Head:
        """The next version of the head, its plan not compiled yet; another name without another text keeps NAMELESS,
        another place in the tree TREELESS.

        Raises ValueError for a change that does not fit the head: an unknown class or image, a name or node that is
        none or taken, embeddings of another form, fewer than two classes, a method that would lack what it needs.
        """
        names, uids, texts, added = head.class_names, head.uids, head.text, self.added
        config, reducer = head.config, head.reducer
        calibration = head.calibration_images
        examples = self._examples(head)
        if self.text is not None and (texts is None or self.op not in ("add_class", "rename_class")):
            raise IosrFastError(f"expected no text embedding to {self.op}, got one")
        at = uids.index(self.uid) if self.uid in uids else len(uids)
        if (at == len(uids)) != (self.op in ("add_class", "remove_examples", "retune")):
            raise IosrFastError(f"expected a class to {self.op}, got {class_id(self.uid)}")
        before = slice(at)
        after = slice(at + 1, None)
        above = head.tree.paths
        place = (self.path,) if self.op in ("add_class", "move_class") else above[at : at + 1]
        above = above[before] + (() if self.op == "remove_class" else place) + above[after]
        match self.op:
            case "add_class" | "rename_class":
                if self.op == "add_class" and self.uid != head.next_class:
                    raise IosrFastError(f"expected a new class {class_id(head.next_class)}, got {class_id(self.uid)}")
                if self.op == "add_class" and self.text is None and texts is not None:
                    raise IosrFastError("expected the text embedding of a new class, got none")
                check_new_name(self.name, names[before] + names[after], saved=True)  # of a log, too
                names, uids = (*names[before], self.name, *names[after]), (*uids[before], self.uid, *uids[after])
                if self.text is not None and texts is not None:
                    texts = np.concatenate([texts[before], self.text[None], texts[after]])
            case "remove_class":
                if len(uids) <= 2:
                    raise IosrFastError(
                        f"expected at least two classes to tell apart: {class_id(self.uid)!r} can't be removed"
                    )
                names, uids = names[before] + names[after], uids[before] + uids[after]
                texts = None if texts is None else np.delete(texts, at, axis=0)
                examples = examples.rows(examples.class_ids != self.uid)
                if calibration is not None:
                    calibration = calibration.rows(calibration.class_ids != self.uid)
            case "remove_examples":
                head.find_examples([example_id(number) for number in self.numbers])
                examples = examples.rows(~np.isin(examples.ids, list(self.numbers)))
            case "retune":
                if self.config is None:
                    raise IosrFastError("expected a method and its parameters, got none")
                self.config.check(head.version + 1)
                config = self.config
                reducer = self.config.fit_reducer(head.support)
        check_nodes(above, names)
        made = replace(
            head,
            class_names=names,
            uids=uids,
            text=texts,
            examples=examples,
            config=config,
            reducer=reducer,
            version=head.version + 1,
            next_class=head.next_class + (self.op == "add_class"),
            next_example=head.next_example + (0 if added is None else len(added)),
            calibration_images=calibration,
            paths=above if any(above) else None,
        )
        if (reason := config.unavailable_reason(made.support)) is not None:
            raise IosrFastError(f"the change is refused, and nothing was changed: {reason}")
        kept = {"rename_class": NAMELESS if self.text is None else (), "move_class": TREELESS}.get(self.op, ())
        return made.with_computed(**{name: head.computed(name) for name in kept})

    def _examples(self, head: Head) -> Examples:
        """The images of the head and the added ones. Raises ValueError unless these are numbered after those, of the
        class of the change and of the same form."""
        added, old, first = self.added, head.examples, head.next_example
        n = 0 if added is None else len(added)
        for name, rows in self._arrays().items():
            if rows.shape != (shape := (1 if name == "text" else n, old.width)):
                raise IosrFastError(f"expected {name} of shape {shape}, got {rows.shape}")
            check_unit_rows(name, rows)
        if not {"add_examples": n > 0, "add_class": n > 0 or added is None}.get(self.op, added is None):
            raise IosrFastError(f"expected images for add_examples, if any for add_class, else none, got {n}")
        if added is None:
            return old
        if added.ids.tolist() != [*range(first, first + n)] or {*added.class_ids.tolist()} != {self.uid}:
            raise IosrFastError(f"expected images of {class_id(self.uid)} with ids from {example_id(first)} on")
        if len(added.pictures) != n or len(added.paths) not in (0, n):
            counts = len(added.pictures), len(added.paths)
            raise IosrFastError(f"expected {n} pictures and paths, or None in their place, got {counts}")
        if added.groups is not None and len(added.groups) != n:
            raise IosrFastError(f"expected a group for each of {n} images, or none, got {len(added.groups)}")
        if len(old) and (old.embeddings.adapted is None) != (added.embeddings.adapted is None):
            raise IosrFastError("expected adapted embeddings where the other images have them, and nowhere else")
        return old.joined(added)

    def _arrays(self) -> dict[str, np.ndarray]:
        """The arrays that there are, by _ARRAYS."""
        parts = [None if self.text is None else self.text[None]]
        for rows in () if self.added is None else (self.added.embeddings, self.added.queries):
            parts += [None, None] if rows is None else [rows.plain, rows.adapted]
        return {name: rows for name, rows in zip(_ARRAYS, parts, strict=False) if rows is not None}

    def result_ids(self, before: Head) -> tuple[str, tuple[str, ...]]:
        """The class id, "" for none or several, and the ids of the images that it adds to or removes from `before`."""
        numbers = self.numbers if self.added is None else self.added.ids.tolist()
        owners = before.examples.class_ids[np.isin(before.examples.ids, self.numbers)]
        uids = {self.uid} if self.uid >= 0 else {*owners.tolist()}
        return class_id(*uids) if len(uids) == 1 else "", tuple(map(example_id, numbers))

    def encode(self, made: Head) -> bytes:
        """The change as a Record, in MessagePack; `made` is the head that it makes."""
        added, config = self.added, self.config
        record = Record(
            classes=len(made.uids),
            images=len(made.examples),
            uid=None if self.uid < 0 else self.uid,
            name=self.name,
            numbers=self.numbers if added is None else tuple(added.ids.tolist()),
            pictures=() if added is None else added.pictures,
            paths=() if added is None else added.paths,
            groups=() if added is None or added.groups is None else tuple(added.groups.tolist()),
            arrays={name: np.ascontiguousarray(rows, "<f4").tobytes() for name, rows in self._arrays().items()},
            config=None if config is None else msgspec.json.encode(config, enc_hook=float),
            path=self.path,
        )
        return msgspec.msgpack.encode(record)


class Record(Strict, frozen=True, kw_only=True, omit_defaults=True):
    """A change in the log: `arrays` are little-endian float32 by _ARRAYS, `config` is JSON, which has no NaN; `classes`
    and `images` count those of the head that it makes."""

    classes: Natural
    images: Natural
    uid: Natural | None = None
    name: str = ""
    numbers: tuple[Natural, ...] = ()
    pictures: tuple[bytes | None, ...] = ()
    paths: tuple[str | None, ...] = ()
    groups: tuple[Natural, ...] = ()
    arrays: dict[str, bytes] = msgspec.field(default_factory=dict)
    config: bytes | None = None
    path: Path = ()

    def apply(self, op: str, head: Head) -> Head:
        """The head that the change leads to. Raises ValueError for a record that no change is written as."""
        if op not in get_args(Op) or set(self.arrays) - set(_ARRAYS):
            raise IosrFastError(f"expected a change of {', '.join(get_args(Op))} with known arrays, got {op!r}")
        uid = -1 if self.uid is None else self.uid
        added = None
        numbers = self.numbers
        rows = {n: np.frombuffer(data, "<f4").reshape(-1, head.examples.width) for n, data in self.arrays.items()}
        config = None if self.config is None else msgspec.json.decode(self.config, type=Config)
        if "plain" in rows:
            embeddings = Embeddings(rows["plain"], rows.get("adapted"))
            queries = Embeddings(rows["query_plain"], rows.get("query_adapted")) if "query_plain" in rows else None
            ids = np.array(numbers, np.int64)
            numbers = ()
            owners = np.full(len(ids), uid, np.int64)
            groups = np.array(self.groups, np.int64) if self.groups else None
            added = Examples(embeddings, owners, ids, self.pictures, queries, groups, self.paths)
        text = rows["text"][0] if len(rows.get("text", ())) else None
        change = Change(cast(Op, op), uid, self.name, text, added, numbers, config, self.path)
        made = change.apply(head)
        counts = len(made.uids), len(made.examples)
        if counts != (self.classes, self.images) or change._arrays().keys() != self.arrays.keys():
            raise IosrFastError(f"expected {self.classes} classes and {self.images} images after it, got others")
        return made
