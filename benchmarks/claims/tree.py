"""Does a promise on a tree hold? Of all answers, classes and nodes above them, beside answers with classes alone (flat)
of the same fit.

labelled    for each promise the images that are answered; by level of the tree as `level`, 0 for classes
wrong       of these answers, those that are wrong: the image's class is not below the node
error       the images that are answered at a level, and wrong
broken      draws with more wrong answers than promised beyond chance (a one-sided binomial test at 5%); of made-up
            logits draws after which more than promised of the population's answers are wrong: 5% of draws may be

Trees are made by hand over Caltech-101's names, of the demo's groups of emoji, or, where a feature file has no such
names, of clusters (Ward) of the class means of its own support images, which are in no draw. Validation and test images
of a file are drawn together, with and without texts, some as support and the others as test. "Not tuned" are the
probabilities of Gaussians as they are, much too unsure without texts.

The word `made` stands for logits of 24 classes: images that are judged, from populations of 20,000.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import fcluster, ward
from scipy.stats import binom

from benchmarks.claims.automation import PROMISES, redrawn, rounded, with_and_without_texts
from benchmarks.claims.claim import Claim, Draws, fit
from iosr_fast.clip.demo.pictures import held_out, load_index
from iosr_fast.evaluation.features import open_sources
from iosr_fast.evaluation.tasks import TaskSource
from iosr_fast.methods.automation import least_odds
from iosr_fast.methods.conformal import LeftOutLabels, of_logits
from iosr_fast.methods.tree import Path, Tree, finest

IMAGES, POPULATION = 1000, 20_000
CALTECH = """
animal > mammal: beaver cougar_body dalmatian elephant kangaroo leopard llama panda platypus rhino dolphin
animal > bird: flamingo flamingo_head pigeon rooster
animal > reptile: crocodile crocodile_head
animal > arthropod: ant butterfly crab crayfish dragonfly lobster scorpion tick trilobite
animal > in the sea: octopus sea_horse starfish
vehicle > on land: car_side motorbike wheelchair inline_skate
vehicle > in the air: airplane helicopter
vehicle > boat: ferry ketch schooner
instrument: accordion electric_guitar gramophone grand_piano saxophone
household > furniture: chair windsor_chair
household > light and air: ceiling_fan chandelier lamp
household > vessel: barrel cup ewer
device > electronic: camera cellphone headphone laptop watch
device > tool: binocular scissors stapler umbrella wrench
weapon: cannon revolver
food or plant: pizza strawberry sunflower
"""
ALONE = "face dollar_bill soccer_ball stop_sign"  # directly below the root


@dataclass(frozen=True)
class Population:
    """Made-up logits. A class gets what it and each node above it get: normal noise, and where they are the label's a
    signal; `signals` (L), the finest level first. Their softmax are the true probabilities, but they are `sharpness`
    times too large, and a share `strangers` of the labels is any class. Images come in bursts of 4, where there is a
    `correlation`: with that chance they are copies of one."""

    paths: tuple[Path, ...]
    signals: tuple[float, ...] = (2.0, 1.5, 1.5)
    sharpness: float = 1.0
    strangers: float = 0.0
    correlation: float = 0.0

    @cached_property
    def tree(self) -> Tree:
        return Tree(self.paths)

    @cached_property
    def logits(self) -> tuple[np.ndarray, np.ndarray]:
        """Of all images, and their labels."""
        rng = np.random.default_rng(0)
        labels = rng.integers(len(self.paths), size=POPULATION)
        logits = np.zeros((POPULATION, len(self.paths)))
        for nodes, signal in zip(self.tree.levels, self.signals, strict=False):
            noise = rng.standard_normal((POPULATION, nodes.max() + 1))[:, nodes]
            logits += signal * (noise + signal * (nodes == nodes[labels][:, None]))
        strange = rng.random(POPULATION) < self.strangers
        labels[strange] = rng.integers(len(self.paths), size=strange.sum())
        return self.sharpness * logits, labels

    @cached_property
    def images(self) -> LeftOutLabels:
        return of_logits(*self.logits, tree=self.tree)

    def draw(self, name: str, count: int, seed: int) -> Any:
        """Images that are judged, and the population that they are from, which is the test."""
        rng = np.random.default_rng(seed)
        rows, units = rng.integers(POPULATION, size=count), np.arange(count)
        if self.correlation:
            units = units // 4
            rows = np.where((rng.random(count) < self.correlation)[units], rows[4 * units], rows)
        logits, labels = (part[rows] for part in self.logits)
        judged = of_logits(logits, labels, units=units, tree=self.tree)
        return SimpleNamespace(name=name, judged=judged, population=self.images, labels=self.images.labels)


EVEN = tuple((f"g{c // 12}", f"f{c // 4}") for c in range(24))
UNEVEN = ((), (), ("a",), ("a",), *[("a", "b")] * 3, *[("a", "b", "c")] * 3, ("d",), ("d",), *[("d", "e")] * 12)
DEEP = tuple((f"g{c // 12}", f"f{c // 6}", f"e{c // 3}") for c in range(24))
FOUR = (1.5, 1.5, 1.5, 1.5)
MADE = {
    "no tree": Population(((),) * 24, (3.0,)),
    "even": Population(EVEN),
    "even, classes alike": Population(EVEN, (1.0, 1.0, 2.0)),
    "uneven": Population(UNEVEN, FOUR),
    "deep": Population(DEEP, (1.0, 1.0, 1.0, 1.5)),
    "too sure": Population(EVEN, sharpness=3.0),
    "least of a half": Population(EVEN, sharpness=0.4),  # at 10%; 0.35 by the next one
    "least below a half": Population(EVEN, sharpness=0.2),
    "wrong labels": Population(EVEN, (4.0, 3.0, 3.0), strangers=0.012),
    "bursts 0.3": Population(EVEN, correlation=0.3),
    "bursts 0.7": Population(EVEN, correlation=0.7),
    "bursts 1": Population(EVEN, correlation=1.0),
    "uneven, bursts 0.5": Population(UNEVEN, FOUR, correlation=0.5),
    "wrong labels, bursts 0.5": Population(EVEN, (4.0, 3.0, 3.0), strangers=0.012, correlation=0.5),
}


def sources(words: Sequence[str], shots: Sequence[int] | None, seeds: int | None) -> list[TaskSource]:
    found = []
    for word in words:
        if word == "made":
            counts = tuple(shots or (IMAGES,)), tuple(range(seeds or 1000))
            found += [TaskSource("made-up logits", *counts, partial(one.draw, name)) for name, one in MADE.items()]
        elif word == "demo":
            found.append(in_tree(*open_sources([word], shots or [4], seeds or 100), paths_of_demo()))
        else:
            paths, counts = paths_of_file(word), (tuple(shots or (16,)), tuple(range(seeds or 100)))
            found += [in_tree(redrawn(source, *counts), paths) for source in with_and_without_texts(word)]
    return found


def in_tree(source: TaskSource, paths: tuple[Path, ...]) -> TaskSource:
    def draw(k: int, seed: int) -> Any:
        return SimpleNamespace(**vars(source.draw(k, seed)), paths=paths)

    return replace(source, draw=draw)


def paths_of_demo() -> tuple[Path, ...]:
    """A concept's group of emoji, "animal mammal", below the word that groups share."""
    groups = {concept["name"]: concept["subgroup"] for concept in load_index()["concepts"]}
    of_concepts = [groups[name] for name in held_out()[0].names]
    return tuple(tuple(dict.fromkeys((f"any {group.split()[0]}", group))) for group in of_concepts)


