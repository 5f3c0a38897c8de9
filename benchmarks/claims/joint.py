"""What does a folder of images gain when it is classified jointly?

Accuracies of the test images alone and together: all of them as one folder, and five folders with the images of a tenth
of the classes. refused: the share of folders that `predict_jointly` leaves as they are.
"""

import numpy as np

from benchmarks.claims.claim import Claim, Draws, Task, fit, rows_of


def draws(task: Task, method: str, seed: int) -> Draws:
    support, queries, rng = task.support, rows_of(task.queries), np.random.default_rng(seed)
    head = fit(support.embeddings, support.labels, support.text, support.tau, method)
    present = np.unique(task.labels)
    tenth = max(2, round(len(present) / 10))
    folders = [("all classes", present)]
    folders += [("a tenth of the classes", rng.choice(present, tenth, replace=False)) for _ in range(5)]
    for of, classes in folders:
        rows = np.isin(task.labels, classes)
        together, labels = head.predict_jointly(queries[rows]), task.labels[rows]
        yield {
            "of": of,
            "alone": float((head.predict(queries[rows]) == labels).mean()),
            "joint": float((together.labels == labels).mean()),
            **{"refused": bool(together.refused), "images": len(labels)},
        }


CLAIM = Claim("joint", __doc__, draws)

if __name__ == "__main__":
    CLAIM.main()
