"""Few-shot tasks: a support set, labelled queries and, where there are any, validation images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from iosr_fast.backbones.demo.pictures import POOL
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.support_set import SupportSet, make_support_set


@dataclass(frozen=True)
class Task:
    """`support` and, if any, `validation` (embeddings, labels) are for fitting; `queries` and `labels` are the test."""

    support: SupportSet
    queries: Embeddings
    labels: np.ndarray
    validation: tuple[Embeddings, np.ndarray] | None = None


@dataclass(frozen=True)
class TaskSource:
    """A data set as tasks: `draw(shots, seed)` for each of `shots` and `seeds`. `notes` stand above its table."""

    name: str
    shots: tuple[int, ...]
    seeds: tuple[int, ...]
    draw: Callable[[int, int], Task]
    notes: tuple[str, ...] = ()


def with_unequal_classes(source: TaskSource) -> TaskSource:
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
class EncodedSet:
    """Pictures of C concepts: labels (N,), text (C, D) and the CLIP's logit scale."""

    embeddings: Embeddings
    labels: np.ndarray
    text: np.ndarray
    tau: float

    def task(self, shots: int, seed: int) -> Task:
        """Of each concept POOL pictures are set apart, `shots` of them as support; all others are queries."""
        if not 1 <= shots <= POOL:
            raise IosrFastError(f"expected shots from 1 to {POOL}, the pictures of a concept set apart, got {shots}")
        rng = np.random.default_rng(seed)
        drawn = [rng.permutation(np.flatnonzero(self.labels == c)) for c in range(len(self.text))]
        s, q = (np.concatenate([rows[part] for rows in drawn]) for part in (slice(shots), slice(POOL, None)))
        support = make_support_set(self.embeddings[s], self.labels[s], self.text, self.tau)
        return Task(support, self.embeddings[q], self.labels[q])
