"""Opening an engine folder: check it against its manifest, choose what executes it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from iosr_fast.encoders.encoder import Encoder
from iosr_fast.encoders.runtimes.batched import BatchedEncoder
from iosr_fast.encoders.runtimes.engine_manifest import EngineManifest
from iosr_fast.encoders.runtimes.onnxruntime import FILE as ONNX_FILE
from iosr_fast.encoders.runtimes.onnxruntime import WEIGHTS, OnnxRuntimeEncoder
from iosr_fast.encoders.runtimes.openvino import OpenVINOEncoder
from iosr_fast.encoders.runtimes.tensorrt import EXTRAS, TensorRTEncoder
from iosr_fast.encoders.runtimes.torch import FILE as TORCH_FILE
from iosr_fast.encoders.runtimes.torch import TorchEncoder
from iosr_fast.utils import machine
from iosr_fast.utils.schema import check_files, read_facts
from iosr_fast.utils.verified_folder import VerifiedFolder, open_verified

RUNTIMES = ("tensorrt", "tensorrt_rtx", "onnxruntime", "openvino", "torch")  # best first
ENGINE_KIND = "engine"
log = logging.getLogger(__name__)


def open_engine(
    folder: str | Path | VerifiedFolder,
    runtime: str = "auto",
    verify: bool = True,
    threads: int | None = None,
    buckets: Iterable[int] | None = None,
) -> Encoder:
    """Open an engine folder of tools/build_engine.py, or one that is held and was checked.

    "auto" takes TensorRT or TensorRT-RTX where the engine has plans for it, its module is installed and PyTorch sees a
    GPU, else OpenVINO where the engine was built for it and it is installed, else ONNX Runtime, OpenVINO, PyTorch; what
    it chose, and why not the others, is logged. Where the plans are for another GPU or version of the runtime, one is
    built from encoder.onnx, once, in the user's cache (plans.open_plan). `verify` compares every file's SHA-256 with
    the manifest. `threads` is for ONNX Runtime, OpenVINO and PyTorch on the CPU; `buckets`, the batch sizes that are
    executed, for GPUs (None: powers of two).

    Raises FileNotFoundError for a missing file, ValueError for a damaged or foreign one and for a runtime the engine
    was not built for, RuntimeError where nothing here can execute it, ImportError for a missing package.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"expected threads >= 1, got {threads}")
    if isinstance(folder, VerifiedFolder):
        held = folder
    else:
        held = open_verified(folder, ENGINE_KIND, verify)
        check_engine(held)
        held.check()
    manifest = held.manifest
    runtime = choose_runtime(runtime, _runtimes_of(manifest), manifest["runtime"])
    if runtime in ("onnxruntime", "openvino") and manifest["precision"] in ("fp16", "fp8"):
        log.warning("an %s engine gains nothing on a CPU, which computes in fp32; build another", manifest["precision"])
    if runtime == "onnxruntime" and manifest["precision"] == "bf16":
        log.warning("ONNX Runtime computes this bf16 engine in fp32; OpenVINO computes it in bf16")

    def opener(opened: Path) -> BatchedEncoder:
        if runtime == "openvino":
            return OpenVINOEncoder(opened, manifest, threads)
        if runtime == "onnxruntime":
            return OnnxRuntimeEncoder(opened, manifest, threads)
        if runtime == "torch":
            return TorchEncoder(opened, manifest, threads, buckets=buckets)
        return TensorRTEncoder(opened, manifest, runtime, buckets)

    encoder = held.open_with(opener)
    encoder.source = held
    return encoder


def check_engine(held: VerifiedFolder) -> EngineManifest:
    """The manifest of a held engine. Raises ValueError for a field or a file that no engine has."""
    facts = read_facts(held, EngineManifest)
    check_files(held, set(facts.plans), {ONNX_FILE, WEIGHTS, TORCH_FILE})
    return facts


def choose_runtime(
    runtime: str = "auto", built_for: Collection[str] | None = None, preferred: str | None = None
) -> str:
    """A runtime's name for "auto", the same name for any other.

    `built_for`: what an engine has files for; None where it is still to be built. `preferred`: the runtime of a CPU
    that "auto" takes before the others. Raises ValueError for an unknown name
    and for one that is not in `built_for`, RuntimeError where "auto" finds none.
    """
    if runtime not in ("auto", *RUNTIMES):
        raise ValueError(f"expected runtime 'auto' or one of {list(RUNTIMES)}, got {runtime!r}")
    if runtime != "auto":
        if built_for is not None and runtime not in built_for:
            raise ValueError(
                f"expected one of the runtimes this engine was built for, {sorted(built_for)}, got {runtime!r}; "
                f"tools/build_engine.py --runtime {runtime} builds one for it"
            )
        return runtime
    refusals: dict[str, str] = {}
    for name in sorted(RUNTIMES, key=lambda name: (name not in EXTRAS, name != preferred)):
        reason = (
            "this engine was not built for it"
            if built_for is not None and name not in built_for
            else unavailable_reason(name)
        )
        if reason is None:
            log.info("runtime %s chosen; refused: %s", name, refusals or "none")
            return name
        refusals[name] = reason
    raise RuntimeError(f"no runtime for this engine: {'; '.join(f'{name}: {why}' for name, why in refusals.items())}")


def check_runtime(runtime: str) -> None:
    """Raise ValueError for an unknown name, ImportError for the runtime of a CPU whose package is missing."""
    if runtime == "auto":
        return
    reason = unavailable_reason(choose_runtime(runtime))
    if reason is not None and runtime not in EXTRAS:
        raise ImportError(reason)


def _runtimes_of(manifest: dict[str, Any]) -> set[str]:
    by_file = {ONNX_FILE: ("onnxruntime", "openvino"), TORCH_FILE: ("torch",)}
    held = {name for file, names in by_file.items() if file in manifest["files"] for name in names}
    return held | {facts["runtime"] for facts in manifest["plans"].values()}


def unavailable_reason(runtime: str) -> str | None:
    """Why this runtime can't be used here, or None."""
    extra = EXTRAS.get(runtime, {"onnxruntime": "cpu", "openvino": "openvino", "torch": "train"}.get(runtime))
    if find_spec(runtime) is None:
        return f"{runtime} is not installed (pip install 'iosr_fast[{extra}]')"
    if runtime not in EXTRAS:
        return None
    if find_spec("torch") is None:
        return "PyTorch, whose tensors are its buffers, is not installed"
    gpu = machine.this_gpu()
    if gpu is None:
        return "PyTorch sees no NVIDIA GPU"
    if runtime == "tensorrt_rtx" and (gpu.capability < (8, 0) or gpu.capability[0] in (9, 10)):
        return f"TensorRT-RTX plans are for GeForce and RTX GPUs from compute capability 8.0 on, not for {gpu}"
    return None
