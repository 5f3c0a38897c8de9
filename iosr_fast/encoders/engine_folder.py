"""An engine folder: its files, its manifest, and the runtimes that open it here.

manifest.json        EngineManifest, with the SHA-256 of every file
encoder.onnx         "pixels" uint8 (B, S, S, 3) -> "plain" and, with an adapter, "adapted", float32 (B, D)
encoder.weights      its tensors, which runtimes map into memory; small ones stay in encoder.onnx
plain.onnx           encoder.onnx without the adapted stream, on the same weights
encoder.safetensors  the weights for PyTorch, which needs no ONNX file
plans/*.plan         encoder.onnx as compiled by TensorRT or TensorRT-RTX, each for its `Target`
"""

from __future__ import annotations

import logging
import platform
import re
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from typing import Annotated, Any, Literal, get_args

from msgspec import Meta, Struct

from iosr_fast.exceptions import IosrFastError, MissingPackageError, UnavailableError
from iosr_fast.images.geometry import Geometry, Interpolation, ResizeMode
from iosr_fast.sealed.schema import (
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
from iosr_fast.sealed.verified_folder import VerifiedFolder
from iosr_fast.utils import machine
from iosr_fast.utils.require import require

ENGINE_KIND = "engine"
ONNX_FILE = "encoder.onnx"
WEIGHTS_SUFFIX = ".weights"
WEIGHTS = f"encoder{WEIGHTS_SUFFIX}"
PLAIN_FILE = "plain.onnx"
TORCH_FILE = "encoder.safetensors"
PLANS = "plans"
_OLD_FILES = ("projections.safetensors",)  # of version 0.2, which nothing reads

Runtime = Literal["tensorrt", "tensorrt_rtx", "openvino", "onnxruntime", "torch"]
EnginePrecision = Literal["fp32", "bf16", "fp16", "int8", "fp8"]  # the more exact ones first
Side = Annotated[int, Meta(ge=1, le=4096)]  # of the encoder's pictures; one of 65,536 would be 12 GB
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
PRECISIONS: tuple[EnginePrecision, ...] = get_args(EnginePrecision)
ONNX_RUNTIMES = ("openvino", "onnxruntime")  # execute encoder.onnx on a CPU: an engine of one is an engine of the other
EXTRAS = {"tensorrt": "gpu", "tensorrt_rtx": "tensorrt-rtx"}  # runtimes with plans, and the extras that install them
log = logging.getLogger(__name__)


class Target(Struct, frozen=True, kw_only=True):
    """What a plan is compiled for, as the manifest describes it; a manifest may have further fields.

    A plan of TensorRT runs with the version that built it, on the GPU that it was built for; a plan of TensorRT-RTX
    runs on any GPU that TensorRT-RTX supports (`gpu` None).
    """

    runtime: Literal["tensorrt", "tensorrt_rtx"]
    version: Name
    gpu: Name | None
    compute_capability: Annotated[str, Meta(pattern=r"^[0-9]+\.[0-9]+\Z")] | None

    @property
    def file(self) -> str:
        """The plan's path in an engine folder: "plans/tensorrt-nvidia-h100-80gb-hbm3-10.13.3.9.plan"."""
        gpu = re.sub(r"[^a-z0-9]+", "-", (self.gpu or "any").lower()).strip("-")
        return f"{PLANS}/{self.runtime}-{gpu}-{re.sub(r'[^A-Za-z0-9.]+', '-', self.version)}.plan"

    def __str__(self) -> str:
        gpu = "any GPU" if self.gpu is None else f"{self.gpu} (compute capability {self.compute_capability})"
        return f"{gpu} with {self.runtime} {self.version}"


class EngineManifest(Strict, frozen=True, kw_only=True):
    """The manifest of an engine folder (iosr_fast.export writes it)."""

    schema: Literal[2]
    kind: str
    files: dict[str, Entry]
    checksum: Sha256
    model: Name
    image_size: Side
    width: Size
    mean: Channels
    std: Deviations
    interpolation: Interpolation
    logit_scale: Above0 | None  # None: an image encoder without texts
    clip_fingerprint: Fingerprint
    adapter: Literal["trained", "random"] | None
    adapter_fingerprint: Fingerprint | None
    first_adapted_block: Natural | None
    bottleneck: Positive | None
    runtime: Runtime
    precision: EnginePrecision
    max_batch: Size
    fingerprint: Fingerprint
    export_version: Positive
    opset: Positive | None
    # None: an encoder that is not fused (backbones.plain_encoder).
    dual_encoder: dict[str, int | float | str | bool | list[list[int]] | None] | None
    versions: dict[str, str | None]
    device: Name
    plans: dict[str, Target]
    check: dict[str, Any]
    build_seconds: Annotated[float, Meta(ge=0)]
    quantised: dict[str, Any] | None = None
    tokens: dict[str, Positive] | None = None
    resize_mode: ResizeMode = "shortest"
    fill: Level = 0

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.image_size, self.resize_mode, self.interpolation, self.fill)


