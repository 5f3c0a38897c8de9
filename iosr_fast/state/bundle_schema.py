"""What manifests of engines and classifiers may say: every field with its type and range, and none beside them."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from iosr_fast.state.labels import some
from iosr_fast.state.predictions import uid_of
from iosr_fast.state.support_images import SupportViews
from iosr_fast.utils.files import mend
from iosr_fast.utils.verified_folder import Held

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Fingerprint = Annotated[str, Meta(pattern=r"^[!-~]{1,128}\Z")]  # printable, without spaces
Name = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f-\x9f]{1,512}\Z")]  # nothing that steers a terminal
Natural = Annotated[int, Meta(ge=0, le=2**53)]
Positive = Annotated[int, Meta(ge=1, le=2**53)]
Size = Annotated[int, Meta(ge=1, le=1 << 16)]
# JSON has no way to write what isn't finite, and msgspec takes no number that doesn't fit.
Above0 = Annotated[float, Meta(gt=0)]
Channels = Annotated[list[float], Meta(min_length=3, max_length=3)]
Deviations = Annotated[list[Above0], Meta(min_length=3, max_length=3)]
Template = Annotated[str, Meta(pattern=r"\{\}")]
KeyPrecision = Literal["fp32", "fp16", "bf16", "int8"]
_T = TypeVar("_T", bound="Strict")


class Strict(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A JSON object with these fields and no others."""


class Entry(Strict, frozen=True, kw_only=True):
    sha256: Sha256
    bytes: Natural


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


class Preprocessing(Strict, frozen=True, kw_only=True):
    image_size: Size
    interpolation: Name
    mean: Channels
    std: Deviations


class PlanConstants(Strict, frozen=True, kw_only=True):
    """Of a plan (live.plan_files)."""

    tau: Above0
    alpha: float
    beta: Annotated[float, Meta(ge=0)]
    temperature: Above0
    query: Literal["plain", "adapted"]
    feature: Literal["plain", "adapted", "text-distribution"]
    cache: Literal["none", "dense", "classes"]
    keys: Literal["none", "support", "stored"]


class TextFacts(Strict, frozen=True, kw_only=True):
    """Of a text encoder (offline.export_text)."""

    context_length: Size
    width: Size
    precision: Literal["fp32", "fp16"]
    sot: Natural
    eot: Natural
    pad: Natural
    templates: Annotated[list[Template], Meta(min_length=1)]
    clip_fingerprint: Fingerprint
    tokens_checked: Natural
    max_abs_error: float
    min_cosine: float


class StateFacts(Strict, frozen=True, kw_only=True):
    """Of a state (live.state_files): what it has beside arrays."""

    class_names: Annotated[list[str], Meta(min_length=1)]
    class_numbers: list[Natural]
    version: Positive
    next: tuple[Natural, Natural]
    method: str
    parameters: dict[str, float]
    reducer: Annotated[str, Meta(pattern=r"^(none|centre|pca|pca:[1-9][0-9]{0,5})\Z")]
    factor: Above0
    key_precision: KeyPrecision
    tau: Above0
    plan: PlanConstants


class ClassifierManifest(StateFacts, frozen=True, kw_only=True):
    """Of a bundle (bundle.save_bundle)."""

    schema: Literal[2]
    kind: str
    files: dict[str, Entry]
    checksum: Sha256
    views: dict[str, Any]
    preprocessing: Preprocessing
    clip_fingerprint: Fingerprint
    adapter_fingerprint: Fingerprint | None
    encoder_fingerprint: Fingerprint
    text: TextFacts | None

    def support_views(self) -> SupportViews:
        """The views; a field that an older version had not keeps its default. Raises ValueError."""
        known = {field.name for field in fields(SupportViews)}
        if unknown := sorted(set(self.views) - known):
            raise ValueError(f"expected views with the fields {sorted(known)}, got {some(unknown)}")
        return msgspec.convert(self.views, SupportViews)


def read_facts(held: Held, form: type[_T]) -> _T:
    """The manifest of a held folder in its form. Raises ValueError naming manifest, field and what was expected."""
    try:
        return msgspec.json.decode(held.content, type=form)
    except (ValueError, RecursionError) as error:  # msgspec's own errors are ValueErrors
        raise refused(held, f"manifest.json: {error}") from error


def refused(held: Held, reason: str) -> ValueError:
    """The error for what was read and can't be right."""
    return ValueError(f"{held.folder} is not a complete {held.kind}: {reason}; {mend(held.kind)}")


def check_files(held: Held, needed: set[str], allowed: set[str]) -> None:
    """Raise ValueError unless a manifest names the files that are needed, and none that nothing reads."""
    found = set(held.files)
    if missing := sorted(needed - found):
        raise refused(held, f"manifest.json: expected the files {some(missing)}, got none of that name")
    if others := sorted(found - needed - allowed):
        raise refused(held, f"manifest.json: expected no other files, got {some(others)}")


def check_classes(names: list[str], numbers: list[int], next_number: int) -> None:
    """Raise ValueError for names and numbers of classes that no fit and no change gives."""
    if twice := sorted(name for name, times in Counter(names).items() if times > 1):
        raise ValueError(f"expected class_names to differ, got {some(twice)} more than once")
    if wrong := [name for name in names if uid_of(name) is not None or not name.strip()]:
        raise ValueError(f"expected class_names to be names, got {some(wrong)}: empty, or of the form of an id (~7)")
    if len(numbers) != len(names):
        raise ValueError(f"expected class_numbers for {len(names)} class_names, got {len(numbers)}")
    if any(later <= earlier for earlier, later in zip(numbers, [*numbers[1:], next_number], strict=True)):
        raise ValueError(f"expected class_numbers that rise and are below next[0], {next_number}, got {numbers[:5]}...")
