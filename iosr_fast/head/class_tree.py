"""The tree over classes as callers and files give it, checked: of each class the path of nodes above it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path as FilePath
from typing import Any, TypeAlias

from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.names import as_seen, name_fault
from iosr_fast.methods.tree import Path
from iosr_fast.utils.csv_text import check_columns, read_rows
from iosr_fast.utils.text import abbreviate, did_you_mean

Parents: TypeAlias = Mapping[str, str | None]  # of classes and of nodes; None is the root
Parent: TypeAlias = str | Sequence[str] | None  # a node by its name or its path (path_below)
DEEPEST = 100  # nodes above a class


def read_parents(file: str | FilePath) -> dict[str, str | None]:
    """A tree from a CSV file: a row for each class or node and its parent, which is blank directly below the root."""
    file = FilePath(file)
    if not file.is_file():
        raise FileNotFoundError(f"expected a CSV file of class and parent, found no file {file}")
    columns, rows = read_rows(file)
    check_columns(columns, file, ("class", "parent"), "")
    parents: dict[str, str | None] = {}
    for row in rows:
        name, parent = row["class"].strip(), row["parent"].strip() or None
        if parents.setdefault(name, parent) != parent:
            raise IosrFastError(f"expected one parent of {name!r} in {file}, got {parents[name]!r} and {parent!r}")
    return parents


def paths_of(tree: Any, names: Sequence[str], labels: Sequence[Any] = ()) -> tuple[Path, ...] | None:
    """The paths (C) of the classes of these names in a `tree` (Parents); None where no class is below a node. A class
    may be named by its label, if `labels` (C,) are given.

    Raises IosrFastError for another type, a class as a parent, a node below itself, an entry below which is no class, a
    class by its name and by its label, and as `check_nodes`.
    """
    if not isinstance(tree, Mapping | None):
        raise IosrFastError(f"expected tree as a mapping of classes and nodes to parents, got {type(tree).__name__}")
    of_labels = dict(zip(labels, names, strict=False))
    parents: dict[Any, Any] = {of_labels.get(name, name): parent for name, parent in (tree or {}).items()}
    if len(parents) < len(tree or {}):
        raise IosrFastError("expected each class once in tree, got one as text and as its label")
    if wrong := [one for one in parents.items() if not (isinstance(one[0], str) and isinstance(one[1], str | None))]:
        raise IosrFastError(f"expected names of classes and nodes in tree, got {wrong[0]!r:.100}")
    if classes := sorted(frozenset(names).intersection(parents.values())):
        raise IosrFastError(f"expected nodes as parents in tree, got {abbreviate(classes)}: no class is below another")
    paths = []
    for name in names:
        path = list[str]()
        node = parents.get(name)
        while node is not None and len(path) <= DEEPEST:
            if node in path:
                raise IosrFastError(f"expected a tree, got the node {node!r} below itself")
            path.append(str.__str__(node))
            node = parents.get(node)
        paths.append(tuple(reversed(path)))
    used = frozenset(names).union(*paths)
    check_nodes(paths, names)
    if others := [name for name in parents if name not in used]:
        near = did_you_mean(others[0], used, 3) or f"the classes are {abbreviate(names)}"
        raise IosrFastError(f"expected classes in tree and nodes above them, got {abbreviate(others)}; {near}")
    return tuple(paths) if any(paths) else None


def check_nodes(paths: Sequence[Sequence[str]], names: Sequence[str]) -> None:
    """Raise IosrFastError unless the name of each node of the paths is one (names.name_fault), at one place, and like
    that of no other node and of none of the classes `names`: in answers a name says which node is meant."""
    above: dict[str, str] = {}
    for path in paths:
        if len(path) > DEEPEST:
            raise IosrFastError(f"expected at most {DEEPEST} nodes above a class, got {len(path):,} or more")
        for parent, node in pairwise(("", *path)):
            if (other := above.setdefault(node, parent)) != parent:
                places = " and ".join(one or "the root" for one in (other, parent))
                raise IosrFastError(f"expected a node at one place, got {node!a} below {places}: give it two names")
    seen = {as_seen(name): name for name in names} if above else {}
    for node in above:
        if fault := name_fault(node):
            raise IosrFastError(f"expected names of nodes, got {node!a:.200}, {fault}")
        if (key := as_seen(node)) in seen:
            raise IosrFastError(
                f"expected a node with a name of its own, got {node!a}, and {seen[key]!a} is another node or a class"
            )
        seen[key] = node


def path_below(parent: Parent, paths: Sequence[Path] | None) -> Path:
    """The path of a class below `parent`: a node of the tree with these `paths` by its name, or the names of nodes from
    the root's child down, which may be new; None is the root. Raises IosrFastError for an unknown node."""
    if parent is None or (isinstance(parent, list | tuple) and all(isinstance(node, str) for node in parent)):
        return tuple(parent or ())
    if not isinstance(parent, str):
        raise IosrFastError(f"expected the name of a node or a path of names as the parent, got {parent!r:.80}")
    nodes = {path[depth]: path[: depth + 1] for path in paths or () for depth in range(len(path))}
    if parent not in nodes:
        there = f"there are {abbreviate(sorted(nodes))}" if nodes else "there is none"
        raise IosrFastError(f"no node {parent!r:.200}; {there}: give new ones as a path, like ['fruit', 'apple']")
    return nodes[parent]
