"""Few-shot tasks on the demo's held-out concepts, with parameters chosen on concepts that are not reported.

Concepts drawn in five or more styles are the test: each seed draws four pictures a concept as the support pool and
leaves the others as queries. Concepts drawn in just four styles have no picture to spare for that, so they are the
validation set, on which alpha and beta are chosen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import numpy as np

from iosr_fast.cache import SupportSet, make_support_set
from iosr_fast.demo.pictures import Pictures
from iosr_fast.encoder import Embeddings
from iosr_fast.methods import METHODS, compile_method
from iosr_fast.scoring import score

ALPHAS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
BETAS = (1.0, 2.0, 5.5, 10.0, 20.0, 40.0)
POOL = 4


@dataclass(frozen=True)
class Encoded:
    """Pictures of some concepts, encoded: labels (N,), text (C, D) and the CLIP's logit scale."""

    embeddings: Embeddings
    labels: np.ndarray
    text: np.ndarray
    tau: float

    def task(self, shots: int, pool: int, seed: int) -> tuple[SupportSet, Embeddings, np.ndarray]:
        """Support set, query embeddings and query labels; queries are the same for every `shots` <= `pool`."""
        rng = np.random.default_rng(seed)
        support, queries = [], []
        for c in range(len(self.text)):
            rows = rng.permutation(np.flatnonzero(self.labels == c))
            support.append(rows[:shots])
            queries.append(rows[pool:])
        s, q = np.concatenate(support), np.concatenate(queries)
        support_set = make_support_set(self.embeddings[s], self.labels[s], self.text, self.tau)
        return support_set, self.embeddings[q], self.labels[q]


def centre(support: SupportSet, queries: Embeddings) -> tuple[SupportSet, Embeddings]:
    """Subtract the support mean from keys and queries and normalise again: less overlap without any training.

    The text term must go on meeting the uncentred embedding, so the centred one takes the place of the adapted.
    """
    mean = support.embeddings.plain.mean(0)

    def moved(rows: np.ndarray) -> np.ndarray:
        rows = rows - mean
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    keys = Embeddings(support.embeddings.plain, moved(support.embeddings.plain))
    centred = SupportSet(keys, support.class_offsets, support.text, support.tau)
    return centred, Embeddings(queries.plain, moved(queries.plain))


def choose_parameters(
    validation: Encoded, method: str, shots: int, seeds: Iterable[int], centred: bool
) -> dict[str, float]:
    """alpha and beta with the best mean validation accuracy over the grid; the first of equals."""
    if not METHODS[method].parameters:
        return {}
    pool = POOL - 1
    right = dict.fromkeys(product(BETAS, ALPHAS), 0.0)
    for seed in seeds:
        support, queries, labels = validation.task(min(shots, pool), pool, seed)
        if centred:
            support, queries = centre(support, queries)
        zero_shot = score(compile_method("zero-shot", support), queries)
        for beta in BETAS:
            cache = score(compile_method(method, support, alpha=1.0, beta=beta), queries) - zero_shot
            for alpha in ALPHAS:
                right[beta, alpha] += float(((zero_shot + alpha * cache).argmax(1) == labels).mean())
    beta, alpha = max(right, key=lambda key: right[key])
    return {"alpha": alpha, "beta": beta}


def evaluate(
    test: Encoded, validation: Encoded, method: str, shots: int, seeds: list[int], centred: bool = False
) -> dict[str, object]:
    """Test accuracy: mean and standard deviation over seeds, queries a seed, parameters chosen on validation."""
    parameters = choose_parameters(validation, method, shots, seeds, centred)
    accuracies, queries = [], Embeddings(np.zeros((0, 0)))
    for seed in seeds:
        support, queries, labels = test.task(shots, POOL, seed)
        if centred:
            support, queries = centre(support, queries)
        accuracies.append((score(compile_method(method, support, **parameters), queries).argmax(1) == labels).mean())
    return {
        "mean": float(np.mean(accuracies)),
        "std": float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else 0.0,
        "queries": len(queries),
        "seeds": len(seeds),
        **parameters,
    }


def changed_labels(
    test: Encoded, method: str, parameters: dict[int, dict[str, float]], seeds: list[int]
) -> dict[str, tuple[int, int]]:
    """Labels that keys of fewer bits change, and all labels, over every seed and the shots that `parameters` has."""
    counts = {"fp16": (0, 0), "bf16": (0, 0), "int8": (0, 0)}
    for (shots, chosen), seed in product(parameters.items(), seeds):
        support, queries, _ = test.task(shots, POOL, seed)
        plan = compile_method(method, support, **chosen)
        exact = score(plan, queries).argmax(1)
        for precision, (changed, total) in counts.items():
            labels = score(plan.with_key_precision(precision), queries).argmax(1)
            counts[precision] = (changed + int((labels != exact).sum()), total + len(exact))
    return counts


def only(pictures: Pictures, chosen: np.ndarray) -> Pictures:
    """The pictures of the chosen concepts (a mask over names), renumbered."""
    rows = chosen[pictures.concepts]
    number = np.cumsum(chosen) - 1
    names = [name for name, keep in zip(pictures.names, chosen, strict=True) if keep]
    concepts = number[pictures.concepts[rows]]
    return Pictures(pictures.images[rows], concepts, pictures.styles[rows], names, pictures.style_names)
