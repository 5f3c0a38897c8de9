"""`iosr-fast evaluate --task joint`: all test images as one folder, judged together, against each for itself."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from iosr_fast.evaluation.accuracy import finite, label, tune_draw
from iosr_fast.evaluation.calibration import measure, measure_probabilities
from iosr_fast.evaluation.own_table import OwnTable
from iosr_fast.evaluation.selection import TuneOn
from iosr_fast.evaluation.table import Row
from iosr_fast.evaluation.tasks import Source, Task
from iosr_fast.methods.joint import predict_jointly
from iosr_fast.methods.tuning.tuned import Tuned
from iosr_fast.scoring.score import score

# A folder may hold few of the classes: the test images of a tenth of them, and of at least two, drawn several times.
TENTH, FEWEST, FOLDERS = 10, 2, 5
REFUSALS = 3  # sentences that are printed
HEADS = (
    *("method", "reducer", "shots", "alone", "joint", "gain", "refused"),
    *("a tenth: classes", "alone", "joint", "gain", "refused"),
)


def joint_rows(source: Source, method: str, reducer: str, shots: int, tune_on: TuneOn) -> Iterator[dict[str, Any]]:
    """One method at one number of shots over all seeds, JSON-ready: accuracies in 0..1, gains in points.

    `draws` has an entry a seed with all test images as the folder; `few_draws` FOLDERS a seed, each with the test
    images of few classes; `refused` counts those that predict_jointly refused.
    """
    whole, few, choices = [], [], []
    for seed in source.seeds:
        task = source.draw(shots, seed)
        tuned = tune_draw(task, method, reducer, tune_on)
        logits = score(tuned.compile(task.support), task.queries)
        whole.append(_folder(task, tuned, logits, np.ones(len(task.labels), bool)))
        few += [_folder(task, tuned, logits, np.isin(task.labels, classes)) for classes in few_classes(task, seed)]
        choices.append(tuned)
    yield {
        "bench": "joint",
        "data": source.name,
        "method": method,
        "reducer": reducer,
        "shots": shots,
        **_means("", whole),
        **_means("few_", few),
        "seeds": list(source.seeds),
        "tuned_on": choices[0].protocol,
        "chosen": [label(tuned.method, tuned.reducer) for tuned in choices],
        "tune_seconds": [round(tuned.seconds, 4) for tuned in choices],
        "draws": whole,
        "few_draws": few,
    }


def few_classes(task: Task, seed: int) -> list[np.ndarray]:
    """For each folder the classes in it, (max(FEWEST, classes / TENTH),), of those that have test images."""
    present = np.unique(task.labels)
    size = min(max(FEWEST, round(len(present) / TENTH)), len(present))
    return [np.random.default_rng((seed, k)).choice(present, size, replace=False) for k in range(FOLDERS)]


def _folder(task: Task, tuned: Tuned, logits: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
    """The test images `rows` (a mask) as a folder."""
    labels = task.labels[rows]
    started = time.perf_counter()
    joint = predict_jointly(task.support, tuned.compile, task.queries[rows])
    seconds = time.perf_counter() - started
    alone, together = measure(logits[rows], labels), measure_probabilities(joint.probabilities, labels)
    return {
        "images": len(labels),
        "classes": len(np.unique(labels)),
        "alone": alone.accuracy,
        "joint": together.accuracy,
        "log_loss_alone": alone.log_loss,
        "log_loss_joint": together.log_loss,
        "refused": joint.refused,
        "left_out": [finite(joint.left_out_alone), finite(joint.left_out_joint)],
        "seconds": round(seconds, 4),
    }


def _means(prefix: str, draws: Sequence[Row]) -> dict[str, Any]:
    alone, joint = (float(np.mean([draw[name] for draw in draws])) for name in ("alone", "joint"))
    return {
        f"{prefix}alone": alone,
        f"{prefix}joint": joint,
        f"{prefix}gain": 100 * (joint - alone),
        f"{prefix}refused": sum(bool(draw["refused"]) for draw in draws),
    }


def _title(source: Source, rows: Sequence[Row], tune_on: TuneOn) -> str:
    first = rows[0]["draws"][0]
    return (
        f"{source.name}: accuracy in % of each test image alone and of all {first['images']} together, gain in points; "
        f"{len(source.seeds)} draw(s) of the support set. A tenth: only the images of a tenth of the "
        f"{first['classes']} classes, mean over {FOLDERS} folders a draw. Refused: folders left as they were"
    )


def _refusals(rows: Sequence[Row]) -> list[str]:
    draws = [draw for row in rows for draw in (*row["draws"], *row["few_draws"])]
    refusals = list(dict.fromkeys(draw["refused"] for draw in draws if draw["refused"]))
    lines = [f"  refused: {text}" for text in refusals[:REFUSALS]]
    if len(refusals) > REFUSALS:
        lines.append(f"  ... and {len(refusals) - REFUSALS} more sentences, in the JSON file")
    return lines


def _cells(row: Row) -> list[str]:
    cells = [row["method"], row["reducer"], str(row["shots"])]
    for prefix, draws in (("", row["draws"]), ("few_", row["few_draws"])):
        cells += [str(draws[0]["classes"])] if prefix else []
        cells += [f"{100 * row[prefix + name]:.1f}" for name in ("alone", "joint")]
        cells += [f"{row[prefix + 'gain']:+.2f}", f"{row[prefix + 'refused']} of {len(draws)}"]
    return cells


def _result(row: Row) -> str:
    return f"gain {row['gain']:+.2f}, with few classes {row['few_gain']:+.2f} points"


run = OwnTable("joint", joint_rows, _title, HEADS, _cells, _result, left=2, notes=_refusals).run
