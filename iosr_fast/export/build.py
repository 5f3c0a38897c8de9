"""From a source to an engine folder, checked before it is written; encoders.engine_folder has its files.

An engine for TensorRT has the ONNX files too, so it opens on machines with another GPU or none.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import asdict

from iosr_fast.encoders.engine_folder import (
    ENGINE_KIND,
    EXTRAS,
    ONNX_FILE,
    ONNX_RUNTIMES,
    PLAIN_FILE,
    target,
    unavailable_reason,
)
from iosr_fast.encoders.runtimes import ENCODERS
from iosr_fast.encoders.runtimes.batched import BatchedEncoder
from iosr_fast.encoders.runtimes.tensorrt import TensorRTEncoder, build_plan
from iosr_fast.export.check import check, checked_pictures
from iosr_fast.export.onnx import write_plain_graph
from iosr_fast.export.precision import default_batch, engine_fingerprint
from iosr_fast.export.quantize.calibration import quantisation
from iosr_fast.export.quantize.encoder import quantize_onnx
from iosr_fast.export.source import Source
from iosr_fast.sealed.folders import new_folder
from iosr_fast.sealed.manifest import write_manifest
from iosr_fast.utils.machine import cpu_model, package_version, this_gpu
from iosr_fast.utils.numbers import check_integer

log = logging.getLogger(__name__)
LAYOUT = 4  # increases when an engine with the same embeddings has other files


def write_engine(
    source: Source,
    out: str | Path,
    runtime: str = "auto",
    precision: str = "fp32",
    max_batch: int | None = None,
    pictures: np.ndarray | None = None,
) -> dict[str, Any]:
    """Build an engine folder, atomically, and return its manifest. `max_batch` None is that of the source if it is an
    engine, and else default_batch.

    `pictures` uint8 (N, S, S, 3) should resemble those to be classified: "int8" and "fp8" need them, to measure ranges
    (quantize.encoder). Embeddings of some of them, and but for these precisions of random pictures, are compared with
    the source's own before `out` is written. What 8 bits and smaller pictures cost in accuracy only labelled pictures
    can say.

    Raises ValueError for a precision that the runtime doesn't support, 8 bits for an encoder of convolutions alone, and
    missing calibration pictures; ArithmeticError for an error above 1e-4 (fp32) or a cosine below 0.999 (fp16, bf16) or
    0.99 (int8, fp8); RuntimeError with TensorRT's message.
    """
    started = time.perf_counter()
    most = None if max_batch is None else check_integer("max_batch", max_batch, 1, 1 << 16)
    runtime = source.check(runtime, precision)
    if not source.fused and runtime in ONNX_RUNTIMES and this_gpu() is not None:
        log.warning("%s runs on the CPU: %s needs TensorRT for the GPU here", runtime, source.name)
    size = source.geometry.size
    quantised = quantisation(size, runtime, precision, pictures)
    shown = checked_pictures(size, pictures, precision)
    truth = {kind: (pixels, source.truth(pixels)) for kind, pixels in shown.items()}
    facts, gpu = source.facts(), None if runtime in ONNX_RUNTIMES else this_gpu()
    facts |= {
        "width": next(iter(truth.values()))[1][0].shape[1],
        "runtime": runtime,
        "precision": precision,
        "max_batch": most or facts.get("max_batch") or default_batch(runtime),
        "fingerprint": engine_fingerprint(
            facts["clip_fingerprint"], facts["adapter_fingerprint"], precision, quantised, facts.get("tokens")
        ),
        "versions": facts["versions"] | {name: package_version(name) for name in ("onnx", runtime)},
        "device": cpu_model() if gpu is None else gpu.name,
    }
    with new_folder(out, ENGINE_KIND) as folder, tempfile.TemporaryDirectory() as temporary:
        exported = folder if quantised is None else Path(temporary)
        facts |= source.write(exported, runtime, precision)
        if quantised is not None:
            assert pictures is not None
            report = quantize_onnx(exported / ONNX_FILE, folder / ONNX_FILE, pictures, quantised["form"])
            facts["quantised"] = quantised | report
        facts["plans"] = _write_forms(folder, runtime, precision, facts["max_batch"])
        facts["check"] = {
            name: None if encoder is None else check(encoder, truth, precision)
            for name, encoder in _open_forms(folder, facts)
        }
        facts["build_seconds"] = round(time.perf_counter() - started, 2)
        return write_manifest(folder, ENGINE_KIND, facts)


def _write_forms(folder: Path, runtime: str, precision: str, max_batch: int) -> dict[str, dict[str, Any]]:
    """Write what is made of encoder.onnx, its plain form and its plan for this machine; returns the plans."""
    if runtime == "torch":
        return {}
    write_plain_graph(folder)
    if runtime not in EXTRAS:
        return {}
    compiled = target(runtime)
    (folder / compiled.file).parent.mkdir(exist_ok=True)
    (folder / compiled.file).write_bytes(build_plan(folder / ONNX_FILE, runtime, max_batch))
    return {compiled.file: {**asdict(compiled), "precision": precision}}


def _open_forms(folder: Path, facts: dict[str, Any]) -> Iterator[tuple[str, BatchedEncoder | None]]:
    """The encoder of every form of an engine, one at a time in memory; None for a plan that no GPU here runs."""
    runtime = facts["runtime"]
    name = "onnxruntime" if runtime in EXTRAS else runtime
    yield name, ENCODERS[name](folder, facts)
    if (folder / PLAIN_FILE).is_file():
        yield f"{name}, {PLAIN_FILE}", ENCODERS[name](folder, facts, adapted=False)
    if runtime in EXTRAS:
        yield runtime, TensorRTEncoder(folder, facts, runtime) if unavailable_reason(runtime) is None else None
