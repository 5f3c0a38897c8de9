"""`iosr-fast evaluate --task suggest`: a budget of labels for unlabelled images, spent by suggestion and at random."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.evaluation.accuracy import label
from iosr_fast.evaluation.own_table import OwnTable
from iosr_fast.evaluation.selection import TuneOn
from iosr_fast.evaluation.table import Row
from iosr_fast.evaluation.tasks import Source, Task
from iosr_fast.methods.suggest import entropy, suggest
from iosr_fast.methods.support_set import SupportSet, image_rows, make_support_set
from iosr_fast.methods.tuning.tune import Tuned, tune
from iosr_fast.scoring.plan import Which
from iosr_fast.scoring.score import score

RANDOM = 5  # random choices of each budget
STARTS = {
    "nothing": "no image is labelled; the budget is --shots a class",
    "half": "half of the classes have --shots images; the budget is one image a class",
    "all": "each class has --shots images; the budget is one image a class",
}
HEADS = ("start", "method", "shots", "budget", "random", "suggested", "gain", "classes: random", "suggested")


def suggest_rows(source: Source, method: str, reducer: str, shots: int, _: TuneOn) -> Iterator[dict[str, Any]]:
    for start in STARTS:
        yield suggest_row(source, method, reducer, shots, start)


def suggest_row(source: Source, method: str, reducer: str, shots: int, start: str) -> dict[str, Any]:
    """One budget over all seeds, JSON-ready: accuracies on the test images in 0..1, the gain in points.

    Texts are left out, because a class has no name before an image of it was seen; an image of a class that was not
    found counts as wrong. `method` is fitted on all labelled images; "gda" and "gda++" at their defaults.
    """
    draws = []
    for seed in source.seeds:
        task = source.draw(shots, seed)
        pool, labels, queries, expected = _split(task)
        known = _known(task.support, start)
        budget = min(task.support.n_classes * (shots if start == "nothing" else 1), len(labels))
        chosen = _suggested(known, pool, budget, method, reducer, seed)
        rng = np.random.default_rng(seed)
        at_random = [rng.permutation(len(labels))[:budget] for _ in range(RANDOM)]
        scores = []
        for rows in (chosen, *at_random):
            images = Embeddings.concatenate([known[0], pool[rows]]) if len(known[1]) else pool[rows]
            support, names, tuned = _fit(images, np.concatenate([known[1], labels[rows]]), method, reducer)
            answers = names[score(tuned.compile(support), queries).argmax(1)]
            scores.append(((answers == expected).mean(), len(names)))
        accuracies, classes = np.array(scores).T
        draws.append(
            {
                "budget": budget,
                "pool": len(labels),
                "random": float(accuracies[1:].mean()),
                "suggested": float(accuracies[0]),
                "random_classes": float(classes[1:].mean()),
                "suggested_classes": float(classes[0]),
            }
        )
    means = {name: float(np.mean([draw[name] for draw in draws])) for name in draws[0]}
    return {
        "bench": "suggest",
        "data": source.name,
        "method": label(method, reducer),
        "start": start,
        "shots": shots,
        **means,
        "gain": 100 * (means["suggested"] - means["random"]),
        "seeds": list(source.seeds),
        "draws": draws,
    }


def _split(task: Task) -> tuple[Embeddings, np.ndarray, Embeddings, np.ndarray]:
    """The unlabelled images and the test images, each with labels: the validation set as the former, or half of the
    test images."""
    if task.validation is not None:
        return *task.validation, task.queries, task.labels
    order = np.random.default_rng(0).permutation(len(task.labels))
    pool, test = np.array_split(order, 2)
    return task.queries[pool], task.labels[pool], task.queries[test], task.labels[test]


def _known(support: SupportSet, start: str) -> tuple[Embeddings, np.ndarray]:
    """The labelled images to start with."""
    keep = {"nothing": np.zeros(len(support.labels), bool), "half": support.labels % 2 == 0}
    rows = keep.get(start, np.ones(len(support.labels), bool))
    return support.embeddings[rows], support.labels[rows]


def _suggested(
    known: tuple[Embeddings, np.ndarray], pool: Embeddings, budget: int, method: str, reducer: str, seed: int
) -> np.ndarray:
    which: Which = "adapted" if pool.adapted is not None else "plain"
    weights = None
    if len(known[1]):
        support, _, tuned = _fit(*known, "auto", reducer)
        weights = entropy(score(tuned.compile(support), pool))
    return suggest(image_rows(pool, which, None), budget, weights, seed).rows


def _fit(rows: Embeddings, labels: np.ndarray, method: str, reducer: str) -> tuple[SupportSet, np.ndarray, Tuned]:
    classes, ids = np.unique(labels, return_inverse=True)
    support = make_support_set(rows, ids, None, 100.0, len(classes))
    reducer = "none" if reducer == "auto" else reducer
    if method.startswith("gda"):  # without texts alpha has no effect
        return support, classes, Tuned(method, reducer, {"alpha": 1.0}, float("nan"), 0, "none")
    return support, classes, tune(method, support, reducer=reducer)


def _title(source: Source, rows: Sequence[Row], tune_on: TuneOn) -> str:
    starts = "".join(f"\n  start from {name}: {text}" for name, text in STARTS.items())
    return (
        f"{source.name}: accuracy in % on the test images after a budget of labels for {rows[0]['pool']:.0f} "
        f"unlabelled images, without texts; gain in points over {RANDOM} random choices; mean over "
        f"{len(source.seeds)} draws{starts}"
    )


def _cells(row: Row) -> list[str]:
    return [
        *(row["start"], row["method"], str(row["shots"]), f"{row['budget']:.0f}"),
        *(f"{100 * row['random']:.1f}", f"{100 * row['suggested']:.1f}", f"{row['gain']:+.2f}"),
        *(f"{row['random_classes']:.1f}", f"{row['suggested_classes']:.1f}"),
    ]


def _result(row: Row) -> str:
    return f"from {row['start']}, {row['budget']:.0f} labels: {row['gain']:+.2f}"


run = OwnTable("suggest", suggest_rows, _title, HEADS, _cells, _result, methods=("gda",), left=2).run
