"""Is what a classifier says of itself true? Its accuracy, log-loss, sets of labels and promises beside those of test
images: with one label, with several, and on a tree.

For each promise, over the test images:

labelled        share of the images that are answered; with several labels, of all labels those found
wrong           of the answers, those that are wrong; worst: in the worst draw
broken          draws with more of them than promised beyond chance: a one-sided binomial test at 5%, of what accepted
                answers count as (conformal.Judged.effective)
breaks, p       broken promises of all draws, out of `made` that accept anything; and the probability of as many by
                chance (an exact binomial test of 5%, as if promises and draws were independent)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.stats import beta, binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.multiclass import OneVsRestClassifier

from benchmarks.claims import data as sets
from benchmarks.claims.claim import Claim, Draws, fit, rows_of
from benchmarks.claims.data import OTHERS, SIBLINGS, Cell, DataSet, LabelSets, drawn, opened
from iosr_fast import Embeddings, FewShotHead
from iosr_fast.evaluation.tasks import TaskSource
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.verdict import Abstention, judge
from iosr_fast.methods.automation import least_odds
from iosr_fast.methods.conformal import Judged, of_answers, of_logits
from iosr_fast.utils.ranking import auroc, mean_average_precision

PROMISES, COVERAGE, KEPT, CHANCE = {f"{percent}%": percent / 100 for percent in (1, 2, 5, 10)}, 0.9, 0.95, 0.05
SHOTS, SEEDS, WIDTHS, ONE_BY_ONE = (4, 8, 16), 20, (32, 64, 128), "one by one"
HALVES, ENOUGH = 5, 100  # draws of which half of the classes are known, too, of more support images than that
SECONDS = 600.0  # for the search of parameters, which then tries the same on a busy machine
CS, FOLDS = (1.0, 10.0, 100.0, 1e3, 1e4), 5
BURSTS = {f"bursts {far}{named}": (far, bool(named)) for far in (0.2, 0.4) for named in ("", ", groups")}
SETS = {"aquarium": "Aquarium Dataset (Roboflow, 2020; CC BY 4.0)"}
Figures = dict[str, Any]


def of_promises(judged: Judged, test: Judged, total: int | None = None) -> Figures:
    """What holds on test images of what is promised by images that were judged; `total` are their labels where there
    are several. The binomial test is that of P(at least k of n) = I_p(k, n - k + 1), which takes what is no whole
    number."""
    found: Figures = {}
    for name, promised in PROMISES.items():
        least = least_odds(judged, promised)
        _, accepted, wrong = test.answered(least)
        n, k = test.accepted_and_wrong(least)
        found[f"labelled_{name}"] = accepted.mean() if total is None else (accepted & ~wrong).sum() / total
        found[f"wrong_{name}"] = wrong.sum() / max(accepted.sum(), 1)
        found[f"broken_{name}"] = bool(k > 0 and beta.cdf(promised, k, n - k + 1) < CHANCE)
    return found


def of_draws(draws: Sequence[Mapping[str, Any]]) -> Figures:
    """The broken promises of all draws, and the share of wrong labels in the worst of them."""
    names = [key.removeprefix("broken_") for key in draws[0] if key.startswith("broken_")]
    if not names:
        return {}
    made = sum(bool(draw[f"labelled_{name}"]) for draw in draws for name in names)
    breaks = sum(bool(draw[f"broken_{name}"]) for draw in draws for name in names)
    p = binomtest(breaks, made, CHANCE, alternative="greater").pvalue if made else None
    worst = {f"worst_{name}": max(draw[f"wrong_{name}"] for draw in draws) for name in names}
    return {"made": made, "breaks": breaks, "p": p, **worst}


AUTOMATION = """One label a picture: what is said beside what is true.

own, true       right labels of the images that judge, left-out support images or those of a calibration, and of test
                images
alike           of test images with the class sizes of those that judge
in_range        draws whose accuracy `alike` is in the 95% range that the classifier gives
own_loss, loss  log-loss in nats of the images that judge, and of test images
error           expected calibration error of test images
covered         test images whose set of labels, promised for 90%, has the label
warned          draws that warn of look-alikes: in the fit, or, with a calibration, in this
untold          draws that say that bursts cannot be told from other pictures
refused         draws whose calibration is refused; these are judged as fitted

With half of the classes known, the others' test images being pictures of unknown classes, in the first draws:

auroc, best     of `unknown_score`, and the highest of the scores of which it is made
kept, rejected  with keep=0.95 the known test images that are kept, and the unknown ones that are rejected
strangers       unknown test images whose label is accepted at 2%; both: those that are kept and accepted at 5%

