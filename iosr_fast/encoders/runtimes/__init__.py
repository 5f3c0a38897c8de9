"""Open an engine folder in ONNX Runtime, OpenVINO, PyTorch, TensorRT or TensorRT-RTX."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from iosr_fast.encoders.encoder import Encoder
from iosr_fast.encoders.engine_folder import (
    ENGINE_KIND,
    EXTRAS,
    ONNX_RUNTIMES,
    check_engine,
    choose_runtime,
    has_plain_form,
    runtimes_of,
)
from iosr_fast.encoders.runtimes.batched import BatchedEncoder
from iosr_fast.encoders.runtimes.onnxruntime import OnnxRuntimeEncoder
from iosr_fast.encoders.runtimes.openvino import OpenVINOEncoder
from iosr_fast.encoders.runtimes.tensorrt import TensorRTEncoder
from iosr_fast.encoders.runtimes.torch import TorchEncoder
from iosr_fast.sealed.verified_folder import VerifiedFolder, open_verified
from iosr_fast.utils.numbers import check_integer

ENCODERS: dict[str, Any] = {"onnxruntime": OnnxRuntimeEncoder, "openvino": OpenVINOEncoder, "torch": TorchEncoder}
log = logging.getLogger(__name__)


def open_engine(
    folder: str | Path | VerifiedFolder,
    runtime: str = "auto",
    verify: bool = True,
    threads: int | None = None,
    runs: int = 1,
    adapted: bool = True,
) -> Encoder:
    """Open an engine folder of `iosr-fast build-engine`, or a verified folder that was checked already.

    "auto" takes the first runtime that the engine has files for and that works here: TensorRT or TensorRT-RTX on a GPU;
    PyTorch on a GPU; OpenVINO on an x86-64 CPU; ONNX Runtime, OpenVINO, PyTorch. The choice is logged, with the reason
    against each of the others. If the engine's plans are for another GPU or version, one is built from encoder.onnx,
    once, in the user's cache (plan_cache). `verify` compares every file's SHA-256 with the manifest. `runs` threads may
    execute the encoder at once, with one copy of its weights, where the runtime can (`Encoder.parallel`); each run uses
    `threads` cores of the CPU.

    Without `adapted` the encoder computes the plain embedding only, equal up to rounding, where the engine can
    (`has_plain_form`); `Encoder.adapted` says whether it does.

    Raises FileNotFoundError for a missing file, ValueError for a damaged or foreign one and for a runtime that the
    engine was not built for, RuntimeError if no runtime here can execute it, ImportError for a missing package.

    >>> import numpy as np
    >>> from iosr_fast import Classifier
    >>> from iosr_fast.encoders.runtimes import open_engine
    >>> folder = Classifier("demo", runtime="onnxruntime").encoder.source.folder  # or one of `iosr-fast build-engine`
    >>> encoder = open_engine(folder, threads=1)
    >>> encoder.encode(np.zeros((1, 64, 64, 3), np.uint8)).plain.shape
    (1, 128)
    >>> open_engine(folder, threads=1, adapted=False).encode(np.zeros((1, 64, 64, 3), np.uint8)).adapted is None
    True
    """
    threads = None if threads is None else check_integer("threads", threads, 1)
    runs = check_integer("runs", runs, 1)
    if isinstance(folder, VerifiedFolder):
        source = folder
    else:
        source = open_verified(folder, ENGINE_KIND, verify)
        check_engine(source)
        source.check()
    manifest = source.manifest
    runtime = choose_runtime(runtime, runtimes_of(manifest))
    if runtime in ONNX_RUNTIMES and (manifest.get("quantised") or {}).get("version", 3) < 3:
        log.warning(
            "the engine in %s has int8 weights of 8 bits, whose sums overflow on processors without VNNI: embeddings "
            "may be wrong; build it again, with weights of 7 bits",
            source.folder,
        )
    adapted = adapted or not has_plain_form(manifest, runtime)

    if runtime in EXTRAS:
        encoder: BatchedEncoder = source.open_with(lambda path: TensorRTEncoder(path, manifest, runtime))
    else:
        encoder = source.open_with(lambda path: ENCODERS[runtime](path, manifest, threads, runs, adapted))
    encoder.source = source
    return encoder
