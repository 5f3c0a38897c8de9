"""A tree over classes: a picture whose class is not sure enough is answered with a node above it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np

from iosr_fast.methods.log_loss import log_odds_of_largest, log_sum_exp
from iosr_fast.scoring.reference import softmax

Path: TypeAlias = tuple[str, ...]  # names of nodes, from the root's child down


def finest(odds: np.ndarray, least_odds: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of pictures with these odds (B, L) the finest level that reaches `least_odds`, 0 where none does; and whether any
    does, each (B,). Masses rise with coarser levels. As two nodes, none below the other, can't both have more than
    half, the node with more than that is the deepest that reaches it.

    >>> finest(np.array([[0.0, 3.0], [4.0, 5.0], [0.0, 1.0]]), 2.0)
    (array([1, 0, 0]), array([ True,  True, False]))
    """
    reached = odds >= np.reshape(least_odds, (-1, 1))
    return reached.argmax(1), np.asarray(reached.any(1))


@dataclass(frozen=True, eq=False)
class Tree:
    """Nodes above C classes. `paths` (C) has of each class the names of the nodes above it, () directly below the root.

    The classes are the nodes 0 to C - 1; M inner nodes follow, sorted by their paths. A node above all classes says
    nothing, as the root does, and is none. At level 0 each class is its own node; at level l it is in the node of depth
    D + 1 - l above it, where D is the largest depth of an inner node, or, if it is not so deep, still its own.

    >>> tree = Tree((("animal", "cat"), ("animal", "cat"), ("animal", "dog"), ("plant",)))  # siamese, bengal, pug, fern
    >>> tree.inner
    (('animal',), ('animal', 'cat'), ('animal', 'dog'), ('plant',))
    >>> tree.levels.tolist()
    [[0, 1, 2, 3], [5, 5, 6, 3], [4, 4, 4, 7]]
    >>> odds, nodes = tree.of_logits(np.log([[0.3, 0.35, 0.2, 0.15]]))
    >>> nodes.tolist(), (1 / (1 + np.exp(-odds))).round(2).tolist()
    ([[1, 5, 4]], [[0.35, 0.65, 0.85]])
    """

    paths: tuple[Path, ...]

    def __str__(self) -> str:
        levels, nodes = len(self.levels) - 1, len(self.inner)
        return f"tree: {levels} level{'s' * (levels != 1)} above the classes, {nodes} node{'s' * (nodes != 1)}"

    @cached_property
    def inner(self) -> tuple[Path, ...]:
        """The M inner nodes by their paths."""
        classes = Counter(path[:depth] for path in self.paths for depth in range(1, len(path) + 1))
        return tuple(sorted(node for node, count in classes.items() if count < len(self.paths)))

    @cached_property
    def levels(self) -> np.ndarray:
        """(L, C) int64: the node of each class at each level, the finest first."""
        number = {node: len(self.paths) + m for m, node in enumerate(self.inner)}
        depths = sorted({len(node) for node in self.inner}, reverse=True)
        above = [
            [number[path[:depth]] if len(path) >= depth else c for c, path in enumerate(self.paths)] for depth in depths
        ]
        return np.array([[*range(len(self.paths))], *above], np.int64)

    @cached_property
    def level_of(self) -> np.ndarray:
        """(C + M,) int64: the level of each node, 0 for classes."""
        levels = np.zeros(len(self.paths) + len(self.inner), np.int64)
        for level, ids in enumerate(self.levels[1:], 1):
            levels[ids[ids >= len(self.paths)]] = level
        return levels

    def path_of(self, node: int) -> Path:
        """The path of a node, itself left out."""
        return self.paths[node] if node < len(self.paths) else self.inner[node - len(self.paths)][:-1]

    def holds(self, nodes: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """Whether the classes are below the nodes, or are these; arrays of shapes that broadcast."""
        return np.asarray((self.levels.T[classes] == nodes[..., None]).any(-1))

    def of_logits(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of pictures with these logits (B, C) the node (B, L) int64 with the largest mass m at each level, of equal
        ones the first, and before it log m / (1 - m), (B, L) float64. A mass is the sum of the probabilities of a
        node's classes."""
        exact = logits.astype(np.float64)
        odds, nodes = [log_odds_of_largest(exact)], [exact.argmax(1)]
        shares = softmax(exact) if len(exact) and len(self.levels) > 1 else exact
        for of_class in self.levels[1:]:
            masses = np.zeros((of_class.max() + 1, len(exact)))
            np.add.at(masses, of_class, shares.T)
            best = masses.argmax(0)
            inside = of_class == best[:, None]
            within, others = (np.where(part, exact, -np.inf) for part in (inside, ~inside))
            odds.append(log_sum_exp(within) - log_sum_exp(others))
            nodes.append(best)
        return np.stack(odds, 1), np.stack(nodes, 1)

    def answer(self, logits: np.ndarray, least_odds: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each picture the node that answers it (`finest`), and whether its odds reach `least_odds`, one number or
        (B,); each (B,)."""
        odds, nodes = self.of_logits(logits)
        level, answered = finest(odds, least_odds)
        return nodes[np.arange(len(level)), level], answered
