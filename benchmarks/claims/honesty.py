"""Is what a classifier says of itself true? Its accuracy, log-loss and promises beside those of test images: of
independent pictures, of bursts, in few dimensions, and of other shops than the test's.

own, true       right labels by `calibration()`, and of test images
alike           of test images with the class sizes of those that judge: the calibration, or else the support
in range        draws whose accuracy `alike` is in the 95% range that the classifier gives
own loss, loss  log-loss in nats by `calibration()`, and of test images
error           expected calibration error of test images (10 bins of the largest probability)
warned          draws that warn of look-alikes: in the fit, or, with a calibration, in this
refused         draws whose calibration is refused; these are judged as fitted
labelled, wrong, broken  of each promise, as in automation.py
breaks, p       broken promises of all draws, of those that accept anything; and the probability of as many by chance
                (an exact binomial test of 5%, as if promises and draws were independent)

`drawings` and `photographs` are in bursts of automation.py, whose groups the fit is not given. Of feature files
validation and test images are drawn together; a random Gaussian projection, the same for all draws, makes few
dimensions of them and their texts. A file with arrays x (N, D), y (N,) and split (N,), "train" or "test", has half of
the training images of each class as support: of the Grocery Store Dataset 16 a class on the mean.

Calibrated on siblings: other variants of the support's pictures, or the other half of the training images. Calibrated
on others: 250 pictures (each a burst), or half of them all if these are fewer, which are in neither support nor test.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from benchmarks.claims import automation
from benchmarks.claims.automation import BURST, OTHERS, PROMISES, RECENT, SHOTS, SIBLINGS, drawn
from benchmarks.claims.claim import Claim, Draws, Task, fit, rows_of
from iosr_fast.encoders.encoder import Embeddings, unit
from iosr_fast.evaluation.features import TAU, open_sources
from iosr_fast.evaluation.tasks import Task as FewShotTask
from iosr_fast.evaluation.tasks import TaskSource
from iosr_fast.exceptions import IosrFastError, LookAlikesWarning
from iosr_fast.few_shot_head import FewShotHead
from iosr_fast.methods.config import wilson
from iosr_fast.methods.support_set import make_support_set

MOST, WIDTHS, BINS, CHANCE, SEEDS = max(SHOTS), (32, 64, 128), 10, 0.05, 20
CALIBRATIONS = {"": "", SIBLINGS: "calibrated on siblings", OTHERS: "calibrated on others"}
SECONDS = 600.0  # for the search of parameters, which then tries the same on a busy machine


def sources(words: Sequence[str], shots: Sequence[int] | None, seeds: int | None) -> list[TaskSource]:
    """A source for each cell; its note says which it is."""
    cells = [cell for word in words for cell in cells_of(word, tuple(range(seeds or SEEDS)))]
    return [replace(cell, notes=(note,)) for note, cell in cells if cell.shots[0] in (shots or SHOTS)]


def cells_of(word: str, seeds: tuple[int, ...]) -> Iterator[tuple[str, TaskSource]]:
    name, largest = Path(word).name, ((MOST,), seeds)
    if arrays := arrays_of(word):
        for calibration, note in CALIBRATIONS.items():
            yield note, in_halves(name, *arrays, calibration, *largest)
        return
    in_bursts = word in automation.PICTURES
    variants = 2 * BURST if in_bursts else 1
    images = automation.PICTURES[word](variants) if in_bursts else automation.pooled(*open_sources([word]))
    with_texts = images[2] is not None
    for shots in SHOTS:
        yield "", drawn(name, *images, variants, (shots,), seeds)
    for calibration in (SIBLINGS, OTHERS) if in_bursts else (OTHERS,) if with_texts else ():
        yield CALIBRATIONS[calibration], drawn(name, *images, variants, *largest, calibration=calibration)
    for width in () if in_bursts else WIDTHS if with_texts else WIDTHS[1:2]:
        yield f"{width} dimensions", drawn(name, *projected(*images, width), variants, *largest)


def arrays_of(word: str) -> Sequence[Any]:
    """x, y and split of a file that has them."""
    if not Path(word).is_file():
        return []
    with np.load(word, allow_pickle=False) as file:
        return [file[name] for name in ("x", "y", "split")] if "split" in file.files else []


def in_halves(name: str, x: np.ndarray, y: np.ndarray, split: np.ndarray, calibration: str, *of: Any) -> TaskSource:
    images = Embeddings(unit(x))

    def draw(_: int, seed: int) -> FewShotTask:
        order = np.random.default_rng(seed).permutation(len(y))
        train, test = (order[split[order] == part] for part in ("train", "test"))
        of_class = [train[y[train] == c] for c in range(y.max() + 1)]
        support, siblings = (np.concatenate([rows[half::2] for rows in of_class]) for half in (0, 1))
        validation = images[siblings], y[siblings]
        if calibration == OTHERS:
            recent, test = np.split(test, [min(RECENT, len(test) // 2)])
            validation = images[recent], y[recent]
        known = make_support_set(images[support], y[support], None, TAU, len(of_class))
        return FewShotTask(known, images[test], y[test], validation if calibration else None)

    return TaskSource(name, *of, draw)


def projected(images: Embeddings, labels: np.ndarray, text: np.ndarray | None, tau: float, width: int) -> tuple:
    """The same in `width` dimensions, at unit length."""
    matrix = np.random.default_rng(0).standard_normal((images.plain.shape[1], width)).astype(np.float32)
    return Embeddings(unit(images.plain @ matrix)), labels, None if text is None else unit(text @ matrix), tau


def draws(task: Task, method: str, _: int) -> Draws:
    given, refused = task.support, False
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        head = fit(given.embeddings, given.labels, given.text, given.tau, method, tune_seconds=SECONDS)
        if task.validation is not None:
            raised.clear()
            try:
                head.calibrate_on(rows_of(task.validation[0]), task.validation[1])
            except IosrFastError:
                refused = True
    inner: Any = head.snapshot()
    warned = any(issubclass(one.category, LookAlikesWarning) for one in raised) or inner.look_alike_warning
    judges = given.labels if task.validation is None or refused else task.validation[1]
    found = figures(head, rows_of(task.queries), task.labels, np.bincount(judges, minlength=given.n_classes))
    yield automation.rounded({**found, "warned": bool(warned), "refused": refused})


def figures(head: FewShotHead, rows: np.ndarray, labels: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
    """What the classifier says of itself, and what is true of rows (B, D) with labels (B,); `sizes` (C,) are the class
    sizes of the images that judge it."""
    said, (low, high) = head.calibration(), range_of(head)
    right, shares = head.predict(rows) == labels, head.predict_proba(rows).astype(np.float64)
    alike = np.average(right, weights=sizes[labels] / np.bincount(labels)[labels])
    of_label = shares[np.arange(len(labels)), np.searchsorted(head.classes_, labels)]
    top = shares.max(1)
    beyond = np.bincount(np.ceil(BINS * top).astype(int), right - top)  # of each bin, right labels above expected ones
    promises = automation.of_promises(head, rows, right)
    return {
        **{"own": said.accuracy, "true": right.mean(), "alike": alike, "low": low, "high": high},
        **{"in_range": low <= alike <= high, "own_loss": said.log_loss},
        "loss": -np.log(np.maximum(of_label, np.finfo(np.float64).eps)).mean(),
        "error": np.abs(beyond).sum() / len(labels),
        **promises,
        **{f"made_{name}": promises[f"labelled_{name}"] > 0 for name in PROMISES},
    }


def range_of(head: FewShotHead) -> tuple[float, float]:
    """Where the accuracy is with 95% confidence, as the classifier says; earlier versions say it in words alone."""
    inner: Any = head.snapshot()
    said: tuple[float, float] | None = getattr(inner, "accuracy_range", None)
    return wilson(head.calibration().accuracy, inner.left_out_labels.count) if said is None else said


class Honesty(Claim):
    """A claim whose rows count the broken promises of all draws."""

    def rows(self, source: TaskSource) -> Iterator[dict[str, Any]]:
        for row in super().rows(source):
            yield {**row, "of": ", ".join(source.notes), **breaks(row)}


def breaks(row: Mapping[str, Any]) -> dict[str, Any]:
    count = len(row["seeds"])
    made, broken = (round(sum(count * row[f"{name}_{one}"] for one in PROMISES)) for name in ("made", "broken"))
    p = binomtest(broken, made, CHANCE, alternative="greater").pvalue if made else None
    return {"made": made, "breaks": broken, "p": p}


CLAIM = Honesty("honesty", __doc__, draws, sources=sources, keeps_draws=False)


if __name__ == "__main__":
    CLAIM.main()
