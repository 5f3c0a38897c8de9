"""What is loaded: a classifier's server and its rival, or one server of several classifiers and a server for each."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.backbones.demo.pictures import load_pictures
from iosr_fast.classifier import Classifier
from iosr_fast.evaluation.provenance import commit
from tools.serving_load.client import Answer, Queries, make_queries
from tools.serving_load.server import Server, serving

Facts = dict[str, Any]
Round = tuple[list[Answer], Facts]  # the answers of a measurement, and what was measured beside them
CLASSES, SHOTS = 10, 4
QUERIES = 64  # for each of several classifiers


@dataclass
class Contender:
    """Servers that are measured together; `rounds` has those of each measurement, by case and load."""

    name: str
    queries: Queries
    commands: Sequence[Sequence[str]]  # a server each, which gets the options, too
    options: Sequence[str] = ()
    ready: str = "/readyz"
    environment: dict[str, str] = field(default_factory=dict)
    commit: str = field(default_factory=commit)
    of_all: Queries | None = None  # each for all classifiers at once
    rounds: dict[tuple[str, float | None], list[Round]] = field(default_factory=dict)
    servers: list[Server] = field(default_factory=list)  # that run now

    @classmethod
    def of_bundles(
        cls, name: str, queries: Queries, served: Sequence[Sequence[Path]], path: Path | None, command: str = "serve"
    ) -> Contender:
        """`command`, such as "serve --max-batch 8", of iosr-fast for each list of classifiers; `path` is a checkout to
        run, None: this one."""
        word, *options = shlex.split(command)
        commands = [[sys.executable, "-m", "iosr_fast", word, *map(str, bundles)] for bundles in served]
        if path is None:
            return cls(name, queries, commands, options)
        theirs = {"PYTHONPATH": str(path.resolve()), "PYTHONSAFEPATH": "1"}
        return cls(name, queries, commands, options, environment=theirs, commit=commit(path))

    @contextmanager
    def running(self, *options: str, token: str = "") -> Iterator[None]:
        """Starts the servers and stops them. Raises RuntimeError for one that ends by itself."""
        environment = self.environment | {"IOSR_FAST_TOKEN": token}
        with ExitStack() as stack:
            self.servers = [
                stack.enter_context(serving([*command, *self.options, *options], self.ready, environment))
                for command in self.commands
            ]
            yield


def fit(classifier: Classifier, seed: int = 0) -> Classifier:
    """From SHOTS of the demo's pictures for each of CLASSES random concepts."""
    pictures = load_pictures("held-out", min_styles=SHOTS)
    chosen = np.random.default_rng(seed).permutation(len(pictures.names))[:CLASSES]
    rows = np.concatenate([np.flatnonzero(pictures.concepts == concept)[:SHOTS] for concept in chosen])
    return classifier.fit(pictures.images[rows], [pictures.names[concept] for concept in pictures.concepts[rows]])


def one_and_each(
    folder: Path, count: int, model: str, precision: str, command: str, rival: Path | None
) -> list[Contender]:
    """One server of `count` classifiers of different classes on one encoder, and a server for each. Requests ask each
    classifier in turn. Weights are random, which changes no speed."""
    bundles, asked = [folder / str(number) for number in range(count)], []
    options: dict[str, Any] = {"precision": precision}
    classifier = Classifier(model, None if model == "demo" else "none", **options)
    for seed, bundle in enumerate(bundles):
        fit(classifier, seed).save(bundle)
        asked.append(make_queries(classifier, QUERIES))

    def is_wrong(number: int, answer: Any) -> bool:
        return asked[number % count].is_wrong(number, answer)

    def any_is_wrong(number: int, answer: Any) -> bool:
        answers = answer["classifiers"]
        return any(one.is_wrong(number, answers[bundle.name]) for one, bundle in zip(asked, bundles, strict=True))

    each = replace(asked[0], is_wrong=is_wrong)
    one = replace(each, paths=[f"/v1/classifiers/{bundle.name}/predict" for bundle in bundles])
    names = "&".join(f"classifier={bundle.name}" for bundle in bundles)
    together = Contender.of_bundles("one", one, [bundles], None, command)
    together.of_all = replace(each, is_wrong=any_is_wrong, paths=[f"/v1/predict?{names}"])
    return [together, Contender.of_bundles("each", each, [[bundle] for bundle in bundles], rival, command)]
