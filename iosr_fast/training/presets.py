"""Presets: an adapter's place, width and scale, and the hyper-parameters of its training."""

from __future__ import annotations

from dataclasses import dataclass

from iosr_fast.training.train_config import DinoConfig, TrainConfig, dino_config


@dataclass(frozen=True)
class Preset:
    """The last `1 / part` of the blocks, rounded up to whole blocks, have an adapter."""

    part: int
    bottleneck: int
    scale: float
    training: TrainConfig

    def first_adapted_block(self, blocks: int) -> int:
        """
        >>> PRESETS["fast", "supervised"].first_adapted_block(12)
        8
        """
        return blocks - -(-blocks // self.part)


# By name and objective. `fast` costs about one pass of the encoder, `paper` two; `demo` made the shipped adapter.
PRESETS = {
    ("fast", "supervised"): Preset(3, 256, 0.1, TrainConfig(schedule="cosine")),
    ("fast", "dino"): Preset(3, 256, 0.1, dino_config()),
    ("paper", "supervised"): Preset(1, 64, 0.03, TrainConfig()),
    ("paper", "dino"): Preset(1, 64, 0.1, dino_config()),
    ("demo", "supervised"): Preset(2, 256, 0.1, TrainConfig(epochs=32, schedule="cosine", augment=True)),
    ("demo", "dino"): Preset(2, 256, 0.1, dino_config(dino=DinoConfig(out_dim=2048, momentum=0.99, mirror=False))),
}
