"""A fit as one plan of TensorRT: pixels in, what a Verdict says out, encoder and head in one engine."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import asdict

from iosr_fast.delivery.fitted import FittedClassifier
from iosr_fast.delivery.one_file import check_answers, check_file, one_file
from iosr_fast.encoders.engine_folder import EXTRAS, target, unavailable_reason
from iosr_fast.encoders.runtimes.graph import graph_of_plan
from iosr_fast.encoders.runtimes.tensorrt import build_plan
from iosr_fast.exceptions import IosrFastError
from iosr_fast.export.precision import default_batch
from iosr_fast.head.verdict import NONE_WITHHELD, Abstention
from iosr_fast.sealed.folders import new_folder
from iosr_fast.sealed.manifest import write_manifest
from iosr_fast.utils.numbers import check_integer

PLAN_KIND = "plan"
PLAN_FILE = "1/model.plan"


def plan_runtime(runtime: str) -> str:
    """The runtime to build a plan for: `runtime` itself, or for "auto" the one that works on the GPU here. Raises
    IosrFastError for others, and as `target` does where no plan can be built here."""
    usable = [name for name in EXTRAS if runtime == name or (runtime == "auto" and unavailable_reason(name) is None)]
    if not usable:
        raise IosrFastError(
            f"expected the runtime of a classifier's plan to be {' or '.join(EXTRAS)}, or auto on a GPU, got "
            f"{runtime}; `iosr-fast export` writes one ONNX file for all other runtimes"
        )
    target(usable[0])
    return usable[0]


def write_plan(
    fit: FittedClassifier,
    out: str | Path,
    runtime: str,
    max_batch: int | None = None,
    abstention: Abstention = NONE_WITHHELD,
) -> dict[str, Any]:
    """Build a plan for a `plan_runtime` from "pixels", uint8 (B, S, S, 3) with B of 1 to `max_batch` (None:
    default_batch), to the outputs of Classifier.export, and return its manifest.

    A plan has no place for class names, so `out` is a folder. It is a model in the layout of Triton Inference Server,
    whose repository it may be copied to; trtexec and programs load the plan in it by its path:

    1/model.plan   profile 0 is for one picture, profile 1 for more
    config.pbtxt   both profiles, without which Triton takes one picture at a time; of TensorRT only
    manifest.json  class names, promise, fingerprint of the encoder; `target`: the GPU and version that it runs with

    Before `out` is written, ONNX Runtime has answered noise by the graph as the classifier does, and so has the plan
    on a GPU that it runs on (`was_run`). This package never loads the folder: TensorRT refuses a plan of another
    version. Raises IosrFastError as Classifier.export does, UnavailableError with TensorRT's message, ArithmeticError
    for other answers.
    """
    max_batch = default_batch(runtime) if max_batch is None else check_integer("max_batch", max_batch, 1, 1 << 16)
    model = one_file(fit, abstention, "pixels")
    outputs = [output.name for output in model.graph.output]
    content = model.SerializeToString()
    check_file(fit, content, abstention, "pixels")
    shape = (max_batch, *fit.encoder.blank(1).shape[1:])
    with new_folder(out, PLAN_KIND) as folder, tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, "model.onnx")
        file.write_bytes(content)
        plan = build_plan(file, runtime, max_batch)
        if was_run := unavailable_reason(runtime) is None:
            run = graph_of_plan(file, plan, runtime, outputs, shape)
            for count in {1, min(max_batch, 3)}:  # of both profiles
                pixels = np.random.default_rng(count).integers(0, 256, (count, *shape[1:]), np.uint8)
                check_answers(run(pixels), fit, fit.encoder, pixels, abstention)
        (folder / PLAN_FILE).parent.mkdir()
        (folder / PLAN_FILE).write_bytes(plan)
        if runtime == "tensorrt":
            profiles = ", ".join(f'"{index}"' for index in range(min(max_batch, 2)))
            config = f'backend: "tensorrt"\ninstance_group [ {{ kind: KIND_GPU profile: [ {profiles} ] }} ]\n'
            (folder / "config.pbtxt").write_text(config)
        facts = {
            "target": asdict(target(runtime)),
            "max_batch": max_batch,
            "outputs": outputs,
            "was_run": was_run,
        }
        texts = {text.key: json.loads(text.value) for text in model.metadata_props}
        return write_manifest(folder, PLAN_KIND, facts | texts)
