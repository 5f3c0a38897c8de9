"""Presets: every name has both objectives, and the place follows the number of blocks."""

from __future__ import annotations

import pytest

from iosr_fast.training.presets import PRESETS


def test_each_preset_has_both_objectives() -> None:
    assert set(PRESETS) == {(name, goal) for name in ("fast", "paper", "demo") for goal in ("supervised", "dino")}
    assert all((preset.training.dino is not None) == (goal == "dino") for (_, goal), preset in PRESETS.items())


@pytest.mark.parametrize(
    ("blocks", "fast", "demo"), [(1, 0, 0), (2, 1, 1), (6, 4, 3), (12, 8, 6), (24, 16, 12), (32, 21, 16)]
)
def test_the_first_adapted_block_is_a_share_of_the_blocks(blocks: int, fast: int, demo: int) -> None:
    places = [PRESETS[name, "supervised"].first_adapted_block(blocks) for name in ("fast", "paper", "demo")]
    assert places == [fast, 0, demo]
