"""What is a budget of labels worth when `suggest` spends it, and when it is spent at random?

from nothing  no image is labelled; the budget is --shots a class
from half     half of the classes have --shots images; the budget is one image a class
from all      each class has --shots images; the budget is one image a class

Accuracies on the test images of a Gaussian fit (gda) without texts, because a class has no name before an image of it
was seen; images of classes that were not found are wrong. Half of the test images are the unlabelled ones. `random` is
the mean of five choices.
"""

import numpy as np

from benchmarks.claims.claim import Claim, Draws, Task, fit, rows_of
from iosr_fast import Embeddings
from iosr_fast.methods.suggest import suggest


def draws(task: Task, method: str, seed: int) -> Draws:
    support, queries, rng = task.support, task.queries, np.random.default_rng(seed)
    pool, test = np.array_split(np.random.default_rng(0).permutation(len(queries)), 2)
    starts = {"nothing": support.labels < 0, "half": support.labels % 2 == 0, "all": support.labels >= 0}
    for start, rows in starts.items():
        known, labels = support.embeddings[rows], support.labels[rows]
        budget = min(support.n_classes * (int(support.counts.max()) if start == "nothing" else 1), len(pool))
        if len(labels):
            chosen = fit(known, labels, None, support.tau).suggest(rows_of(queries)[pool], budget).rows
        else:
            chosen = suggest((queries.plain if queries.adapted is None else queries.adapted)[pool], budget).rows
        results = []
        for rows in (pool[chosen], *(rng.permutation(pool)[:budget] for _ in range(5))):
            images = Embeddings.concatenate([known, queries[rows]]) if len(labels) else queries[rows]
            head = fit(images, np.concatenate([labels, task.labels[rows]]), None, support.tau, method)
            right = head.predict(rows_of(queries)[test]) == task.labels[test]
            results.append((float(right.mean()), len(head.classes_)))
        suggested, at_random = results[0], np.mean(results[1:], axis=0).tolist()
        yield {
            **{"of": f"from {start}", "suggested": suggested[0], "random": at_random[0]},
            **{"classes_suggested": suggested[1], "classes_random": at_random[1], "budget": budget},
        }


CLAIM = Claim("suggest", __doc__, draws, ("gda",))

if __name__ == "__main__":
    CLAIM.main()
