"""The facts of a bundle: the fields of its manifest, and the values allowed."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from iosr_fast.backbones.tokenizer import Clean
from iosr_fast.delivery.engine_choice import EngineChoice
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.class_tree import check_nodes
from iosr_fast.head.names import check_names
from iosr_fast.head.support_images import SupportSettings
from iosr_fast.methods.config import Config
from iosr_fast.sealed.schema import (
    Above0,
    Entry,
    Fingerprint,
    Natural,
    Positive,
    Sha256,
    Size,
    Strict,
)
from iosr_fast.utils.text import abbreviate

Template = Annotated[str, Meta(pattern=r"\{\}")]
Dtype = Annotated[str, Meta(pattern=r"^(str|object|bool|u?int(8|16|32|64)|float(16|32|64))\Z")]


class TextFacts(Strict, frozen=True, kw_only=True):
    """A text encoder (export.text)."""

    context_length: Size
    width: Size
    precision: Literal["fp32", "fp16"]
    clean: Clean = "lower"
    eot: Natural | None
    templates: Annotated[list[Template], Meta(min_length=1)]
    clip_fingerprint: Fingerprint
    tokens_checked: Natural
    max_abs_error: float
    min_cosine: float
    sot: Natural | None = None  # written by older versions, as is pad
    pad: Natural | None = None


class HeadFacts(Config, frozen=True, kw_only=True):
    """The part of a head that is not arrays (head_files).

    `plan` has the constants of its ScoringPlan (scoring.fields), which checks them; under "cache" whether its keys have
    "classes" or "dense" values, and under "keys" whether they are "stored" or the embeddings of the "support" images:
    "none" where it has no keys.
    """

    class_names: Annotated[list[str], Meta(min_length=1)]
    class_numbers: list[Natural]
    version: Positive
    next: tuple[Natural, Natural]
    tau: Above0
    plan: dict[str, float | str]
    paths: list[list[str]] | None = None  # as of Head

    @property
    def config(self) -> Config:
        """The method and how it is set."""
        return Config(**{name: getattr(self, name) for name in Config.__struct_fields__})

    def check_head(self) -> None:
        """Raise ValueError for names, numbers and paths of classes that no fit and no change gives, and as `check`."""
        check_names(self.class_names, saved=True)
        numbers = self.class_numbers
        following = self.next[0]
        paths = [()] * len(numbers) if self.paths is None else self.paths
        if not len(numbers) == len(paths) == len(self.class_names):
            counts = f"{len(numbers)} and {len(paths)}"
            raise IosrFastError(f"expected class_numbers and paths for {len(self.class_names)} classes, got {counts}")
        check_nodes(paths, self.class_names)
        if any(later <= earlier for earlier, later in zip(numbers, [*numbers[1:], following], strict=True)):
            raise IosrFastError(
                f"expected class_numbers that rise and are below next[0], {following}, got {numbers[:5]}..."
            )
        self.check(self.version)


class Manifest(HeadFacts, frozen=True, kw_only=True):
    """The manifest of a saved head (bundle.Saved), and what each manifest has."""

    schema: Literal[2]
    kind: str
    files: dict[str, Entry]
    checksum: Sha256


class HeadManifest(Manifest, frozen=True, kw_only=True):
    """The manifest of a head without an encoder; the last fields are those of SavedEstimator."""

    estimator: dict[str, bool | float | str | None]
    labels: Dtype
    indicator: Dtype | None
    columns: list[str] | None


class ClassifierManifest(Manifest, frozen=True, kw_only=True):
    """The manifest of a head with its encoder (bundle.Bundle)."""

    views: dict[str, Any]
    preprocessing: dict[str, Any]  # facts of the engine
    clip_fingerprint: Fingerprint
    adapter_fingerprint: Fingerprint | None
    encoder_fingerprint: Fingerprint
    text: TextFacts | None
    integer_labels: bool = False
    engine_choice: EngineChoice | None = None

    def support_settings(self) -> SupportSettings:
        """How images are encoded; a field that an older version had not keeps its default, and what keys were the means
        of says nothing any more: the keys themselves are kept. Raises ValueError."""
        names = {field.name for field in fields(SupportSettings)}
        if others := sorted(set(self.views) - names - {"views", "mirror", "seed", "single"}):
            raise IosrFastError(f"expected views with the fields {sorted(names)}, got {abbreviate(others)}")
        return msgspec.convert(self.views, SupportSettings)
