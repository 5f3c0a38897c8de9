"""Does a promise on a tree hold? Of all answers, classes and nodes above them, beside answers with classes alone (flat)
of the same fit.

labelled    for each promise the images that are answered; by level of the tree as `level`, 0 for classes
wrong       of these answers, those that are wrong: the image's class is not below the node
error       the images that are answered at a level, and wrong
broken      draws with more wrong answers than promised beyond chance (a one-sided binomial test at 5%)

Trees are made by hand over Caltech-101's names, of the demo's groups of emoji, or, where a feature file has no such
names, of clusters (Ward) of the class means of its own support images, which are in no draw. Validation and test images
of a file are drawn together, with and without texts, some as support and the others as test. "Not tuned" are the
probabilities of Gaussians as they are, much too unsure without texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import fcluster, ward

from benchmarks.claims.automation import PROMISES, answers, drawn, of_promises, opened
from benchmarks.claims.claim import Claim, Draws, fit
from iosr_fast.backbones.demo.pictures import held_out, load_index
from iosr_fast.evaluation.features import open_sources
from iosr_fast.evaluation.tasks import TaskSource
from iosr_fast.methods.conformal import Judged, of_logits
from iosr_fast.methods.tree import Path

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


def sources(words: Sequence[str], shots: Sequence[int] | None, seeds: int | None) -> list[TaskSource]:
    found = []
    for word in words:
        if word == "demo":
            found.append(in_tree(*open_sources([word], shots or [4], seeds or 100), paths_of_demo()))
        else:
            paths, counts = paths_of_file(word), (tuple(shots or (16,)), tuple(range(seeds or 100)))
            found += [in_tree(drawn(data, *counts), paths) for data in opened(word)]
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
    support = task.support
    for how, fitted_by in {"": method, ", not tuned": "gda"}.items():
        head = fit(support.embeddings, support.labels, support.text, support.tau, fitted_by).snapshot()
        computed = {"plan": head.plan, "folds": head.folds, "out_of_fold": head.out_of_fold}
        logits = head.score(task.queries)
        for of, paths in {"flat": None, "tree": task.paths}.items():
            one = replace(head, paths=paths).with_computed(**computed)
            test = of_logits(one.calibrated(logits), task.labels, tree=one.tree)
            yield {"of": of + how, **figures(one.judged, test)}


def figures(judged: Judged, test: Judged) -> dict[str, float]:
    """Those of promises, and by level."""
    found = of_promises(judged, test)
    for name, promised in PROMISES.items():
        level, answered, wrong = answers(judged, test, promised)
        for number in range(test.odds.shape[1]):
            at = level == number
            found |= {f"level{number}_{name}": (answered & at).mean(), f"error{number}_{name}": (wrong & at).mean()}
    return found


CLAIM = Claim("tree", __doc__, draws, sources=sources, pool=lambda _: {})


if __name__ == "__main__":
    CLAIM.main()
