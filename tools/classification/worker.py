"""Opening a classifier for many images, here or in an actor of Ray, and writing what it says of a chunk."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np

from iosr_fast.encoders.encoder import Encoder
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.pipeline.embedding_files import Part
from iosr_fast.state.bundle import Bundle, load_bundle
from iosr_fast.state.predictions import Prediction, predict
from iosr_fast.state.state import State
from iosr_fast.state.state_files import fingerprint
from tools.classification.parts import write_answers
from tools.classification.plan import ClassifyPlan
from tools.embedding.cluster import Worker
from tools.embedding.local import Write


def open_encoder(bundle: Bundle, runtime: str, threads: int) -> Encoder:
    """The encoder of a bundle on `threads` cores."""
    return open_engine(bundle.files or bundle.engine, runtime, verify=False, threads=threads)


def writer(state: State, plan: ClassifyPlan) -> Write:
    """What makes a part file of a chunk's embeddings: a batch of rows at a time, so that what is scored together
    depends on the chunk alone."""

    def write(path: Path, part: Part) -> None:
        predictions: list[Prediction | None] = [None] * len(part.keys)
        good = np.flatnonzero([error is None for error in part.errors])
        for start in range(0, len(good), plan.batch):
            rows = good[start : start + plan.batch]
            for row, made in zip(rows, predict(state, part.embeddings[rows], plan.top), strict=True):
                predictions[row] = made
        write_answers(path, part.keys, predictions, part.errors, part.columns, part.facts or {})

    return write


class ClassifyWorker(Worker):
    """An actor with the classifier open."""

    plan_type = ClassifyPlan

    def open(self, engine: str) -> tuple[Encoder, Write | None]:
        assert isinstance(self.plan, ClassifyPlan)
        bundle = load_bundle(engine, verify=False)
        if fingerprint(bundle.state) != self.plan.bundle:
            raise RuntimeError(
                f"expected one classifier on all machines, but {socket.gethostname()} has another in {engine}"
            )
        return open_encoder(bundle, self.plan.runtime, self.threads), writer(bundle.state, self.plan)
