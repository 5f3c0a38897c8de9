"""Are several labels of a picture learnt, and is what is said of them true?

map              mean average precision over the classes on the test images
expected         the same as expected by left-out support images
rival            map of scikit-learn's OneVsRestClassifier(LogisticRegression), without texts; C is the best of five by
                 cross-validation on the support images
said, precision  right labels of all that left-out support images, and test images, are given
found            of the labels of test images those that they are given
warned           draws whose fit warns of look-alikes
labelled         for each promise, of the labels of test images those that are given and accepted
wrong            of the accepted labels those that are wrong; worst: in the worst draw
broken           draws with more of them than promised beyond chance: a one-sided binomial test at 5%, on what accepted
                 labels count as (conformal.Judged.effective)
breaks, p        as of benchmarks.claims.automation

`shots` are support images of each label, on the mean. The data sets:

demo            its pictures pasted two to an image, of 100 held-out concepts in eight test images each
FILE.npz        scenes, sums of 1 to 4 embeddings with weights of 0.5 to 1. The validation and test images of a feature
                file, with and without texts, are split anew by each draw, all classes alike, and are in one scene each.
                "bursts X": each support scene is there three times, and all scenes are moved by X times their length as
                images of a class differ; "groups": which images are one scene is given
NAME=FILE.csv   pictures and their labels, as `iosr-fast fit` takes them, encoded by "photographs"
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.stats import beta
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.multiclass import OneVsRestClassifier

from benchmarks.claims.automation import CHANCE, SECONDS, DataSet, of_draws, pooled
from benchmarks.claims.claim import Claim, Draws, fit, rows_of
from benchmarks.claims.photographs import embedded
from iosr_fast import Embeddings, labelled_images
from iosr_fast.backbones.demo.pictures import POOL, held_out, only
from iosr_fast.backbones.load import load_clip
from iosr_fast.backbones.prompts import embed_classes
from iosr_fast.encoders.encoder import unit
from iosr_fast.evaluation.demo import torch_encoder
from iosr_fast.evaluation.features import TAU, open_sources
from iosr_fast.evaluation.tasks import TaskSource
from iosr_fast.export.pretrained import choose_adapter
from iosr_fast.head.labels import read_label_sets
from iosr_fast.methods.automation import least_odds
from iosr_fast.methods.conformal import Judged, of_answers
from iosr_fast.utils.ranking import mean_average_precision

SETS = {"aquarium": "Aquarium Dataset (Roboflow, 2020; CC BY 4.0)"}
PROMISES, SEEDS = {f"{percent}%": percent / 100 for percent in (1, 5, 10)}, 20
DEMO_SHOTS, SCENE_SHOTS, SHARES = (2, 4, 8), (8, 16), (0.2, 0.35, 0.5)  # shares of the pictures of a CSV file
CONCEPTS, QUERIES = 100, 8
MOST, BURST = 4, 3  # embeddings of a scene; copies of it
BURSTS = {f"bursts {far}{named}": (far, bool(named)) for far in (0.2, 0.4) for named in ("", ", groups")}
CS, FOLDS = (1.0, 10.0, 100.0, 1e3, 1e4), 5


@dataclass(frozen=True)
class Task:
    """Support images with labels `members` (N, C) bool, and test images with labels (B, C) bool; `of` what its row is
    of, one of BURSTS or nothing."""

    support: Embeddings
    members: np.ndarray
    queries: Embeddings
    labels: np.ndarray
    text: np.ndarray | None = None
    tau: float = TAU
    groups: np.ndarray | None = None
    of: str = ""


def sources(words: Sequence[str], shots: Sequence[int] | None, seeds: int | None) -> list[TaskSource]:
    found, numbers = [], range(seeds or SEEDS)
    for word in words:
        name, _, file = word.partition("=")
        if word == "demo":
            found.append(pasted(shots or DEMO_SHOTS, numbers))
        elif file and not Path(word).is_file():
            found.append(pictures(SETS.get(name, name), file, shots, numbers))
        else:
            counts = sorted(shots or SCENE_SHOTS)
            both = {one.name: one for use_text in (True, False) for one in open_sources([word], use_text=use_text)}
            with_texts, *alone = map(pooled, both.values())
            found += [scenes(data, counts, numbers) for data in (with_texts, *alone)]
            found += [scenes(with_texts, counts[-1:], numbers, of) for of in BURSTS]
    return found


def pasted(shots: Sequence[int], seeds: Sequence[int]) -> TaskSource:
    """The demo as a data set of images with two labels each; each seed has other concepts."""
    clip, every = load_clip("demo"), held_out()[0]
    run = torch_encoder(clip, choose_adapter(clip, "auto"))

    def draw(k: int, seed: int) -> Task:
        rng = np.random.default_rng(seed)
        chosen = rng.permutation(len(every.names))[:CONCEPTS]
        pictures = only(every, np.isin(np.arange(len(every.names)), chosen))
        rows = [rng.permutation(np.flatnonzero(pictures.concepts == c)) for c in range(CONCEPTS)]
        tests, test_labels = paste_pairs(pictures.images, [r[POOL:] for r in rows], QUERIES, rng)
        images, members = paste_pairs(pictures.images, [r[:POOL] for r in rows], k, rng)
        text = embed_classes(clip, pictures.names)
        return Task(run(images), members, run(tests), test_labels, text, clip.logit_scale)

    return TaskSource("demo, two to an image", tuple(shots), tuple(seeds), draw)


def paste_pairs(pictures: np.ndarray, rows: Sequence[np.ndarray], times: int, rng: Any) -> tuple[np.ndarray, ...]:
    """Images (times * C / 2, S, S, 3) uint8 and labels (times * C / 2, C) bool: each of C concepts is in `times`
    images, left or right of a random other one. `rows` are the pictures of each concept, which are taken in turn."""
    images, labels = [], []
    for turn in range(times):
        for pair in rng.permutation(len(rows)).reshape(-1, 2):
            two = np.hstack([pictures[rows[c][turn % len(rows[c])]] for c in pair])
            height, size = two.shape[:2]
            white = np.full((height // 2, size, 3), 255, np.uint8)
            square = Image.fromarray(np.vstack([white, two, white]))
            images.append(np.asarray(square.resize((height, height), Image.Resampling.BICUBIC)))
            labels.append(np.isin(np.arange(len(rows)), pair))
    return np.stack(images), np.stack(labels)


def scenes(data: DataSet, shots: Sequence[int], seeds: Sequence[int], of: str = "") -> TaskSource:
    """Images as a data set of scenes: of each class the same share, `shots` on the mean, makes the support's, and all
    others make the test's."""
    images, labels, classes = data.images.plain, data.labels, int(data.labels.max()) + 1
    own = images - np.stack([images[labels == c].mean(0) for c in range(classes)])[labels]

    def draw(k: int, seed: int) -> Task:
        rng = np.random.default_rng(seed)
        of_class = [rng.permutation(np.flatnonzero(labels == c)) for c in range(classes)]
        chosen = np.concatenate([rows[: round(k * classes / len(labels) * len(rows))] for rows in of_class])
        others = np.setdiff1d(np.arange(len(labels)), chosen)
        (support, members), (queries, truth) = (
            sums(images[rows], labels[rows], classes, rng) for rows in (chosen, others)
        )
        task = Task(Embeddings(support), members, Embeddings(queries), truth, data.text, data.tau, of=of)
        return in_bursts(task, own, *BURSTS[of], rng) if of else task

    return TaskSource(data.name, tuple(shots), tuple(seeds), draw)