`drawings` are turns, crops and lights of the demo's pictures, `photographs` of tiles of those of scikit-image (pip
install scikit-image), in bursts; "one by one", each support image is left out alone. Of feature files validation and
test images are drawn together, with and without texts, some as support and the others as test. A file with arrays
x (N, D), y (N,) and split (N,), "train" or "test", has half of the training images of each class as support: of the
Grocery Store Dataset 16 a class on the mean.
"""


def automation_sources(words: Sequence[str], shots: Sequence[int] | None, seeds: int | None) -> list[TaskSource]:
    counts, numbers = sorted(shots or SHOTS), range(seeds or SEEDS)
    found = []
    for word in words:
        data_sets = opened(word)
        first = data_sets[0]
        found += [drawn(data, counts if first.train is None else counts[-1:], numbers) for data in data_sets]
        found += [drawn(data, counts[-1:], numbers, of) for of, data in others_of(first).items()]
    return found


def others_of(data: DataSet) -> dict[str, DataSet]:
    """What else is measured of a data set, with the most images a class."""
    if data.variants > 1:
        return dict.fromkeys((ONE_BY_ONE, SIBLINGS, OTHERS), data)
    if data.train is not None:
        return dict.fromkeys((SIBLINGS, OTHERS), data)
    calibrated, widths = ({}, WIDTHS[1:2]) if data.text is None else ({OTHERS: data}, WIDTHS)
    return calibrated | {f"{width} dimensions": sets.projected(data, width) for width in widths}


def automation(task: Cell, method: str, seed: int) -> Draws:
    support, options = task.support, {"tune_seconds": SECONDS, "look_alikes": task.of != ONE_BY_ONE}
    head = fit(support.embeddings, support.labels, support.text, support.tau, method, **options)
    if task.validation is not None:
        with suppress(IosrFastError):  # refused
            head.calibrate_on(rows_of(task.validation[0]), task.validation[1])
    refused = task.validation is not None and head.snapshot().calibration is None
    yield {"of": task.of, **of_labels(head, task.queries, task.labels), "refused": refused}
    if not task.of and seed < HALVES and len(support.labels) > ENOUGH:
        known = np.sort(np.random.default_rng(seed).permutation(support.n_classes)[::2])
        inside, text = np.isin(support.labels, known), None if support.text is None else support.text[known]
        head = fit(support.embeddings[inside], support.labels[inside], text, support.tau, method, **options)
        yield {"of": "half known", **of_strangers(head, task.queries, np.isin(task.labels, known))}


def of_labels(head: FewShotHead, queries: Embeddings, labels: np.ndarray) -> Figures:
    """What the classifier says of itself, and what is true of queries with labels (B,)."""
    inner: Any = head.snapshot()
    judged, (low, high) = inner.judged, inner.accuracy_range
    test = of_logits(inner.calibrated(inner.score(queries)), labels)
    said, true = judged.reliability, test.reliability
    sizes = np.bincount(judged.labels, minlength=len(head.classes_))
    alike = np.average(test.right[:, 0], weights=sizes[labels] / np.bincount(labels)[labels])
    covered = None
    with suppress(IosrFastError):  # too few images judge
        covered = (test.label_odds >= judged.thresholds(COVERAGE)).mean()
    return {
        **{"own": said.accuracy, "true": true.accuracy, "alike": alike},
        **{"low": low, "high": high, "in_range": low <= alike <= high},
        **{"own_loss": said.log_loss, "loss": true.log_loss, "error": true.error},
        **{"covered": covered, "warned": bool(inner.look_alike_warning)},
        "untold": bool(inner.look_alikes and inner.look_alikes.doubt),
        **of_promises(judged, test),
    }


def of_strangers(head: FewShotHead, queries: Embeddings, is_known: np.ndarray) -> Figures:
    inner: Any = head.snapshot()
    score, singles = inner.unknown.score(queries), inner.unknown.scorer(queries).T
    kept = head.predict(rows_of(queries), "reject", keep=KEPT) != np.array(None)
    abstentions = (Abstention(max_error=promised) for promised in (0.02, 0.05))
    accepted, at_5 = (judge(inner, queries, abstention).accepted for abstention in abstentions)
    return {
        "auroc": auroc(score[~is_known], score[is_known]),
        "best": max(auroc(one[is_known], one[~is_known]) for one in singles),
        **{"kept": kept[is_known].mean(), "rejected": 1.0 - kept[~is_known].mean()},
        "strangers": accepted[~is_known].mean(),
        "both": (at_5 & kept)[~is_known].mean(),
    }


LABELS = """Several labels a picture: are they learnt, and is what is said of them true?

map              mean average precision over the classes on the test images
expected         the same as expected by left-out support images
rival            map of scikit-learn's OneVsRestClassifier(LogisticRegression), without texts; C is the best of five by
                 cross-validation on the support images
