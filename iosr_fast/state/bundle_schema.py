"""The manifest of a saved classifier."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from iosr_fast.state.ids import uid_of
from iosr_fast.state.support_images import SupportViews
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
from iosr_fast.utils.text import abbreviate

Template = Annotated[str, Meta(pattern=r"\{\}")]
KeyPrecision = Literal["fp32", "fp16", "bf16", "int8"]


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
            raise ValueError(f"expected views with the fields {sorted(known)}, got {abbreviate(unknown)}")
        return msgspec.convert(self.views, SupportViews)


def check_classes(names: list[str], numbers: list[int], next_number: int) -> None:
    """Raise ValueError for names and numbers of classes that no fit and no change gives."""
    if twice := sorted(name for name, times in Counter(names).items() if times > 1):
        raise ValueError(f"expected class_names to differ, got {abbreviate(twice)} more than once")
    if wrong := [name for name in names if uid_of(name) is not None or not name.strip()]:
        raise ValueError(
            f"expected class_names to be names, got {abbreviate(wrong)}: empty, or of the form of an id (~7)"
        )
    if len(numbers) != len(names):
        raise ValueError(f"expected class_numbers for {len(names)} class_names, got {len(numbers)}")
    if any(later <= earlier for earlier, later in zip(numbers, [*numbers[1:], next_number], strict=True)):
        raise ValueError(f"expected class_numbers that rise and are below next[0], {next_number}, got {numbers[:5]}...")
