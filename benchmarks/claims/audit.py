"""Finds `audit` labels that are wrong? A tenth of the support set's labels is exchanged, three times for each draw.

auroc, precision  of the suspicion; of as many most suspicious labels as are wrong, the share of wrong ones
wrong, estimate   the number of wrong labels, and as expected by the audit
listed, found     labels that are called wrong, and those of them that are
false_alarms      labels that are called wrong where none is exchanged

The rival is cleanlab with cross-validated logistic regression, by self-confidence and find_label_issues.
"""

from typing import Any

import numpy as np
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

from benchmarks.claims.claim import Claim, Draws, Task, fit, rows_of
from iosr_fast.utils.ranking import auroc

SHARE, EXCHANGES = 0.1, 3


def exchange_labels(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Labels of which a share is exchanged between images of different classes: no class changes its size."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(labels))[: round(share * len(labels))]
    for _ in range(1000):
        passed = rng.permutation(labels[chosen])
        if (passed != labels[chosen]).all():
            break
    exchanged = labels.copy()
    exchanged[chosen] = passed
    return exchanged


def draws(task: Task, method: str, seed: int) -> Draws:
    support, judge = task.support, by_cleanlab if method == "cleanlab" else by_audit
    if support.counts.min() < 2:
        return  # an image that is alone in its class can't be left out
    false_alarms = int(judge(support, support.labels)[1].sum())
    for k in range(EXCHANGES):
        labels = exchange_labels(support.labels, SHARE, seed * EXCHANGES + k)
        if not (wrong := labels != support.labels).any():
            continue  # too few images to exchange labels between classes
        surprise, listed, estimate = judge(support, labels)
        most = np.argsort(-surprise, kind="stable")[: wrong.sum()]
        yield {
            **{"auroc": auroc(surprise[wrong], surprise[~wrong]), "precision": float(wrong[most].mean())},
            **{"wrong": int(wrong.sum()), "estimate": estimate, "false_alarms": false_alarms},
            **{"listed": int(listed.sum()), "found": int((listed & wrong).sum())},
        }


def by_audit(support: Any, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, float | None]:
    """How surprising each label is, whether it is called wrong, and how many are expected to be."""
    audit = fit(support.embeddings, labels, support.text, support.tau).audit()
    order = np.argsort([*audit.suspicion])
    rank, suspicion = -np.arange(len(order)), np.array([*audit.suspicion.values()])
    return rank[order], suspicion[order] > 0.5, audit.expected_wrong


def by_cleanlab(support: Any, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, float | None]:
    model, folds = LogisticRegression(C=10.0, max_iter=200), min(5, int(support.counts.min()))
    p = cross_val_predict(model, rows_of(support.embeddings), labels, cv=folds, method="predict_proba")
    surprise = -get_label_quality_scores(labels, p, method="self_confidence")
    return surprise, find_label_issues(labels, p, n_jobs=1), None


CLAIMS = [Claim("audit", __doc__, draws, ("auto", "cleanlab"))]
