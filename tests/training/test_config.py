"""Hyper-parameters: what is refused, the schedules, and the presets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from iosr_fast.training.config import PRESETS, DinoConfig, Settings, TrainConfig, dino_config, read_settings


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
        places = [PRESETS[name, objective].settings(blocks).first_adapted_block for name in ("fast", "paper", "demo")]
        assert places == [fast, 0, demo]
        assert (PRESETS["fast", objective].training.dino is not None) == (objective == "dino")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 3}, r"expected first_adapted_block, bottleneck, .*, got 'epochs' - at `\$`"),
        ({"training": {"schedul": "cosine"}}, r"did you mean 'schedule'\? expected epochs, .* - at `\$\.training`"),
        ({"training": {"dino": {"outdim": 8}}}, r"did you mean 'out_dim'\? .* - at `\$\.training\.dino`"),
        ({"training": {"schedule": "linear"}}, r"Invalid enum value 'linear' - at `\$\.training\.schedule`"),
        ({"training": {"epochs": 0}}, r"expected epochs of at least 1, got 0 - at `\$\.training`"),
        ({"training": {"epochs": True}}, r"Expected `int`, got `bool` - at `\$\.training\.epochs`"),
        ({"training": 3}, r"Expected `object`, got `int` - at `\$\.training`"),
        ({"held_out": 0.6}, r"Expected `float` <= 0\.5 - at `\$\.held_out`"),
    ],
)
def test_settings_of_a_file_are_checked_by_name_type_and_range(changes: dict[str, Any], message: str) -> None:
    for preset in PRESETS.values():
        with pytest.raises(ValueError, match=rf"a\.json: {message}"):
            preset.settings(12).changed(changes, "a.json")


def test_what_is_written_of_settings_is_what_is_read(tmp_path: Path) -> None:
    for preset in PRESETS.values():
        settings = preset.settings(12).changed({"training": {"learning_rate": 0.5}}, "a.json")
        (tmp_path / "a.json").write_bytes(msgspec.json.encode(settings))
        assert Settings(0, 1, 1.0).changed(read_settings(tmp_path / "a.json"), "a.json") == settings
