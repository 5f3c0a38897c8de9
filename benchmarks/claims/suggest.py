"""What is a budget of labels worth when `suggest` spends it, and when it is spent at random?

from nothing  no image is labelled; the budget is --shots a class
from half     half of the classes have --shots images; the budget is one image a class
from all      each class has --shots images; the budget is one image a class

Accuracies on the test images of a Gaussian fit (gda) without texts, because a class has no name before an image of it
was seen; images of classes that were not found are wrong. Half of the test images are the unlabelled ones. `random` is
the mean of ten choices, `random_se` its standard error. Beside feature files there are made-up sets of 50 classes:

families   six families of look-alikes, one of which scatters seven times as much as the others
poses      images cluster by eight poses; some classes differ less from the others
odd        poses, and a third of the images are odd: four times the noise
tail       the largest class has twenty times the images of the smallest
bursts     half of the images come in bursts of eight
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from benchmarks.claims.claim import Claim, Draws, Task, fit, rows_of
from iosr_fast import Embeddings
from iosr_fast.evaluation.features import TAU, open_sources
from iosr_fast.evaluation.tasks import Task as FewShotTask
from iosr_fast.evaluation.tasks import TaskSource
from iosr_fast.methods.suggest import suggest
from iosr_fast.methods.support_set import make_support_set

MADE = ("families", "poses", "odd", "tail", "bursts")
CHOICES = 10


def draws(task: Task, method: str, seed: int) -> Draws:
    support, queries, rng = task.support, task.queries, np.random.default_rng(seed)
    pool, test = np.array_split(rng.permutation(len(queries)), 2)
    starts = {"nothing": support.labels < 0, "half": support.labels % 2 == 0, "all": support.labels >= 0}
    for start, rows in starts.items():
        known, labels = support.embeddings[rows], support.labels[rows]
        budget = min(support.n_classes * (int(support.counts.max()) if start == "nothing" else 1), len(pool))
        if len(labels):
            chosen = fit(known, labels, None, support.tau).suggest(rows_of(queries)[pool], budget).rows
        else:
            chosen = suggest((queries.plain if queries.adapted is None else queries.adapted)[pool], budget).rows
        results = []
        for rows in (pool[chosen], *(rng.permutation(pool)[:budget] for _ in range(CHOICES))):
            images = Embeddings.concatenate([known, queries[rows]]) if len(labels) else queries[rows]
            head = fit(images, np.concatenate([labels, task.labels[rows]]), None, support.tau, method)
            right = head.predict(rows_of(queries)[test]) == task.labels[test]
            results.append((float(right.mean()), len(head.classes_)))
        suggested, at_random = results[0], np.mean(results[1:], axis=0).tolist()
        yield {
            **{"of": f"from {start}", "suggested": suggested[0], "random": at_random[0]},
            "random_se": float(np.std([accuracy for accuracy, _ in results[1:]], ddof=1) / np.sqrt(CHOICES)),
            **{"classes_suggested": suggested[1], "classes_random": at_random[1], "budget": budget},
        }


def made(kind: str, shots: int, seed: int) -> FewShotTask:
    """A made-up set as a task; all images that are not support are queries."""
    rng = np.random.default_rng(100 + seed)
    counts = 160 / np.arange(1, 51) ** 0.75 if kind == "tail" else np.full(50, 40)
    labels = np.repeat(np.arange(50), counts.astype(int))
    classes, noise = rng.standard_normal((50, 64))[labels], rng.standard_normal((len(labels), 64))
    if kind == "families":
        scatter = np.where(labels % 6 == 0, 4.0, 0.6)[:, None]
        rows = 3 * rng.standard_normal((6, 64))[labels % 6] + scatter * (classes + 1.4 * noise)
    elif kind in ("poses", "odd"):
        rows = np.linspace(0.2, 0.8, 50)[labels, None] * classes
        rows += 2 * rng.standard_normal((8, 64))[rng.integers(8, size=len(labels))]
        rows += 0.4 * np.where(rng.random(len(labels)) < (kind == "odd") / 3, 4.0, 1.0)[:, None] * noise
    else:
        rows = classes + 1.4 * noise
    if kind == "bursts":
        first = np.arange(len(labels)) // 8 * 8
        rows = np.where((first % 16 == 0)[:, None], rows[first] + 0.1 * noise, rows)
    images = Embeddings((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    number = np.arange(len(labels)) - np.searchsorted(labels, labels)
    s, q = order[number < shots], order[number >= shots]
    support = make_support_set(images[s], labels[s], None, TAU, n_classes=50)
    return FewShotTask(support, images[q], labels[q])


def sources(words: Sequence[str], shots: Sequence[int] | None = None, seeds: int | None = None) -> list[TaskSource]:
    drawn = tuple(range(seeds or 1))
    own = [TaskSource(word, tuple(shots or (1, 2)), drawn, partial(made, word)) for word in words if word in MADE]
    files = [word for word in words if word not in MADE]
    return own + (open_sources(files, shots, seeds) if files else [])


CLAIMS = [Claim("suggest", __doc__, draws, ("gda",), sources)]
