"""The facts of a bundle: the fields of its manifest, and the values allowed."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from iosr_fast.clip.tokenizer import Clean
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.engine_choice import EngineChoice
from iosr_fast.head.method_config import MethodConfig
from iosr_fast.head.names import check_names
from iosr_fast.head.support_images import SupportSettings
from iosr_fast.methods import METHODS, check_parameters
from iosr_fast.methods.tuned import Protocol, Tuned
from iosr_fast.scoring.key_precision import Precision
from iosr_fast.scoring.reducers import NAME, Reducer
from iosr_fast.utils.schema import (
    Above0,
    Entry,
    Fingerprint,
    Natural,
    Positive,
    Sha256,
    Share,
    Size,
    Strict,
    text_of,
)
from iosr_fast.utils.text import abbreviate

Template = Annotated[str, Meta(pattern=r"\{\}")]
Dtype = Annotated[str, Meta(pattern=r"^(str|object|bool|u?int(8|16|32|64)|float(16|32|64))\Z")]
ReducerName = Annotated[str, Meta(pattern=rf"^({NAME})\Z")]
_MAY_BE_NAN = ("accuracy", "search_accuracy")
NonNegative = Annotated[float, Meta(ge=0)]


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


class TunedFacts(Strict, frozen=True, kw_only=True):
    """A Tuned less `right`, `interval` and `stale`, which follow or are not kept. What may be NaN there is null here.

    >>> from iosr_fast.methods.tuned import Tuned
    >>> tuned = Tuned("gda", "none", {"alpha": 0.5}, accuracy=0.9, scored=40, protocol="loo")
    >>> TunedFacts.of(tuned).tuned().accuracy
    0.9
    """

    method: str
    reducer: ReducerName
    parameters: dict[str, float]
    accuracy: Share | None
    search_accuracy: Share | None
    scored: Natural
    protocol: Protocol
    alpha_range: tuple[float, float] | None
    log_loss: NonNegative | None
    factor: Above0
    settings: Natural
    seconds: NonNegative
    note: Annotated[str, text_of(2048)]
    shares: dict[str, Share]
    version: Positive

    @classmethod
    def of(cls, tuned: Tuned) -> TunedFacts:
        """The facts of a search."""
        values: dict[str, Any] = {name: getattr(tuned, name) for name in cls.__struct_fields__}
        values |= {"parameters": dict(tuned.parameters), "shares": dict(tuned.shares)}
        values |= {name: None for name in _MAY_BE_NAN if math.isnan(values[name])}
        return cls(**values)

    def tuned(self) -> Tuned:
        """The inverse of `of`. Raises ValueError for a method or a number of images that no search gives."""
        if self.method not in METHODS:
            raise IosrFastError(f"expected tuned.method of {', '.join(METHODS)}, got {self.method!r}")
        if (self.accuracy is None) != (self.scored == 0):
            raise IosrFastError(f"expected tuned.accuracy if images were scored, got {self.accuracy} of {self.scored}")
        nan = {name: math.nan for name in _MAY_BE_NAN if getattr(self, name) is None}
        return Tuned(**msgspec.structs.asdict(self) | nan)


class ConfigFacts(Strict, frozen=True, kw_only=True, omit_defaults=True):
    """A MethodConfig less its fitted reducer: in a bundle, in the log, and in the fingerprint of a head.

    >>> ConfigFacts.of(MethodConfig("gda", {"alpha": 0.5})).config(None).parameters
    {'alpha': 0.5}
    """

    method: str
    parameters: dict[str, float]
    reducer: ReducerName
    factor: Above0
    key_precision: Precision
    tuned: TunedFacts | None = None
    look_alikes: bool = True

    @classmethod
    def of(cls, config: MethodConfig) -> ConfigFacts:
        """The facts of a config."""
        return cls(
            method=config.method,
            parameters=dict(config.parameters),
            reducer=config.reducer_name,
            factor=config.factor,
            key_precision=config.key_precision,
            tuned=None if config.tuned is None else TunedFacts.of(config.tuned),
            look_alikes=config.look_alikes,
        )

    def config(self, reducer: Reducer | None) -> MethodConfig:
        """The inverse of `of`, with the fitted reducer. Raises ValueError for evidence that no search gives."""
        tuned = None if self.tuned is None else self.tuned.tuned()
        chosen = self.method, dict(self.parameters), self.reducer, reducer, self.factor
        return MethodConfig(*chosen, self.key_precision, tuned, self.look_alikes)

    def check(self, version: int) -> None:
        """Raise ValueError for a method, parameters and evidence that no fit and no change up to this version gives."""
        parameters = check_parameters(self.method, **self.parameters)
        if missing := sorted(set(METHODS[self.method].parameters) - set(parameters)):
            raise IosrFastError(f"expected the parameters {', '.join(missing)} of {self.method}, got none of that name")
        if self.tuned is not None and self.tuned.version > version:
            raise IosrFastError(f"expected tuned.version up to version, {version}, got {self.tuned.version}")


class HeadFacts(ConfigFacts, frozen=True, kw_only=True, omit_defaults=True):
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

    def check_head(self) -> None:
        """Raise ValueError for names and numbers of classes that no fit and no change gives, and as `check`."""
        check_names(self.class_names)
        numbers, following = self.class_numbers, self.next[0]
        if len(numbers) != len(self.class_names):
            raise IosrFastError(f"expected class_numbers for {len(self.class_names)} class_names, got {len(numbers)}")
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
    """The manifest of a head without an encoder; the fields are those of bundle.SavedHead."""

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
        """The views; a field that an older version had not keeps its default. Raises ValueError."""
        names = {field.name for field in fields(SupportSettings)}
        if others := sorted(set(self.views) - names):
            raise IosrFastError(f"expected views with the fields {sorted(names)}, got {abbreviate(others)}")
        return msgspec.convert(self.views, SupportSettings)