def paths_of_file(word: str) -> tuple[Path, ...]:
    """By hand over known class names, else by clusters of the class means of the file's own support images."""
    with np.load(word, allow_pickle=False) as file:
        names = [str(name) for name in file["class_names"]] if "class_names" in file.files else []
    known = paths_by_hand()
    if names and all(name in known for name in names):
        return tuple(known[name] for name in names)
    (source,) = open_sources([word])
    support = source.draw(max(source.shots), 0).support
    means = [support.embeddings.plain[support.labels == c].mean(0) for c in range(support.n_classes)]
    merged = ward(np.stack(means))
    cuts = [fcluster(merged, max(support.n_classes // each, 2), "maxclust").tolist() for each in (12, 4)]
    return tuple((f"group {group}", f"family {family}") for group, family in zip(*cuts, strict=True))


def paths_by_hand() -> dict[str, Path]:
    """The paths of Caltech-101's classes."""
    known: dict[str, Path] = dict.fromkeys(ALONE.split(), ())
    for line in CALTECH.strip().splitlines():
        path, _, names = line.partition(": ")
        known |= dict.fromkeys(names.split(), tuple(path.split(" > ")))
    return known


def draws(task: Any, method: str, _: int) -> Draws:
    if hasattr(task, "population"):
        yield {"of": task.name, "method": "none", **figures(task.judged, task.population, is_population=True)}
        return
    support = task.support
    for how, fitted_by in {"": method, ", not tuned": "gda"}.items():
        head = fit(support.embeddings, support.labels, support.text, support.tau, fitted_by).snapshot()
        computed = {"plan": head.plan, "folds": head.folds, "out_of_fold": head.out_of_fold}
        logits = head.score(task.queries)
        for of, paths in {"flat": None, "tree": task.paths}.items():
            one = replace(head, paths=paths).with_computed(**computed)
            test = of_logits(logits, task.labels, tree=one.tree)
            yield {"of": of + how, **figures(one.left_out_labels, test)}


def figures(judged: LeftOutLabels, test: LeftOutLabels, is_population: bool = False) -> dict[str, float]:
    """What holds on the test of what is promised by images that were judged."""
    odds, right = test.level_odds, test.level_right
    found: dict[str, float] = {}
    for name, promised in PROMISES.items():
        level, answered = finest(odds, least_odds(judged, promised))
        wrong = answered & ~right[np.arange(len(level)), level]
        n, k = int(answered.sum()), int(wrong.sum())
        broken = k > promised * n if is_population else k > 0 and binom.sf(k - 1, n, promised) < 0.05
        found |= {f"labelled_{name}": n / len(level), f"wrong_{name}": k / max(n, 1), f"broken_{name}": float(broken)}
        for number in range(odds.shape[1]):
            at = level == number
            found |= {f"level{number}_{name}": (answered & at).mean(), f"error{number}_{name}": (wrong & at).mean()}
    return rounded(found)


CLAIM = Claim("tree", __doc__, draws, sources=sources, keeps_draws=False)


if __name__ == "__main__":
    CLAIM.main()
