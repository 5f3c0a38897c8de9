"""Hyper-parameters: what is refused, the schedules, and the presets."""

from __future__ import annotations

from typing import Any

import pytest

from iosr_fast.training.config import PRESETS, DinoConfig, TrainConfig, dino_config


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (TrainConfig, {"epochs": 0}),
        (TrainConfig, {"precision": "fp8"}),
        (TrainConfig, {"learning_rate": 0.0}),
        (TrainConfig, {"schedule": "linear"}),
        (TrainConfig, {"clip_grad": float("nan")}),
        (DinoConfig, {"momentum": 1.0}),
        (DinoConfig, {"local_scale": (0.5, 0.2)}),
        (DinoConfig, {"out_dim": 0}),
        (DinoConfig, {"teacher_temperature": (0.0, 0.1)}),
        (dino_config, {"cached_views": 1}),
        (dino_config, {"augment": True}),
    ],
)
def test_impossible_values_are_refused(config: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        config(**wrong)


def test_learning_rate_and_weight_decay_follow_their_schedules() -> None:
    cosine = TrainConfig(epochs=3, learning_rate=1.0, min_learning_rate=0.1, schedule="cosine", warmup_epochs=1)
    rates = [cosine.learning_rate_at(step, 10) for step in range(30)]
    assert rates[0] == 0 and rates[5] == pytest.approx(0.5) and rates[10] == 1
    assert rates[20] == pytest.approx(0.55) and rates[29] == pytest.approx(0.1, abs=0.01)
    assert all(TrainConfig(learning_rate=0.5).learning_rate_at(step, 10) == 0.5 for step in range(10))
    dino = dino_config(batch=128, epochs=4, warmup_epochs=0)
    assert dino.learning_rate_at(0, 5) == pytest.approx(8e-4 / 2), "for a batch of 256"
    assert dino.weight_decay_at(0, 5) == pytest.approx(0.04) and dino.weight_decay_at(10, 5) == pytest.approx(0.22)


@pytest.mark.parametrize(
    ("blocks", "fast", "demo"), [(1, 0, 0), (2, 1, 1), (6, 4, 3), (12, 8, 6), (24, 16, 12), (32, 21, 16)]
)
def test_the_presets_first_adapted_block_is_a_share_of_the_blocks(blocks: int, fast: int, demo: int) -> None:
    for objective in ("supervised", "dino"):
        places = [PRESETS[name, objective].first_adapted_block(blocks) for name in ("fast", "paper", "demo")]
        assert places == [fast, 0, demo]
        assert (PRESETS["fast", objective].training.dino is not None) == (objective == "dino")
