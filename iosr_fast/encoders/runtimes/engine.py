"""Opening an engine folder: check it against its manifest, choose the runtime."""

from __future__ import annotations

import logging
import platform
from collections.abc import Collection, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from iosr_fast.encoders.encoder import Encoder
from iosr_fast.encoders.runtimes.batched import BatchedEncoder
from iosr_fast.encoders.runtimes.onnxruntime import FILE as ONNX_FILE
from iosr_fast.encoders.runtimes.onnxruntime import PLAIN_FILE, WEIGHTS, OnnxRuntimeEncoder
from iosr_fast.encoders.runtimes.openvino import OpenVINOEncoder
from iosr_fast.encoders.runtimes.tensorrt import EXTRAS, TensorRTEncoder
from iosr_fast.encoders.runtimes.torch import FILE as TORCH_FILE
from iosr_fast.encoders.runtimes.torch import TorchEncoder
from iosr_fast.exceptions import IosrFastError, MissingPackageError, UnavailableError
from iosr_fast.images.geometry import Geometry, Interpolation, ResizeMode
from iosr_fast.utils import machine
from iosr_fast.utils.numbers import check_integer
from iosr_fast.utils.schema import (
    Above0,
    Channels,
    Deviations,
    Entry,
    Fingerprint,
    Level,
    Name,
    Natural,
    Positive,
    Sha256,
    Size,
    Strict,
    check_files,
    read_facts,
)
from iosr_fast.utils.verified_folder import VerifiedFolder, open_verified

RUNTIMES = ("tensorrt", "tensorrt_rtx", "openvino", "onnxruntime", "torch")  # choose_runtime has the order of "auto"
ONNX_RUNTIMES = ("openvino", "onnxruntime")  # execute encoder.onnx on a CPU: an engine of one is an engine of the other
SEVEN_BITS = 3  # the version of the quantiser from which int8 weights have seven bits
X86 = ("x86_64", "AMD64")  # platform.machine() where OpenVINO comes first
ENGINE_KIND = "engine"
log = logging.getLogger(__name__)


class CompiledPlan(Struct, frozen=True, kw_only=True):
    """A plan of TensorRT. Further fields differ between versions of its builder."""

    runtime: Literal["tensorrt", "tensorrt_rtx"]
    version: Name
    gpu: Name | None
    compute_capability: Annotated[str, Meta(pattern=r"^[0-9]+\.[0-9]+\Z")] | None
    profile: dict[str, Positive] = {}


class EngineManifest(Strict, frozen=True, kw_only=True):
    """The manifest of an engine folder (iosr_fast.export)."""

    schema: Literal[2]
    kind: str
    files: dict[str, Entry]
    checksum: Sha256
    model: Name
    image_size: Size
    width: Size
    mean: Channels
    std: Deviations
    interpolation: Interpolation
    logit_scale: Above0
    clip_fingerprint: Fingerprint
    adapter: Literal["trained", "random"] | None
    adapter_fingerprint: Fingerprint | None
    first_adapted_block: Natural | None
    bottleneck: Positive | None
    runtime: Literal["tensorrt", "tensorrt_rtx", "onnxruntime", "openvino", "torch"]
    precision: Literal["fp32", "fp16", "bf16", "int8", "fp8"]
    max_batch: Size
    fingerprint: Fingerprint
    export_version: Positive
    opset: Positive | None
    # None: an encoder that is not fused (clip.plain_encoder).
    dual_encoder: dict[str, int | float | str | bool | list[list[int]] | None] | None
    versions: dict[str, str | None]
    device: Name
    plans: dict[str, CompiledPlan]
    check: dict[str, Any]
    build_seconds: Annotated[float, Meta(ge=0)]
    quantised: dict[str, Any] | None = None
    tokens: dict[str, Positive] | None = None
    resize_mode: ResizeMode = "shortest"
    fill: Level = 0

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.image_size, self.resize_mode, self.interpolation, self.fill)


