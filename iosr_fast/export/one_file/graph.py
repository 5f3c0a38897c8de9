"""The whole graph: pictures or pixels, the encoder of an engine, and what its embeddings are answered with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from iosr_fast.encoders.engine_folder import ONNX_FILE, PLAIN_FILE, WEIGHTS
from iosr_fast.exceptions import IosrFastError
from iosr_fast.export.one_file.logits import answer, logits_of, odds_of_largest
from iosr_fast.export.one_file.pixels import resized_pixels
from iosr_fast.export.one_file.unknown import unknown_score
from iosr_fast.export.one_file.value import Value
from iosr_fast.images.geometry import Geometry
from iosr_fast.methods.tree import Tree
from iosr_fast.methods.unknown import Unknown
from iosr_fast.scoring.fields import EMBEDDINGS
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.sealed.verified_folder import VerifiedFolder
from iosr_fast.utils.require import require

if TYPE_CHECKING:
    from onnx import ModelProto

Source = Literal["picture", "pixels"]
PRECISIONS = ("fp32", "fp16", "int8")
MOST_BYTES = 2_000_000_000  # protobuf's limit is 2 GiB


@dataclass(frozen=True)
class Answers:
    """What a file answers.

    plan        whose logits give probabilities and labels
    adapted     whether adapted embeddings are needed
    least_odds  the least log p / (1 - p) of an accepted label; None where no promise was asked for
    tree        whose nodes an accepted label may be; None for the classes alone
    thresholds  where pictures may have several labels, of each class the probability from which a picture has it, (C,);
                else None
    unknown     with the `threshold` above which a picture is rejected; None where none is
    """

    plan: ScoringPlan
    adapted: bool
    least_odds: float | None = None
    unknown: Unknown | None = None
    threshold: float = np.inf
    tree: Tree | None = None
    thresholds: np.ndarray | None = None


def check_engine_graph(engine: VerifiedFolder | None) -> VerifiedFolder:
    """The engine. Raises IosrFastError where it has no ONNX graph, another precision, or more than a file can hold."""
    if engine is None:
        raise IosrFastError(
            "expected a classifier on an encoder of an engine folder, got one without, as of FewShotHead: an encoder "
            "of your own, or embeddings, can't be exported; fit a Classifier on images"
        )
    if ONNX_FILE not in engine.files:
        raise IosrFastError(
            f"expected an engine with an ONNX graph, got one for {engine.manifest['runtime']}: build it with "
            "runtime='onnxruntime'"
        )
    if (precision := engine.manifest["precision"]) not in PRECISIONS:
        raise IosrFastError(f"expected an engine in {', '.join(PRECISIONS)}, got {precision}: fit in one of these")
    _check_size(sum(engine.manifest["files"][name]["bytes"] for name in (ONNX_FILE, WEIGHTS) if name in engine.files))
    return engine


def _check_size(n_bytes: int) -> None:
    if n_bytes > MOST_BYTES:
        raise IosrFastError(
            f"expected a model of at most {MOST_BYTES / 1e9:.1f} GB, which one ONNX file holds, got one of "
            f"{n_bytes / 1e9:.1f} GB: take a smaller model, or precision='int8'"
        )


def make_graph(engine: VerifiedFolder, answers: Answers, source: Source) -> ModelProto:
    """The onnx.ModelProto of an engine (`check_engine_graph`) and answers. `source` "picture" resizes in the graph."""
    onnx = require("onnx", "cpu")
    file = ONNX_FILE if answers.adapted or PLAIN_FILE not in engine.files else PLAIN_FILE
    model = engine.open_with(lambda folder: onnx.load(Path(folder, file)))
    graph, geometry = model.graph, Geometry.from_facts(engine.manifest)
    encoder = list(graph.node)
    for field in (graph.node, graph.input, graph.output, graph.value_info):
        del field[:]
    pictures = Value(graph, source, np.uint8)
    if source == "pixels":
        graph.input.append(pictures.info(geometry.size, geometry.size, 3))
    else:
        graph.input.append(pictures.info("height", "width", 3))
        resized_pixels(pictures, geometry).op("Identity", name="pixels")
    graph.node.extend(encoder)
    add_answers(answers, {name: Value(graph, name, np.float32) for name in EMBEDDINGS})
    _check_size(sum(len(tensor.raw_data) for tensor in graph.initializer))
    return model


def add_answers(answers: Answers, embeddings: Mapping[str, Value]) -> None:
    """Add the outputs of the graph, by "plain" and "adapted" `embeddings` (B, D), as far as they are needed."""
    n_classes = answers.plan.n_classes
    logits = logits_of(answers.plan, embeddings)
    if answers.thresholds is not None:
        probabilities = logits.op("Sigmoid", name="probabilities")
        least = np.log(answers.thresholds) - np.log1p(-answers.thresholds)
        outputs = [probabilities.info(n_classes), logits.op("GreaterOrEqual", least, name="labels").info(n_classes)]
        if answers.least_odds is not None:
            least = np.maximum(least, answers.least_odds)
            outputs.append(logits.op("GreaterOrEqual", least, name="accepted").info(n_classes))
        logits.graph.output.extend(outputs)
        return
    probabilities = logits.op("Softmax", axis=1, name="probabilities")
    label = logits.op("ArgMax", axis=1, keepdims=0, name="label" if answers.tree is None else None)
    outputs, accepted, node = [], None, label
    if answers.least_odds is not None and answers.tree is not None:
        node, accepted = answer(logits, probabilities, label, answers.tree, answers.least_odds)
    elif answers.least_odds is not None:
        accepted = odds_of_largest(logits, n_classes) >= answers.least_odds
    if answers.unknown is not None:
        score = unknown_score(answers.unknown, embeddings).op("Identity", name="unknown")
        rejected = score.op("Greater", answers.threshold, name="rejected")
        outputs += [score.info(), rejected.info()]
        accepted = None if accepted is None else accepted & rejected.op("Not")
    if accepted is not None:
        outputs.insert(0, accepted.op("Identity", name="accepted").info())  # third, with unknown pictures or without
        label = label if answers.tree is None else accepted.op("Where", node, label, name="label")
    logits.graph.output.extend([probabilities.info(n_classes), label.info(), *outputs])
