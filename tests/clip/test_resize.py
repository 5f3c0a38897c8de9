"""Smaller pictures: positions as open_clip interpolates them."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch comes with the cpu extra")
open_clip = pytest.importorskip("open_clip", reason="open_clip comes with the cpu extra")

from iosr_fast.clip.fuse import build_dual_encoder  # noqa: E402
from iosr_fast.clip.resize import resize_clip  # noqa: E402
from iosr_fast.clip.two_pass import two_passes  # noqa: E402
from iosr_fast.exceptions import IosrFastError  # noqa: E402
from tests.clip.small_clip import random_adapter, random_pixels, small_clip  # noqa: E402
from tests.clip.test_dual_encoder import run  # noqa: E402


@pytest.mark.parametrize("size", [24, 16, 8])
def test_smaller_pictures_take_open_clips_positions(size: int) -> None:
    clip = small_clip()
    smaller = resize_clip(clip, size)
    assert (smaller.image_size, smaller.fingerprint) == (size, clip.fingerprint)
    state = {"visual.positional_embedding": clip.model.visual.positional_embedding.clone()}
    open_clip.model.resize_pos_embed(state, smaller.model, antialias=True)
    got = smaller.model.visual.positional_embedding
    torch.testing.assert_close(got, state["visual.positional_embedding"], atol=1e-6, rtol=0)
    assert torch.equal(got[0], clip.model.visual.positional_embedding[0])
    assert clip.model.visual.image_size == (32, 32) and smaller.model.visual.conv1 is clip.model.visual.conv1
    adapter, pixels = random_adapter(clip, 1), random_pixels(3, size)
    for row, expected in zip(
        run(build_dual_encoder(smaller, adapter), pixels), two_passes(smaller, adapter, pixels), strict=True
    ):
        np.testing.assert_allclose(row, expected, atol=1e-5)


def test_sizes_are_checked() -> None:
    clip = small_clip()
    assert resize_clip(clip, clip.image_size) is clip
    for size in (0, 20, 40):
        with pytest.raises(IosrFastError, match=f"a multiple of 8, .* up to 32, got {size}"):
            resize_clip(clip, size)
