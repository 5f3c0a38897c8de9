"""Are pictures of unknown classes recognised, and do label sets hold the label as often as promised?

Half of the classes are known, three random halves for each draw:

auroc, expected  of `unknown_score`, known against unknown test images, and as expected by left-out classes
fpr95            unknown test images that are kept where 95% of the known ones are
kept             known test images that are kept where 95% is promised
best_single      the highest AUROC of the scores of which it is made

Label sets of all classes, promised for 90%: coverage, mean size, and the share of empty ones. Promises need two images
of each class and 40 in all, so that enough can be left out.
"""

import numpy as np

from benchmarks.claims.claim import Claim, Draws, Task, fit, rows_of
from iosr_fast.utils.ranking import auroc


def draws(task: Task, method: str, seed: int) -> Draws:
    support = task.support
    promised = support.counts.min() > 1 and len(support.labels) > 40
    for split in range(3):
        order = np.random.default_rng((seed, split)).permutation(support.n_classes)
        known = np.isin(np.arange(support.n_classes), order[: support.n_classes // 2])
        inside, text = known[support.labels], None if support.text is None else support.text[known]
        unknown = fit(support.embeddings[inside], support.labels[inside], text, support.tau).unknown_
        unlike, is_known = unknown.score(task.queries), known[task.labels]
        singles = [auroc(one[is_known], one[~is_known]) for one in unknown.scorer(task.queries).T]
        yield {
            "of": "unknown classes",
            "auroc": auroc(unlike[~is_known], unlike[is_known]),
            "expected": None if np.isnan(unknown.auroc) else unknown.auroc,
            "fpr95": float((unlike[~is_known] <= np.quantile(unlike[is_known], 0.95)).mean()),
            "kept": float((~unknown.rejects(task.queries, keep=0.95))[is_known].mean()) if promised else None,
            "best_single": max(singles),
        }
    if promised:
        head = fit(support.embeddings, support.labels, support.text, support.tau)
        sets = head.predict_sets(rows_of(task.queries), coverage=0.9)
        yield {
            "of": "label sets",
            "coverage": float(np.mean([label in labels for label, labels in zip(task.labels, sets, strict=True)])),
            "size": float(np.mean([len(labels) for labels in sets])),
            "empty": float(np.mean([len(labels) == 0 for labels in sets])),
        }


CLAIM = Claim("unknown", __doc__, draws)

if __name__ == "__main__":
    CLAIM.main()
