"""`iosr-fast evaluate --task unknown`: half of the classes known, pictures of the others recognised; label sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.evaluation.accuracy import label, tune_draw
from iosr_fast.evaluation.own_table import OwnTable
from iosr_fast.evaluation.selection import Options, TuneOn
from iosr_fast.evaluation.table import Row, cell, print_table
from iosr_fast.evaluation.tasks import Source, Task
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.conformal import COVERAGE, leave_out_labels, of_validation
from iosr_fast.methods.known_scores import log_odds_of_largest
from iosr_fast.methods.promise import images_needed, threshold
from iosr_fast.methods.support_set import make_support_set
from iosr_fast.methods.unknown import KEEP, fit_unknown
from iosr_fast.scoring.score import score
from iosr_fast.utils.ranking import auroc

SPLITS = 3  # halves of the classes a draw of the support set
OWN = ("method's logit", "method's softmax", "method's margin")
HEADS = (
    *("method", "shots", "AUROC", "FPR95", "kept", "left-out", "expected", "best single score", "AUROC"),
    *("coverage", "left-out", "size", "empty"),
)


@dataclass(frozen=True)
class Half:
    """A task of the known half of the classes; `queries` are all test images, `known` (B,) bool those of the half."""

    task: Task
    queries: Embeddings
    known: np.ndarray


def unknown_rows(source: Source, method: str, reducer: str, shots: int, tune_on: TuneOn) -> Iterator[dict[str, Any]]:
    """One method at one number of shots over all seeds and splits, JSON-ready; all figures in 0..1 but `size`.

    auroc, fpr95    of Unknown.score: known against unknown test images; unknown ones taken for known at 95% kept
    kept            the share of known test images that is not rejected where KEEP is promised, by validation images if
                    `threshold` says so, else by left-out support images; kept_left_out is always by these
    scores          the AUROC of every single score; `best` is the highest
    coverage, size  of the conformal sets of all classes at COVERAGE, likewise; `empty` is the share without a label
    A figure is None where there are too few images for the promise.
    """
    splits, sets = [], []
    for seed in source.seeds:
        task = source.draw(shots, seed)
        splits += [_split(half_of(task, seed, k), method, reducer, tune_on) for k in range(SPLITS)]
        sets.append(_sets(task, method, reducer, tune_on))
    scores = {name: _mean([split["scores"][name] for split in splits]) for name in splits[0]["scores"]}
    best = max(scores, key=lambda name: scores[name] or 0.0)
    yield {
        "bench": "unknown",
        "data": source.name,
        "method": method,
        "reducer": reducer,
        "shots": shots,
        **_means(splits, ("auroc", "fpr95", "kept", "kept_left_out", "expected_auroc")),
        "promise": KEEP,
        "threshold": tune_on,
        "best": best,
        "best_auroc": scores[best],
        "scores": scores,
        **_means(sets, ("coverage", "coverage_left_out", "size", "empty", "left_out_error")),
        "coverage_promise": COVERAGE,
        "seeds": list(source.seeds),
        "splits": splits,
        "sets": sets,
    }


def half_of(task: Task, seed: int, split: int) -> Half:
    """The task of a random half of the classes. Raises IosrFastError for fewer than four classes."""
    support = task.support
    if support.n_classes < 4:
        raise IosrFastError(f"expected at least 4 classes, half of which are known, got {support.n_classes}")
    order = np.random.default_rng((seed, split)).permutation(support.n_classes)
    known = np.isin(np.arange(support.n_classes), order[: support.n_classes // 2])
    numbers = np.cumsum(known) - 1

    def of_half(images: Embeddings, labels: np.ndarray) -> tuple[Embeddings, np.ndarray]:
        rows = known[labels]
        return images[rows], numbers[labels[rows]]

    images, labels = of_half(support.embeddings, support.labels)
    text = None if support.text is None else support.text[known]
    inside = make_support_set(images, labels, text, support.tau, int(known.sum()))
    inside = replace(inside, projections=support.projections)
    queries, query_labels = of_half(task.queries, task.labels)
    validation = None if task.validation is None else of_half(*task.validation)
    return Half(Task(inside, queries, query_labels, validation), task.queries, known[task.labels])


def _split(half: Half, method: str, reducer: str, tune_on: TuneOn) -> dict[str, Any]:
    support = half.task.support
    adapted = support.embeddings.adapted is not None
    plan = tune_draw(half.task, method, reducer, tune_on).compile(support)
    fitted = fit_unknown(support, adapted)
    unlike = fitted.score(half.queries)
    singles = dict(zip(fitted.names, fitted.scorer(half.queries).T, strict=True))
    logits = np.sort(score(plan, half.queries).astype(np.float64), axis=1)
    singles |= dict(zip(OWN, (logits[:, -1], log_odds_of_largest(logits), logits[:, -1] - logits[:, -2]), strict=True))
    known, limits = half.known, {"kept_left_out": _limit(fitted.left_out)}
    limits["kept"] = limits["kept_left_out"]
    if tune_on == "validation" and half.task.validation is not None:
        limits["kept"] = _limit(-fitted.score(half.task.validation[0]))
    return {
        "auroc": auroc(-unlike[known], -unlike[~known]),
        "fpr95": float((unlike[~known] <= np.quantile(unlike[known], 0.95)).mean()),
        **{name: None if limit is None else float((unlike[known] <= limit).mean()) for name, limit in limits.items()},
        "expected_auroc": None if np.isnan(fitted.auroc) else fitted.auroc,
        "scores": {name: auroc(values[known], values[~known]) for name, values in singles.items()},
    }


def _limit(known: np.ndarray) -> float | None:
    return -threshold(known, KEEP) if len(known) >= images_needed(KEEP) else None


def _sets(task: Task, method: str, reducer: str, tune_on: TuneOn) -> dict[str, Any]:
    """Conformal sets of the test images of all classes."""
    tuned = tune_draw(task, method, reducer, tune_on)
    plan = tuned.compile(task.support)
    logits, rows = score(plan, task.queries), np.arange(len(task.labels))
    by = {"left_out": leave_out_labels(task.support, tuned.compile)}
    by["used"] = by["left_out"]
    if tune_on == "validation" and task.validation is not None:
        by["used"] = of_validation(plan, *task.validation)
    result: dict[str, Any] = dict.fromkeys(("coverage", "coverage_left_out", "size", "empty"))
    for name, images in by.items():
        if len(images.odds) < images_needed(COVERAGE):
            continue
        sets = images.sets(logits, COVERAGE)
        covered = float(sets[rows, task.labels].mean())
        result |= {"coverage_left_out" if name == "left_out" else "coverage": covered}
        if name == "used":
            result |= {"size": float(sets.sum(1).mean()), "empty": float((~sets.any(1)).mean())}
    error = by["left_out"].reliability.error
    return {**result, "left_out_error": error if len(by["left_out"].odds) else None}


def _means(parts: Sequence[Row], names: Sequence[str]) -> dict[str, float | None]:
    return {name: _mean([part[name] for part in parts]) for name in names}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _title(source: Source, rows: Sequence[Row], tune_on: TuneOn) -> str:
    images = "validation" if tune_on == "validation" else "left-out support"
    return (
        f"{source.name}: half of the classes known, {SPLITS * len(source.seeds)} splits; in %. Kept: known test images "
        f"that stay where {KEEP:.0%} is promised by {images} images, and by left-out support images alone; expected: "
        f"the AUROC by left-out classes. Coverage of label sets of all classes where {COVERAGE:.0%} is promised, their "
        "mean size, and the share of empty ones"
    )


def _cells(row: Row) -> list[str]:
    figures = [row[name] for name in ("auroc", "fpr95", "kept", "kept_left_out", "expected_auroc")]
    return [
        *(label(row["method"], row["reducer"]), str(row["shots"])),
        *(cell(value, ".1f", 100) for value in figures),
        *(row["best"], cell(row["best_auroc"], ".1f", 100)),
        *(cell(row[name], ".1f", 100) for name in ("coverage", "coverage_left_out")),
        *(cell(row["size"], ".2f"), cell(row["empty"], ".1f", 100)),
    ]


def _print_single(out: Console, rows: Sequence[Row]) -> None:
    """The AUROC of the combination and of single scores, which have the mean of what they have."""
    heads = ["AUROC in %", *(f"{row['data'].removesuffix('.npz')}, {row['shots']}" for row in rows), "mean"]
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    table = {"combined": [row["auroc"] for row in rows]}
    table |= {name: [row["scores"].get(name) for row in rows] for name in names}
    cells = [
        [name, *(cell(value, ".1f", 100) for value in (*values, None if None in values else _mean(values)))]
        for name, values in table.items()
    ]
    gaps = [100 * (row["best_auroc"] - row["auroc"]) for row in rows]
    print_table(out, heads, cells, left=1)
    out.print(
        f"combined behind the best single score of each: {np.mean(gaps):+.2f} points on the mean, {max(gaps):+.2f} at "
        "the worst",
        soft_wrap=True,
    )


def _result(row: Row) -> str:
    return f"AUROC {cell(row['auroc'], '.1f', 100)}"


def run(sources: Sequence[Source], options: Options, out: Console) -> list[dict[str, Any]]:
    """Print a table for each data set and one of single scores; return the rows."""
    rows = OwnTable("unknown", unknown_rows, _title, HEADS, _cells, _result).run(sources, options, out)
    _print_single(out, rows)
    return rows
