"""`iosr-fast evaluate --task audit`: labels of the support set are exchanged, and the audit has to find them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np

from iosr_fast.evaluation.accuracy import finite, label
from iosr_fast.evaluation.own_table import OwnTable
from iosr_fast.evaluation.rivals import FOLDS
from iosr_fast.evaluation.selection import TuneOn
from iosr_fast.evaluation.table import Row, cell
from iosr_fast.evaluation.tasks import Source
from iosr_fast.methods.label_noise import fit_label_noise
from iosr_fast.methods.left_out import left_out_logits
from iosr_fast.methods.support_audit import LIKELY
from iosr_fast.methods.support_set import SupportSet, make_support_set
from iosr_fast.methods.tuning.tune import tune
from iosr_fast.utils.ranking import auroc
from iosr_fast.utils.require import require

SHARE = 0.1  # of the labels are exchanged
EXCHANGES = 3  # for each draw of a support set
HEADS = ("method", "shots", "wrong", "estimate", "AUROC", "precision", "listed", "listed right", "without")


def exchange_labels(support: SupportSet, share: float, seed: int) -> tuple[SupportSet, np.ndarray]:
    """The support set with `share` of its labels exchanged between images of different classes, so that no class
    changes its size; and which labels are wrong, (N,) bool in its order."""
    rng = np.random.default_rng(seed)
    labels = support.labels.copy()
    chosen = rng.permutation(len(labels))[: round(share * len(labels))]
    own, passed = labels[chosen], rng.permutation(labels[chosen])
    for _ in range(1000):
        same = np.flatnonzero(own == passed)
        if not len(same):
            break
        for i, j in zip(same, rng.integers(len(chosen), size=len(same)), strict=True):
            passed[[i, j]] = passed[[j, i]]
    labels[chosen] = passed
    wrong = labels != support.labels
    exchanged = make_support_set(
        support.embeddings, labels, support.text, support.tau, support.n_classes, support.queries
    )
    return replace(exchanged, projections=support.projections), wrong[np.argsort(labels, kind="stable")]


def audit_rows(source: Source, method: str, reducer: str, shots: int, _: TuneOn) -> Iterator[dict[str, Any]]:
    """One method at one number of shots, JSON-ready: means over EXCHANGES of each seed.

    auroc, precision   of the suspicion; of as many most suspicious labels as are wrong, the share of wrong ones
    estimate           the expected number of wrong labels; `wrong` is the true one
    listed, found      labels that are likely wrong, and how many of them are
    false_alarms       labels that are likely wrong when none is exchanged
    """
    draws, alarms = [], []
    for seed in source.seeds:
        task = source.draw(shots, seed)
        for k in range(EXCHANGES):
            support, wrong = exchange_labels(task.support, SHARE, seed * EXCHANGES + k)
            draws.append(_judge(support, method, reducer, wrong))
        alarms.append(_judge(task.support, method, reducer, np.zeros(len(wrong), bool))["listed"])
    yield _row(source, label(method, reducer), shots, draws) | {"false_alarms": float(np.mean(alarms))}


def cleanlab_rows(source: Source) -> Iterator[dict[str, Any]]:
    """The same of cleanlab's label quality (self-confidence), from cross-validated logistic regression on the plain
    and, if there are any, the adapted embeddings. Its own choice of labels is find_label_issues'."""
    if find_spec("cleanlab") is None:
        return
    rank, choose = require("cleanlab.rank", "dev"), require("cleanlab.filter", "dev")
    selection, models = require("sklearn.model_selection", "sklearn"), require("sklearn.linear_model", "sklearn")
    for shots in source.shots:
        draws = []
        for seed in source.seeds:
            task = source.draw(shots, seed)
            folds = min(FOLDS, int(task.support.counts.min()))
            for k in range(EXCHANGES if folds > 1 else 0):
                support, wrong = exchange_labels(task.support, SHARE, seed * EXCHANGES + k)
                rows = np.hstack([part for part in vars(support.embeddings).values() if part is not None])
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of a fit that stops at max_iter
                    model = models.LogisticRegression(C=10.0, max_iter=200)
                    p = selection.cross_val_predict(model, rows, support.labels, cv=folds, method="predict_proba")
                quality = rank.get_label_quality_scores(support.labels, p, method="self_confidence")
                listed = choose.find_label_issues(support.labels, p, n_jobs=1)
                draws.append(_scores(-quality, wrong, listed) | {"estimate": None})
        yield _row(source, "cleanlab", shots, draws) | {"false_alarms": None}


def _judge(support: SupportSet, method: str, reducer: str, wrong: np.ndarray) -> dict[str, Any]:
    tuned = tune(method, support, reducer=reducer if reducer != "auto" else "none")
    logits = left_out_logits(support, tuned.compile)
    scored = np.isfinite(logits[:, 0])
    noise = fit_label_noise(logits[scored], support.labels[scored])
    return _scores(noise.surprise, wrong[scored], noise.wrong > LIKELY) | {"estimate": float(noise.wrong.sum())}


def _scores(suspicion: np.ndarray, wrong: np.ndarray, listed: np.ndarray) -> dict[str, Any]:
    count = int(wrong.sum())
    most = np.argsort(-suspicion, kind="stable")[:count]
    return {
        "wrong": count,
        "auroc": auroc(suspicion[wrong], suspicion[~wrong]) if count else float("nan"),
        "precision": float(wrong[most].mean()) if count else float("nan"),
        "listed": int(listed.sum()),
        "found": int((listed & wrong).sum()),
    }


def _row(source: Source, method: str, shots: int, draws: Sequence[Row]) -> dict[str, Any]:
    names = ("wrong", "auroc", "precision", "estimate", "listed", "found")
    known = {name: [draw[name] for draw in draws if draw[name] is not None] for name in names}
    means = {name: finite(float(np.mean(values))) if values else None for name, values in known.items()}
    return {"bench": "audit", "data": source.name, "method": method, "shots": shots, "share": SHARE, **means} | {
        "seeds": list(source.seeds),
        "draws": [{name: value if value is None else finite(value) for name, value in draw.items()} for draw in draws],
    }


def _title(source: Source, rows: Sequence[Row], tune_on: TuneOn) -> str:
    return (
        f"{source.name}: {SHARE:.0%} of the labels of the support set exchanged, mean over {EXCHANGES} exchanges of "
        f"{len(source.seeds)} draws. AUROC of the suspicion; precision: wrong ones of as many most suspicious labels "
        "as are wrong; listed: labels that are likely wrong; without: listed when no label is exchanged"
    )


def _cells(row: Row) -> list[str]:
    return [
        *(row["method"], str(row["shots"]), cell(row["wrong"], ".0f"), cell(row["estimate"], ".1f")),
        *(cell(row["auroc"], ".4f"), cell(row["precision"], ".1f", 100)),
        *(cell(row[name], ".1f") for name in ("listed", "found", "false_alarms")),
    ]


def _result(row: Row) -> str:
    return f"AUROC {_cells(row)[4]}"


run = OwnTable("audit", audit_rows, _title, HEADS, _cells, _result, rivals=cleanlab_rows).run
