"""Few-shot tasks: support, queries and validation images, and how encoded pictures are drawn into them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np

from iosr_fast.clip.demo.pictures import POOL
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.encoders.projections import Projections
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.support_set import SupportSet, make_support_set

SUPPORT_STYLES = 4
# The share of the concepts that must have enough pictures on both sides of a split of the styles.
MIN_SHARE = 0.75


@dataclass(frozen=True)
class Task:
    """`support` and, if any, `validation` (embeddings, labels) are for fitting; the rest is the test."""

    support: SupportSet
    queries: Embeddings
    labels: np.ndarray
    validation: tuple[Embeddings, np.ndarray] | None = None


@dataclass(frozen=True)
class Source:
    """A data set as tasks: `draw(shots, seed)` for each of `shots` and `seeds`.

    `images` and `image_labels` are for the measure of overlap; `notes` stand above its table.
    """

    name: str
    shots: tuple[int, ...]
    seeds: tuple[int, ...]
    draw: Callable[[int, int], Task]
    images: Embeddings
    image_labels: np.ndarray
    notes: tuple[str, ...] = ()


def with_unequal_classes(source: Source) -> Source:
    """The source with support sets in which half of the classes, drawn for each seed, have a quarter of their images,
    at least one."""

    def draw(shots: int, seed: int) -> Task:
        task = source.draw(shots, seed)
        support = task.support
        small = np.random.default_rng(seed).permutation(support.n_classes)[: support.n_classes // 2]
        counts = support.counts.copy()
        counts[small] = -(-counts[small] // 4)
        numbers = np.arange(len(support.labels)) - support.class_offsets[support.labels]
        return replace(task, support=support.only(numbers < counts[support.labels]))

    return replace(source, name=f"{source.name}, unequal classes", draw=draw)


@dataclass(frozen=True)
class Encoded:
    """Pictures of C concepts: labels (N,), styles (N,), text (C, D), the CLIP's logit scale and projections."""

    embeddings: Embeddings
    labels: np.ndarray
    text: np.ndarray
    tau: float
    styles: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    projections: Projections | None = None

    def task(self, shots: int, seed: int, pool: int = POOL) -> Task:
        """Of each concept `pool` pictures are set apart, `shots` of them as support; all others are queries."""
        if not 1 <= shots <= pool:
            raise IosrFastError(f"expected shots from 1 to {pool}, the pictures of a concept set apart, got {shots}")
        rng = np.random.default_rng(seed)
        drawn = [rng.permutation(np.flatnonzero(self.labels == c)) for c in range(len(self.text))]
        return self._task([rows[:shots] for rows in drawn], [rows[pool:] for rows in drawn])

    def shifted_task(self, shots: int, for_support: np.ndarray, seed: int) -> Task:
        """Support from the styles of the mask `for_support` alone, queries from all others; see `enough`."""
        rng = np.random.default_rng(seed)
        inside = for_support[self.styles]
        of_concept = [self.labels == c for c in range(len(self.text))]
        support = [rng.permutation(np.flatnonzero(rows & inside))[:shots] for rows in of_concept]
        return self._task(support, [np.flatnonzero(rows & ~inside) for rows in of_concept])

    def enough(self, shots: int, for_support: np.ndarray) -> np.ndarray:
        """(C,) bool: concepts with `shots` pictures in the styles of the mask, and at least one in the others."""
        inside = for_support[self.styles]
        within, beyond = (np.bincount(self.labels[rows], minlength=len(self.text)) for rows in (inside, ~inside))
        return (within >= shots) & (beyond >= 1)

    def only(self, chosen: np.ndarray) -> Encoded:
        """The pictures of the chosen concepts (a mask over them), renumbered."""
        rows = chosen[self.labels]
        number = np.cumsum(chosen) - 1
        return replace(
            self,
            embeddings=self.embeddings[rows],
            labels=number[self.labels[rows]],
            text=self.text[chosen],
            styles=self.styles[rows] if len(self.styles) else self.styles,
        )

    def _task(self, support: list[np.ndarray], queries: list[np.ndarray]) -> Task:
        s, q = np.concatenate(support), np.concatenate(queries)
        support_set = make_support_set(self.embeddings[s], self.labels[s], self.text, self.tau)
        support_set = replace(support_set, projections=self.projections)
        return Task(support_set, self.embeddings[q], self.labels[q])


def split_styles(encoded: Encoded, shots: int, seed: int, siblings: Sequence[Sequence[int]] = ()) -> np.ndarray:
    """(styles,) bool, which styles the support comes from. Seeds 0, 1, ... go through the possible splits, shuffled.

    A split is possible if it separates none of the `siblings` (groups of styles by one designer: between them there is
    no shift) and leaves MIN_SHARE of the concepts `shots` support pictures and a query; if no split does, those that
    leave most concepts.
    """
    n_styles = int(encoded.styles.max(initial=-1)) + 1
    if n_styles <= SUPPORT_STYLES:
        raise IosrFastError(f"expected pictures in more than {SUPPORT_STYLES} styles to split, got {n_styles}")
    splits = [np.isin(np.arange(n_styles), chosen) for chosen in combinations(range(n_styles), SUPPORT_STYLES)]
    splits = [split for split in splits if all(len(set(split[list(group)])) == 1 for group in siblings)]
    left = np.array([int(encoded.enough(shots, split).sum()) for split in splits])
    if not left.any():
        raise IosrFastError(
            f"expected concepts with {shots} pictures in {SUPPORT_STYLES} styles and one in another, got none; "
            "use fewer shots"
        )
    possible = np.flatnonzero(left >= min(MIN_SHARE * len(encoded.text), left.max()))
    shuffled = np.random.default_rng(0).permutation(possible)
    return splits[shuffled[seed % len(shuffled)]]