def open_engine(
    folder: str | Path | VerifiedFolder,
    runtime: str = "auto",
    verify: bool = True,
    threads: int | None = None,
    buckets: Iterable[int] | None = None,
    runs: int = 1,
    adapted: bool = True,
) -> Encoder:
    """Open an engine folder of `iosr-fast build-engine`, or a verified folder that was checked already.

    "auto" takes the first runtime that the engine has files for and that works here: TensorRT or TensorRT-RTX on a GPU;
    PyTorch on a GPU; OpenVINO on an x86-64 CPU; ONNX Runtime, OpenVINO, PyTorch. The choice is logged, with the reason
    against each of the others. If the engine's plans are for another GPU or version, one is built from encoder.onnx,
    once, in the user's cache (plans.open_plan). `verify` compares every file's SHA-256 with the manifest. `runs`
    threads may execute the encoder at once, with one copy of its weights, where the runtime can (`Encoder.parallel`);
    each run uses `threads` cores of the CPU. `buckets`, the executed batch sizes, apply to GPUs (None: powers of two).

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
    if runtime in ONNX_RUNTIMES and manifest["precision"] in ("fp16", "fp8"):
        log.warning(
            "an %s engine is no faster on a CPU, which computes in fp32; build one in fp32 or int8",
            manifest["precision"],
        )
    if runtime == "onnxruntime" and manifest["precision"] == "bf16":
        log.warning("ONNX Runtime computes this bf16 engine in fp32; OpenVINO computes it in bf16")

    if runtime in ONNX_RUNTIMES and (manifest.get("quantised") or {}).get("version", SEVEN_BITS) < SEVEN_BITS:
        log.warning(
            "the engine in %s has int8 weights of 8 bits, whose sums overflow on processors without VNNI: embeddings "
            "may be wrong; build it again, with weights of 7 bits",
            source.folder,
        )
    if not adapted and not has_plain_form(manifest, runtime):
        if manifest["first_adapted_block"] is not None:
            log.info("the engine in %s has no plain form for %s, so both streams run", source.folder, runtime)
        adapted = True

    def open_folder(path: Path) -> BatchedEncoder:
        if runtime == "openvino":
            return OpenVINOEncoder(path, manifest, threads, runs, adapted)
        if runtime == "onnxruntime":
            return OnnxRuntimeEncoder(path, manifest, threads, runs, adapted)
        if runtime == "torch":
            cores = None if threads is None else threads * runs  # it executes one run at a time
            return TorchEncoder(path, manifest, cores, buckets=buckets, adapted=adapted)
        return TensorRTEncoder(path, manifest, runtime, buckets)

    encoder = source.open_with(open_folder)
    encoder.source = source
    return encoder


_OLD_FILES = ("projections.safetensors",)  # of version 0.2, which nothing reads


def check_engine(source: VerifiedFolder) -> EngineManifest:
    """The manifest of an engine. Raises ValueError for a missing, invalid or unknown field, or an unknown file."""
    facts = read_facts(source, EngineManifest)
    check_files(source, set(facts.plans), {ONNX_FILE, PLAIN_FILE, WEIGHTS, TORCH_FILE, *_OLD_FILES})
    return facts


def has_plain_form(manifest: dict[str, Any], runtime: str) -> bool:
    """Whether an engine can compute the plain embedding alone in this runtime.

    An engine without an adapter computes nothing else. A plan of TensorRT has both streams, and so has an engine that
    was built before there was a plain form.
    """
    if manifest["first_adapted_block"] is None:
        return False
    return runtime == "torch" or (runtime in ONNX_RUNTIMES and PLAIN_FILE in manifest["files"])


def choose_runtime(runtime: str = "auto", built_for: Collection[str] | None = None) -> str:
    """Resolve "auto" to a runtime that works here (in the order of `open_engine`); any other name is returned.

    `built_for`: the runtimes that the engine has files for; None before it is built. Raises ValueError for an unknown
    name and for one that is not in `built_for`, RuntimeError if "auto" finds none.
    """
    if runtime not in ("auto", *RUNTIMES):
        raise IosrFastError(f"expected runtime 'auto' or one of {list(RUNTIMES)}, got {runtime!r}")
    if runtime != "auto":
        if built_for is not None and runtime not in built_for:
            raise IosrFastError(
                f"expected one of the runtimes this engine was built for, {sorted(built_for)}, got {runtime!r}; "
                f"`iosr-fast build-engine --runtime {runtime}` builds one for it"
            )
        return runtime
    candidates = RUNTIMES if built_for is None else [name for name in RUNTIMES if name in built_for]
    # this_gpu imports torch, so only engines that torch may execute ask for it.
    torch_on_gpu = "torch" in candidates and machine.this_gpu() is not None
    refusals = {name: "this engine was not built for it" for name in RUNTIMES if name not in candidates}
    on_cpu = ONNX_RUNTIMES if platform.machine() in X86 else ONNX_RUNTIMES[::-1]
    order = [*EXTRAS, "torch", *on_cpu] if torch_on_gpu else [*EXTRAS, *on_cpu, "torch"]
    for name in sorted(candidates, key=order.index):
        reason = unavailable_reason(name)
        if reason is None:
            log.info("runtime %s chosen; unavailable: %s", name, refusals or "none")
            return name
        refusals[name] = reason
    raise UnavailableError(
        f"no runtime for this engine: {'; '.join(f'{name}: {why}' for name, why in refusals.items())}"
    )


def check_runtime(runtime: str) -> None:
    """Raise ValueError for an unknown name and ImportError for a CPU runtime whose package is missing."""
    if runtime == "auto":
        return
    reason = unavailable_reason(choose_runtime(runtime))
    if reason is not None and runtime not in EXTRAS:
        raise MissingPackageError(reason)


def runtimes_of(manifest: dict[str, Any]) -> set[str]:
    """The runtimes that an engine has files for."""
    by_file = {ONNX_FILE: ONNX_RUNTIMES, TORCH_FILE: ("torch",)}
    runtimes = {name for file, names in by_file.items() if file in manifest["files"] for name in names}
    return runtimes | {facts["runtime"] for facts in manifest["plans"].values()}


def unavailable_reason(runtime: str) -> str | None:
    """Why this runtime can't be used here, or None."""
    extra = EXTRAS.get(runtime, "cpu")
    if find_spec(runtime) is None:
        return f"{runtime} is not installed (pip install 'iosr_fast[{extra}]')"
    if runtime not in EXTRAS:
        return None
    if find_spec("torch") is None:
        return "PyTorch, which provides the buffers, is not installed"
    gpu = machine.this_gpu()
    if gpu is None:
        return "PyTorch sees no NVIDIA GPU"
    if runtime == "tensorrt_rtx" and (gpu.capability < (8, 0) or gpu.capability[0] in (9, 10)):
        return f"TensorRT-RTX plans are for GeForce and RTX GPUs from compute capability 8.0 on, not for {gpu}"
    return None