def sums(images: np.ndarray, labels: np.ndarray, classes: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Scenes (B, D) of unit length and their labels (B, C) bool, of images (n, D) with labels (n,), of which each is in
    one scene: as many scenes of 1 as of 2, up to MOST images. What would be a scene's second of a class is left out,
    and the last images, which are too few."""
    of_each = np.arange(1, MOST + 1)
    sizes = rng.permutation(np.tile(of_each, len(labels) // of_each.sum()))
    scene = np.repeat(np.arange(len(sizes)), sizes)
    order = rng.permutation(len(labels))[: len(scene)]
    first = np.unique(scene * classes + labels[order], return_index=True)[1]
    members, found = np.zeros((len(sizes), classes), bool), np.zeros((len(sizes), images.shape[1]))
    members[scene[first], labels[order[first]]] = True
    np.add.at(found, scene[first], rng.uniform(0.5, 1.0, len(first))[:, None] * images[order[first]])
    return unit(found.astype(np.float32)), members


def in_bursts(task: Task, moves: np.ndarray, far: float, named: bool, rng: np.random.Generator) -> Task:
    """The task with BURST copies of each support image, one after another; these and the test images, all of length 1,
    are moved `far`, each along a random one of the `moves` (M, D)."""

    def moved(images: np.ndarray) -> Embeddings:
        return Embeddings(unit(images + far * unit(moves[rng.integers(len(moves), size=len(images))])))

    support, members = (np.repeat(rows, BURST, axis=0) for rows in (task.support.plain, task.members))
    groups = np.repeat(np.arange(len(task.members)), BURST) if named else None
    return replace(task, support=moved(support), members=members, queries=moved(task.queries.plain), groups=groups)


def pictures(name: str, file: str, shots: Sequence[int] | None, seeds: Sequence[int]) -> TaskSource:
    """Pictures of a CSV file: random ones are the support, and all others the test."""
    listed = labelled_images(file)
    members, images = read_label_sets(listed.labels, len(listed.paths), listed.class_names)[1], embedded(listed.paths)
    of_label = members.sum() / members.shape[1]

    def draw(k: int, seed: int) -> Task:
        order = np.random.default_rng(seed).permutation(len(members))
        support, test = np.split(order, [round(k / of_label * len(order))])
        return Task(images[support], members[support], images[test], members[test])

    return TaskSource(name, tuple(shots or [round(share * of_label) for share in SHARES]), tuple(seeds), draw)


def draws(task: Task, method: str, seed: int) -> Draws:
    labels, members = task.labels, task.members.astype(int)
    head = fit(task.support, members, task.text, task.tau, method, task.groups, tune_seconds=SECONDS)
    inner: Any = head.snapshot()
    logits, known = inner.calibrated(inner.score(task.queries)), inner.judged
    test = of_answers(logits, labels, inner.link.decide(logits), np.arange(len(labels)))
    rival = (
        None if task.of else best_rival(rows_of(task.support), members, seed).decision_function(rows_of(task.queries))
    )
    yield {
        "map": mean_average_precision(labels, logits),
        "expected": head.tuned_.average_precision,
        "rival": None if rival is None else mean_average_precision(labels, rival),
        "said": known.reliability.accuracy if known.count else None,
        "precision": test.right.mean(),
        "found": test.right.sum() / labels.sum(),
        "warned": bool(inner.look_alike_warning),
        **of_promises(known, test, int(labels.sum())),
        "of": task.of,
    }


def of_promises(judged: Judged, test: Judged, labels: int) -> dict[str, Any]:
    """What holds on test images, which have this many labels, of what is promised by images that were judged. The
    binomial test is that of P(at least k of n) = I_p(k, n - k + 1), which takes what is no whole number."""
    found: dict[str, Any] = {}
    for name, promised in PROMISES.items():
        least = least_odds(judged, promised)
        _, accepted, wrong = test.answered(least)
        n, k = test.accepted_and_wrong(least)
        found[f"labelled_{name}"] = (accepted & ~wrong).sum() / labels
        found[f"wrong_{name}"] = wrong.sum() / max(accepted.sum(), 1)
        found[f"broken_{name}"] = bool(k > 0 and beta.cdf(promised, k, n - k + 1) < CHANCE)
    return found


def best_rival(images: np.ndarray, members: np.ndarray, seed: int) -> OneVsRestClassifier:
    """The rival whose C has the largest mean average precision in cross-validation on these images, fitted to them."""
    rivals = [OneVsRestClassifier(LogisticRegression(C=c, max_iter=300)) for c in CS]
    folds = KFold(FOLDS, shuffle=True, random_state=seed)
    left_out = [cross_val_predict(rival, images, members, cv=folds, method="decision_function") for rival in rivals]
    best = int(np.argmax([mean_average_precision(members > 0, scores) for scores in left_out]))
    return rivals[best].fit(images, members)


CLAIM = Claim("labels", __doc__, draws, sources=sources, pool=of_draws)

if __name__ == "__main__":
    CLAIM.main()