said, precision  right labels of all that left-out support images, and test images, are given
found            of the labels of test images those that they are given
warned           draws whose fit warns of look-alikes

`shots` are support images of each label, on the mean. The data sets:

demo            its pictures pasted two to an image, of 100 held-out concepts in eight test images each
FILE.npz        scenes of the images of a feature file, with and without texts, and in bursts (data.scenes)
NAME=FILE.csv   pictures and their labels, as `iosr-fast fit` takes them, encoded by "photographs"
"""


def labels_sources(words: Sequence[str], shots: Sequence[int] | None, seeds: int | None) -> Iterator[TaskSource]:
    numbers = range(seeds or SEEDS)
    for word in words:
        name, _, file = word.partition("=")
        counts = sorted(shots or SHOTS[1:])
        if word == "demo":
            yield sets.pasted(shots or (2, 4, 8), numbers)
        elif file:
            yield sets.pictures_of_table(SETS.get(name, name), file, shots, numbers)
        else:
            with_texts, *alone = opened(word)
            yield from (sets.scenes(data, counts, numbers) for data in (with_texts, *alone))
            yield from (sets.scenes(with_texts, counts[-1:], numbers, of, *how) for of, how in BURSTS.items())


def labels(task: LabelSets, method: str, seed: int) -> Draws:
    truth, members = task.labels, task.members.astype(int)
    head = fit(task.support, members, task.text, task.tau, method, task.groups, tune_seconds=SECONDS)
    inner: Any = head.snapshot()
    logits, known = inner.calibrated(inner.score(task.queries)), inner.judged
    test = of_answers(logits, truth, inner.link.decide(logits), np.arange(len(truth)))
    rival = None
    if not task.of:
        scores = best_rival(rows_of(task.support), members, seed).decision_function(rows_of(task.queries))
        rival = mean_average_precision(truth, scores)
    yield {
        **{"map": mean_average_precision(truth, logits), "expected": head.tuned_.average_precision, "rival": rival},
        "said": known.reliability.accuracy if known.count else None,
        **{"precision": test.right.mean(), "found": test.right.sum() / truth.sum()},
        **{"warned": bool(inner.look_alike_warning), **of_promises(known, test, int(truth.sum())), "of": task.of},
    }


def best_rival(images: np.ndarray, members: np.ndarray, seed: int) -> OneVsRestClassifier:
    """The rival whose C has the largest mean average precision in cross-validation on these images, fitted to them."""
    rivals = [OneVsRestClassifier(LogisticRegression(C=c, max_iter=300)) for c in CS]
    folds = KFold(FOLDS, shuffle=True, random_state=seed)
    left_out = [cross_val_predict(rival, images, members, cv=folds, method="decision_function") for rival in rivals]
    best = int(np.argmax([mean_average_precision(members > 0, scores) for scores in left_out]))
    return rivals[best].fit(images, members)


TREE = """On a tree (data.paths_of): of all answers, classes and nodes above them, beside answers with classes alone
(flat) of the same fit.

level       for each promise the images that are answered, by level of the tree, 0 for classes
error       the images that are answered at a level, and wrong

Validation and test images of a file are drawn together, with and without texts, some as support and the others as test.
"""


def tree_sources(words: Sequence[str], shots: Sequence[int] | None, seeds: int | None) -> Iterator[TaskSource]:
    for word in words:
        counts, paths = shots or [4 if word == "demo" else 16], sets.paths_of(word)
        yield from (drawn(data, counts, range(seeds or 100), paths=paths) for data in opened(word))


def tree(task: Cell, method: str, _: int) -> Draws:
    support = task.support
    head = fit(support.embeddings, support.labels, support.text, support.tau, method).snapshot()
    computed = {"plan": head.plan, "folds": head.folds, "out_of_fold": head.out_of_fold}
    logits = head.score(task.queries)
    for of, paths in {"flat": None, "tree": task.paths}.items():
        one = replace(head, paths=paths).with_computed(**computed)
        test = of_logits(one.calibrated(logits), task.labels, tree=one.tree)
        yield {"of": of, **of_promises(one.judged, test), **of_levels(one.judged, test)}


def of_levels(judged: Judged, test: Judged) -> Figures:
    found: Figures = {}
    for name, promised in PROMISES.items():
        level, answered, wrong = test.answered(least_odds(judged, promised))
        for number in range(test.odds.shape[1]):
            at = level == number
            found |= {f"level{number}_{name}": (answered & at).mean(), f"error{number}_{name}": (wrong & at).mean()}
    return found


CLAIMS = [
    Claim("automation", AUTOMATION, automation, sources=automation_sources, pool=of_draws),
    Claim("labels", LABELS, labels, sources=labels_sources, pool=of_draws),
    Claim("tree", TREE, tree, sources=tree_sources, pool=lambda _: {}),
]
