"""Hyper-parameters of an adapter's training, its schedules, and settings and presets of `iosr-fast train-adapter`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.text import did_you_mean

TrainPrecision = Literal["32-true", "bf16-mixed", "16-mixed"]
PRECISIONS: tuple[str, ...] = get_args(TrainPrecision)


@dataclass(frozen=True)
class DinoConfig:
    """Hyper-parameters of self-supervised training (Caron et al., ICCV 2021); the defaults are the public code's.

    `local_size`: side of the local crops in pixels; None is 3/7 of the image size (96 of 224), up to a whole patch.
    `train_head`: train the projection head, as DINO does. The public code freezes it at its random values.
    """

    out_dim: int = 65536
    hidden: int = 2048
    head_bottleneck: int = 256
    train_head: bool = True
    local_crops: int = 10
    global_scale: tuple[float, float] = (0.25, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.25)
    local_size: int | None = None
    mirror: bool = True
    momentum: float = 0.9998
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    teacher_warmup_epochs: int = 3
    center_momentum: float = 0.9
    weight_decay_end: float = 0.4

    def __post_init__(self) -> None:
        _check_least(self, 1, "out_dim", "hidden", "head_bottleneck")
        _check_least(self, 0, "local_crops", "teacher_warmup_epochs", "weight_decay_end")
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise IosrFastError(
                    f"expected {name} as two shares of a picture, 0 < low <= high <= 1, got {low} {high}"
                )
        for name in ("momentum", "center_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise IosrFastError(f"expected {name} from 0 to below 1, got {getattr(self, name)}")
        if not min(self.student_temperature, *self.teacher_temperature) > 0:
            raise IosrFastError(
                f"expected temperatures above 0, got {self.student_temperature} and {self.teacher_temperature}"
            )


@dataclass(frozen=True)
class TrainConfig:
    """Hyper-parameters. The defaults are the paper's supervised variant; `dino_config` gives its self-supervised one.

    `batch`: pictures per optimizer step, over all processes and all `accumulate` parts of the step.
    `learning_rate`: with DINO it applies to a batch of 256 and is scaled by batch / 256, as its authors do.
    `normalise`: subtract CLIP's mean and divide by its std during training too. The paper's public code does so at
    inference only.
    `cached_views`: compute the frozen part once for this number of (augmented) views of each picture and keep it in
    memory, in float16; 0 computes it each time (new augmentations in every epoch).
    `clip_grad`: largest norm of the gradient; 0 does not clip.
    """

    epochs: int = 1
    batch: int = 128
    accumulate: int = 1
    learning_rate: float = 8e-3
    min_learning_rate: float = 0.0
    weight_decay: float = 0.01
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_epochs: int = 0
    clip_grad: float = 0.0
    augment: bool = False
    normalise: bool = True
    cached_views: int = 0
    precision: TrainPrecision = "32-true"
    seed: int = 0
    dino: DinoConfig | None = None

    def __post_init__(self) -> None:
        _check_least(self, 1, "epochs", "batch", "accumulate")
        _check_least(self, 0, "cached_views", "warmup_epochs", "clip_grad", "min_learning_rate", "weight_decay")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise IosrFastError(f"expected a learning rate above 0, got {self.learning_rate}")
        if self.precision not in PRECISIONS:
            raise IosrFastError(f"expected precision of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.schedule not in ("constant", "cosine"):
            raise IosrFastError(f"expected schedule constant or cosine, got {self.schedule!r}")
        if self.dino is not None and (self.cached_views or self.augment):
            raise IosrFastError("DINO draws new crops each epoch: expected cached_views=0 and augment=False")

    def learning_rate_at(self, step: int, steps_an_epoch: int) -> float:
        """The rate of optimizer step `step`, counted from 0: linear warm-up, then constant or a half cosine.

        lr = lr_min + (lr_max - lr_min) (1 + cos(pi t)) / 2, where t is the completed share of the steps after warm-up.
        """
        peak = self.learning_rate * (self.batch / 256 if self.dino is not None else 1.0)
        warmup, total = self.warmup_epochs * steps_an_epoch, self.epochs * steps_an_epoch
        if step < warmup:
            return peak * step / warmup
        if self.schedule == "constant":
            return peak
        return _half_cosine(peak, self.min_learning_rate, (step - warmup) / max(1, total - warmup))

    def weight_decay_at(self, step: int, steps_an_epoch: int) -> float:
        """Constant; with DINO it rises by a half cosine to `weight_decay_end`."""
        if self.dino is None:
            return self.weight_decay
        return _half_cosine(self.weight_decay, self.dino.weight_decay_end, step / (self.epochs * steps_an_epoch))


def dino_config(**changes: Any) -> TrainConfig:
    """The self-supervised variant of the paper: DINO on the adapter only. `changes` are fields of TrainConfig."""
    paper: dict[str, Any] = {
        "epochs": 10,
        "batch": 120,
        "learning_rate": 8e-4,
        "min_learning_rate": 2e-6,
        "weight_decay": 0.04,
        "schedule": "cosine",
        "warmup_epochs": 2,
        "clip_grad": 0.3,
        "dino": DinoConfig(),
    }
    return TrainConfig(**{**paper, **changes})


def _check_least(config: DinoConfig | TrainConfig, least: int, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= least:
            raise IosrFastError(f"expected {name} of at least {least}, got {getattr(config, name)}")


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True)
class Settings:
    """What `iosr-fast train-adapter` trains; its option --settings is a JSON file of these fields.

    The blocks from `first_adapted_block` on get an adapter of width `bottleneck`, whose output has the factor `scale`.
    `held_out`: the share of each class that is measured after each epoch. `skip_missing` leaves out pictures without a
    file. `checkpoint_minutes` lie between checkpoints; 0: after epochs only. `tensorboard` writes its events, too.
    """

    first_adapted_block: int
    bottleneck: int
    scale: float
    held_out: Annotated[float, Meta(ge=0, le=0.5)] = 0.02
    skip_missing: bool = False
    checkpoint_minutes: Annotated[float, Meta(ge=0)] = 10.0
    tensorboard: bool = False
    training: TrainConfig = field(default_factory=TrainConfig)

    def changed(self, changes: Mapping[str, Any], source: str) -> Settings:
        """These settings with some others, as JSON has them. Raises IosrFastError that names `source` and the field.

        >>> Settings(8, 256, 0.1).changed({"training": {"epochs": 3}}, "a.json").training.epochs
        3
        """
        try:
            return msgspec.convert(_merged(msgspec.to_builtins(self), changes, "$"), Settings)
        except msgspec.ValidationError as error:
            raise IosrFastError(f"{source}: {error}") from error


def _merged(values: dict[str, Any], changes: Mapping[str, Any], place: str) -> dict[str, Any]:
    merged = dict(values)
    for name, value in changes.items():
        if name not in values:
            raise msgspec.ValidationError(
                f"{did_you_mean(name, values)}expected {', '.join(values)}, got {name!r} - at `{place}`"
            )
        inner = msgspec.to_builtins(DinoConfig()) if name == "dino" and values[name] is None else values[name]
        both = isinstance(inner, dict) and isinstance(value, dict)
        merged[name] = _merged(inner, value, f"{place}.{name}") if both else value
    return merged


def read_settings(file: Path) -> dict[str, Any]:
    """The settings in a file, to be given to `Settings.changed`. Raises IosrFastError for anything but JSON of some."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise IosrFastError(f"expected {file} to hold settings as a JSON object, got: {error}") from error


@dataclass(frozen=True)
class Preset:
    """The last `1 / part` of the blocks, rounded up to whole blocks, have an adapter."""

    part: int
    bottleneck: int
    scale: float
    training: TrainConfig

    def settings(self, blocks: int) -> Settings:
        """
        >>> PRESETS["fast", "supervised"].settings(12).first_adapted_block
        8
        """
        first = blocks - -(-blocks // self.part)
        return Settings(first, self.bottleneck, self.scale, training=self.training)


# By name and objective. `fast` costs about one pass of the encoder, `paper` two; `demo` made the shipped adapter.
PRESETS = {
    ("fast", "supervised"): Preset(3, 256, 0.1, TrainConfig(schedule="cosine")),
    ("fast", "dino"): Preset(3, 256, 0.1, dino_config()),
    ("paper", "supervised"): Preset(1, 64, 0.03, TrainConfig()),
    ("paper", "dino"): Preset(1, 64, 0.1, dino_config()),
    ("demo", "supervised"): Preset(2, 256, 0.1, TrainConfig(epochs=32, schedule="cosine", augment=True)),
    ("demo", "dino"): Preset(2, 256, 0.1, dino_config(dino=DinoConfig(out_dim=2048, momentum=0.99, mirror=False))),
}
