"""The whole graph: pictures or pixels, the encoder of an engine, and what its embeddings are answered with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from iosr_fast.encoders.engine_folder import ONNX_FILE, PLAIN_FILE, WEIGHTS
from iosr_fast.exceptions import IosrFastError
from iosr_fast.export.one_file.logits import add_logits, odds_of_largest
from iosr_fast.export.one_file.nodes import Nodes
from iosr_fast.export.one_file.pixels import add_pixels
from iosr_fast.export.one_file.unknown import add_unknown
from iosr_fast.images.geometry import Geometry
from iosr_fast.methods.unknown import Unknown
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.sealed.verified_folder import VerifiedFolder
from iosr_fast.utils.require import require

if TYPE_CHECKING:
    from onnx import ModelProto

Source = Literal["picture", "pixels"]
PRECISIONS = ("fp32", "int8")
MOST_BYTES = 2_000_000_000  # protobuf's limit is 2 GiB


@dataclass(frozen=True)
class Answers:
    """What a file answers.

    plan        whose logits give probabilities and labels
    adapted     whether adapted embeddings are needed
    least_odds  the least log p / (1 - p) of an accepted label; None where no promise was asked for
    unknown     with the `threshold` above which a picture is rejected; None where none is
    """

    plan: ScoringPlan
    adapted: bool
    least_odds: float | None = None
    unknown: Unknown | None = None
    threshold: float = np.inf


def check_engine_graph(engine: VerifiedFolder | None) -> VerifiedFolder:
    """The engine. Raises IosrFastError where it has no ONNX graph, another precision, or more than a file can hold."""
    if engine is None:
        raise IosrFastError(
            "expected a classifier on an encoder of an engine folder, got one without, as of FewShotHead: an encoder "
            "of your own, or embeddings, can't be exported; fit a Classifier on a CLIP"
        )
    if ONNX_FILE not in engine.files:
        raise IosrFastError(
            f"expected an engine with an ONNX graph, got one for {engine.manifest['runtime']}: build it with "
            "runtime='onnxruntime'"
        )
    if (precision := engine.manifest["precision"]) not in PRECISIONS:
        raise IosrFastError(f"expected an engine in {' or '.join(PRECISIONS)}, got {precision}: fit in one of these")
    _check_size(sum(engine.manifest["files"][name]["bytes"] for name in (ONNX_FILE, WEIGHTS) if name in engine.files))
    return engine


def _check_size(n_bytes: int) -> None:
    if n_bytes > MOST_BYTES:
        raise IosrFastError(
            f"expected a model of at most {MOST_BYTES / 1e9:.1f} GB, which one ONNX file holds, got one of "
            f"{n_bytes / 1e9:.1f} GB: take a smaller CLIP, or precision='int8'"
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
    nodes = Nodes(graph)
    if source == "picture":
        graph.input.append(nodes.declare("picture", np.uint8, "batch", "height", "width", 3))
        pixels = add_pixels(nodes, "picture", geometry)
        for node in encoder:
            node.input[:] = [pixels if name == "pixels" else name for name in node.input]
    else:
        graph.input.append(nodes.declare("pixels", np.uint8, "batch", geometry.size, geometry.size, 3))
    graph.node.extend(encoder)
    add_answers(nodes, answers, {"plain": "plain", "adapted": "adapted"})
    graph.name = "iosr_fast"
    _check_size(sum(len(tensor.raw_data) for tensor in graph.initializer))
    return model


def add_answers(nodes: Nodes, answers: Answers, embeddings: Mapping[str, str]) -> None:
    """The outputs of the graph, computed from `embeddings`, which are names of "plain" and "adapted"."""
    n_classes = answers.plan.n_classes
    logits = add_logits(nodes, answers.plan, embeddings)
    nodes.add("Softmax", logits, axis=1, output="probabilities")
    nodes.add("ArgMax", logits, axis=1, keepdims=0, output="label")
    outputs: dict[str, Any] = {
        "probabilities": (np.float32, "batch", n_classes),
        "label": (np.int64, "batch"),
    }
    accepted = None
    if answers.least_odds is not None:
        odds = odds_of_largest(nodes, logits, n_classes)
        accepted = nodes.add("GreaterOrEqual", odds, answers.least_odds)
        outputs["accepted"] = (np.bool_, "batch")
    if answers.unknown is not None:
        nodes.add("Identity", add_unknown(nodes, answers.unknown, embeddings), output="unknown")
        nodes.add("Greater", "unknown", answers.threshold, output="rejected")
        if accepted is not None:
            accepted = nodes.add("And", accepted, nodes.add("Not", "rejected"))
        outputs |= {"unknown": (np.float32, "batch"), "rejected": (np.bool_, "batch")}
    if accepted is not None:
        nodes.add("Identity", accepted, output="accepted")
    nodes.graph.output.extend(nodes.declare(name, *form) for name, form in outputs.items())
