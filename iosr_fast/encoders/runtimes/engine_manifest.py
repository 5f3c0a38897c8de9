"""The manifest of an engine folder."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from iosr_fast.utils.schema import (
    Above0,
    Channels,
    Deviations,
    Entry,
    Fingerprint,
    Name,
    Natural,
    Positive,
    Sha256,
    Size,
    Strict,
)


class CompiledPlan(Struct, frozen=True, kw_only=True):
    """A plan of TensorRT; what its builder says beside this differs between versions."""

    runtime: Literal["tensorrt", "tensorrt_rtx"]
    version: Name
    gpu: Name | None
    compute_capability: Annotated[str, Meta(pattern=r"^[0-9]+\.[0-9]+\Z")] | None
    profile: dict[str, Positive] = {}


class EngineManifest(Strict, frozen=True, kw_only=True):
    """Of an engine folder (offline.export)."""

    schema: Literal[2]
    kind: str
    files: dict[str, Entry]
    checksum: Sha256
    model: Name
    image_size: Size
    width: Size
    mean: Channels
    std: Deviations
    interpolation: Name
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
    dual_encoder: dict[str, int | float | str | bool | None]
    versions: dict[str, str | None]
    device: Name
    plans: dict[str, CompiledPlan]
    check: dict[str, Any]
    build_seconds: Annotated[float, Meta(ge=0)]
    quantised: dict[str, Any] | None = None
