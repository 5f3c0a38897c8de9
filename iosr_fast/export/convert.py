"""From an engine in fp32 to one in another precision, without torch, and the last steps of every ONNX engine."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.encoders.runtimes.batched import BatchedEncoder
from iosr_fast.encoders.runtimes.engine import ENGINE_KIND, ONNX_RUNTIMES, check_engine, unavailable_reason
from iosr_fast.encoders.runtimes.onnxruntime import FILE as ONNX_FILE
from iosr_fast.encoders.runtimes.onnxruntime import PLAIN_FILE, OnnxRuntimeEncoder
from iosr_fast.encoders.runtimes.openvino import OpenVINOEncoder
from iosr_fast.encoders.runtimes.tensorrt import EXTRAS, TensorRTEncoder, build_plan, target
from iosr_fast.exceptions import IosrFastError
from iosr_fast.export.engine_precision import QUANTISED, choose_builder, graph_precision, quantised_by
from iosr_fast.export.export_check import check, checked_pictures
from iosr_fast.export.plain_graph import write_plain_graph
from iosr_fast.utils.folders import new_folder
from iosr_fast.utils.machine import cpu_model, package_version, this_gpu
from iosr_fast.utils.manifest import OWN_FIELDS, write_manifest
from iosr_fast.utils.verified_folder import VerifiedFolder, open_verified

EXPORT_VERSION = 1  # increases when the same weights give other embeddings


def fingerprint_of(
    clip_fingerprint: str,
    adapter_fingerprint: str | None,
    precision: str,
    quantised: dict[str, Any] | None = None,
    tokens: dict[str, int] | None = None,
) -> str:
    """SHA-256 over CLIP, adapter, precision, export version, quantisation and `tokens` (as in the manifest).

    It is equal for all runtimes that compute the same embeddings, so that they share cached keys.
    """
    parts = [clip_fingerprint, adapter_fingerprint or "", precision, str(EXPORT_VERSION)]
    if quantised is not None:
        parts.append(json.dumps(quantised, sort_keys=True))
    if tokens is not None:
        parts.append(json.dumps({"tokens": tokens}, sort_keys=True))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def convert_engine(
    source: str | Path | VerifiedFolder,
    out: str | Path,
    runtime: str,
    precision: str,
    calibration: np.ndarray | None = None,
) -> dict[str, Any]:
    """Write an fp32 engine with encoder.onnx to `out` in another precision or for another runtime; returns its
    manifest, with the fingerprint that write_engine gives.

    `calibration` uint8 (N, S, S, 3), N >= 8, for "int8" and "fp8". Before anything is written, the embeddings of random
    pictures (not for "int8" and "fp8") and of some of `calibration` are compared with those of `source`.

    Raises ValueError for an engine of another precision or without encoder.onnx, for a precision whose graph is fp16
    (it is exported from the CLIP: write_engine), and as write_engine does; ArithmeticError for embeddings that are off.
    """
    verified = source if isinstance(source, VerifiedFolder) else open_verified(source, ENGINE_KIND)
    manifest, engine = verified.manifest, check_engine(verified)
    started = time.perf_counter()
    fused = engine.dual_encoder is not None
    runtime = choose_builder(runtime, precision, fused)
    if engine.precision != "fp32" or ONNX_FILE not in verified.files:
        raise IosrFastError(
            f"expected an engine in fp32 with {ONNX_FILE} to convert, got one in {engine.precision} with "
            f"{sorted(verified.files)}; `iosr-fast build-engine` builds one from the CLIP"
        )
    if runtime == "torch" or graph_precision(precision, runtime, fused) != "fp32":
        raise IosrFastError(
            f"expected a precision whose graph is that of fp32, got {precision} for {runtime}, which is exported from "
            f"the CLIP: iosr-fast build-engine --precision {precision} --runtime {runtime}"
        )
    quantised = quantised_by(engine.image_size, runtime, precision, calibration)
    facts = {name: value for name, value in manifest.items() if name not in (*OWN_FIELDS, "quantised")} | {
        "runtime": runtime,
        "precision": precision,
        "fingerprint": fingerprint_of(
            engine.clip_fingerprint, engine.adapter_fingerprint, precision, quantised, engine.tokens
        ),
        "versions": manifest["versions"] | {name: package_version(name) for name in ("onnx", runtime)},
        "device": device_of(runtime),
        "plans": {},
        "check": {},
    }
    pictures = checked_pictures(engine.image_size, calibration, noise=precision not in QUANTISED)
    encoder = open_engine(verified)
    rows = {kind: encoder.encode(pixels) for kind, pixels in pictures.items()}
    names = ("plain", "adapted") if encoder.adapted else ("plain",)
    truth = {kind: tuple(getattr(each, name) for name in names) for kind, each in rows.items()}
    with new_folder(out, ENGINE_KIND) as folder, tempfile.TemporaryDirectory() as temporary:
        exported = folder if quantised is None else Path(temporary)
        for name in verified.files:
            if "/" not in name:  # not the plans
                verified.copy(name, exported / name)
        return finish_engine(folder, facts, exported / ONNX_FILE, quantised, calibration, pictures, truth, started)


def finish_engine(
    folder: Path,
    facts: dict[str, Any],
    exported: Path,
    quantised: dict[str, Any] | None,
    calibration: np.ndarray | None,
    pictures: dict[str, np.ndarray],
    truth: dict[str, tuple[np.ndarray, ...]],
    started: float,
) -> dict[str, Any]:
    """Quantise the file `exported` into `folder` (where it is already, unless `quantised`), write its plain form,
    compile it, compare both with `truth` and write the manifest."""
    runtime, precision = facts["runtime"], facts["precision"]
    if quantised is not None:
        from iosr_fast.export.quantize import quantize_onnx

        assert calibration is not None
        report = quantize_onnx(exported, folder / ONNX_FILE, calibration, quantised["form"])
        facts["quantised"] = quantised | report
    has_plain = write_plain_graph(folder)
    if runtime in ONNX_RUNTIMES or find_spec("onnxruntime") is not None or this_gpu() is None:
        on_cpu = OpenVINOEncoder if runtime == "openvino" else OnnxRuntimeEncoder
        name = runtime if runtime in ONNX_RUNTIMES else "onnxruntime"
        facts["check"][name] = check(on_cpu(folder, facts), pictures, truth, precision)
        if has_plain:
            plain = on_cpu(folder, facts, adapted=False)
            facts["check"][f"{name}, {PLAIN_FILE}"] = check(plain, pictures, truth, precision)
    if runtime in EXTRAS:
        compiled = write_plan(folder, facts, runtime)
        facts["check"][runtime] = None if compiled is None else check(compiled, pictures, truth, precision)
    facts["build_seconds"] = round(time.perf_counter() - started, 2)
    return write_manifest(folder, ENGINE_KIND, facts)


def write_plan(folder: Path, facts: dict[str, Any], runtime: str) -> BatchedEncoder | None:
    """Compile encoder.onnx for this machine and add the plan to `facts`; returns its encoder if this GPU can run it."""
    plan_target = target(runtime)
    data, built = build_plan(folder / ONNX_FILE, runtime, facts["max_batch"])
    (folder / plan_target.file).parent.mkdir(exist_ok=True)
    (folder / plan_target.file).write_bytes(data)
    facts["plans"][plan_target.file] = {**plan_target.facts(), "precision": facts["precision"], **built}
    return TensorRTEncoder(folder, facts, runtime) if unavailable_reason(runtime) is None else None


def device_of(runtime: str) -> str:
    """What an engine for `runtime` is built on: the GPU, or for a CPU runtime the processor."""
    gpu = None if runtime in ONNX_RUNTIMES else this_gpu()
    return cpu_model() if gpu is None else gpu.name
