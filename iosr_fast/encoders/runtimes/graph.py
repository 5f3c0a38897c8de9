"""A graph from "pixels" to outputs of any name, like a classifier in one file, executed as encoders are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from iosr_fast.encoders.encoder import Encoder
from iosr_fast.encoders.engine_folder import EXTRAS, target
from iosr_fast.encoders.runtimes.gpu import GpuRuns
from iosr_fast.encoders.runtimes.onnxruntime import open_session
from iosr_fast.encoders.runtimes.openvino import compile_graph
from iosr_fast.encoders.runtimes.tensorrt import LoadedPlan, build_plan
from iosr_fast.sealed.manifest import sha256

# Pixels uint8 (B, S, S, 3) to an array (B, ...) for each output.
Graph: TypeAlias = Callable[[np.ndarray], dict[str, np.ndarray]]


def open_graph(file: Path, outputs: Sequence[str], encoder: Encoder) -> Graph:
    """The graph in an ONNX file, executed as `encoder`, of an engine with an ONNX graph, executes its own: in the same
    runtime, by as many threads, in batches of at most its `max_batch`. TensorRT builds a plan first, which it runs."""
    threads, most = encoder.threads, encoder.max_batch
    if encoder.runtime in EXTRAS:
        plan = build_plan(file, encoder.runtime, most)
        return graph_of_plan(file, plan, encoder.runtime, outputs, encoder.blank(most).shape)
    if encoder.runtime == "openvino":
        request = compile_graph(file, threads).create_infer_request()

        def infer(pixels: np.ndarray) -> list[np.ndarray]:
            results = request.infer({"pixels": pixels})
            return [results[name] for name in outputs]  # copies, as infer() makes them

        return _by_name(infer, outputs, most)
    session = open_session(file, threads)
    return _by_name(lambda pixels: session.run(list(outputs), {"pixels": pixels}), outputs, most)


def graph_of_plan(file: Path, plan: bytes, runtime: str, outputs: Sequence[str], shape: tuple[int, ...]) -> Graph:
    """A plan that was built here from the graph in an ONNX file, on the current GPU, for batches of at most the `shape`
    (B, S, S, 3)."""
    loaded = LoadedPlan(plan, file.with_suffix(".plan"), target(runtime), outputs, shape[0], sha256(file))
    runs = GpuRuns(loaded.launch, shape)
    return _by_name(lambda pixels: [result.cpu().numpy() for result in runs.run(pixels)], outputs, shape[0])


def _by_name(run: Callable[[np.ndarray], Sequence[np.ndarray]], outputs: Sequence[str], most: int) -> Graph:
    """`run`, which takes at most `most` pictures and gives the outputs in their order, for any number of pictures."""

    def run_all(pixels: np.ndarray) -> dict[str, np.ndarray]:
        parts = [run(np.ascontiguousarray(pixels[at : at + most])) for at in range(0, len(pixels), most)]
        return dict(zip(outputs, map(np.concatenate, zip(*parts, strict=True)), strict=True))

    return run_all