def check_engine(source: VerifiedFolder) -> EngineManifest:
    """The manifest of an engine. Raises ValueError for a missing, invalid or unknown field, or an unknown file."""
    facts = read_facts(source, EngineManifest)
    check_files(source, set(facts.plans), {ONNX_FILE, PLAIN_FILE, WEIGHTS, TORCH_FILE, *_OLD_FILES})
    return facts


def runtimes_of(manifest: Mapping[str, Any]) -> set[str]:
    """The runtimes that an engine has files for."""
    by_file = {ONNX_FILE: ONNX_RUNTIMES, TORCH_FILE: ("torch",)}
    runtimes = {name for file, names in by_file.items() if file in manifest["files"] for name in names}
    return runtimes | {facts["runtime"] for facts in manifest["plans"].values()}


def has_plain_form(manifest: Mapping[str, Any], runtime: str) -> bool:
    """Whether an engine with an adapter can compute the plain embedding alone in this runtime.

    A plan of TensorRT has both streams, and so has an engine that was built before there was a plain form.
    """
    if manifest["first_adapted_block"] is None:
        return False
    return runtime == "torch" or (runtime in ONNX_RUNTIMES and PLAIN_FILE in manifest["files"])


def check_engine_choice(runtime: str = "auto", precision: str | None = "auto") -> None:
    """Raise IosrFastError for a runtime or a precision that no engine has."""
    for name, value, known in (("runtime", runtime, RUNTIMES), ("precision", precision, PRECISIONS)):
        if value not in ("auto", *known) and (name, value) != ("precision", None):
            raise IosrFastError(f"expected {name} 'auto' or one of {list(known)}, got {value!r}")


def choose_runtime(runtime: str = "auto", built_for: Collection[str] | None = None) -> str:
    """Resolve "auto" to a runtime that works here (in the order of `open_engine`); any other name is returned.

    `built_for`: the runtimes that the engine has files for; None before it is built. Raises ValueError for an unknown
    name and for one that is not in `built_for`, ImportError for a runtime of the CPU whose package is missing,
    RuntimeError if "auto" finds none.
    """
    check_engine_choice(runtime)
    if runtime != "auto":
        if built_for is not None and runtime not in built_for:
            raise IosrFastError(
                f"expected one of the runtimes this engine was built for, {sorted(built_for)}, got {runtime!r}; "
                f"`iosr-fast build-engine --runtime {runtime}` builds one for it"
            )
        if runtime not in EXTRAS and (reason := unavailable_reason(runtime)) is not None:
            raise MissingPackageError(reason)
        return runtime
    candidates = RUNTIMES if built_for is None else built_for
    on_cpu = ONNX_RUNTIMES if platform.machine() in ("x86_64", "AMD64") else ONNX_RUNTIMES[::-1]
    # this_gpu imports torch, so only engines that torch may execute ask for it.
    torch_on_gpu = "torch" in candidates and machine.this_gpu() is not None
    refusals: dict[str, str] = {}
    for name in (*EXTRAS, *(("torch", *on_cpu) if torch_on_gpu else (*on_cpu, "torch"))):
        reason = unavailable_reason(name) if name in candidates else "this engine was not built for it"
        if reason is None:
            log.info("runtime %s chosen; unavailable: %s", name, refusals or "none")
            return name
        refusals[name] = reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
    raise UnavailableError(f"no runtime for this engine: {reasons}")


def unavailable_reason(runtime: str) -> str | None:
    """Why this runtime can't be used here, or None."""
    if find_spec(runtime) is None:
        return f"{runtime} is not installed (pip install 'iosr_fast[{EXTRAS.get(runtime, 'cpu')}]')"
    if runtime not in EXTRAS:
        return None
    gpu = machine.this_gpu()
    if gpu is None:
        return "PyTorch, which provides the buffers, is not installed or sees no NVIDIA GPU"
    if runtime == "tensorrt_rtx" and (gpu.capability < (8, 0) or gpu.capability[0] in (9, 10)):
        return f"TensorRT-RTX plans are for GeForce and RTX GPUs from compute capability 8.0 on, not for {gpu}"
    return None


def target(runtime: str) -> Target:
    """The target of plans that `runtime`, one of EXTRAS, builds here. Raises ImportError without the module, and
    RuntimeError if it compiles for the GPU that it runs on and there is none."""
    version, gpu = require(runtime, EXTRAS[runtime]).__version__, machine.this_gpu()
    if runtime == "tensorrt_rtx":  # it completes its plans at run time, for the GPU in use
        return Target(runtime="tensorrt_rtx", version=version, gpu=None, compute_capability=None)
    if gpu is None:
        raise UnavailableError(
            f"{runtime} compiles for the NVIDIA GPU that it runs on, and PyTorch sees none here; build the engine on "
            "the machine that will run it, or for another runtime"
        )
    capability = f"{gpu.capability[0]}.{gpu.capability[1]}"
    return Target(runtime="tensorrt", version=version, gpu=gpu.name, compute_capability=capability)
