"""The structural view of an image encoder against the encoder itself."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch comes with the cpu extra")
pytest.importorskip("open_clip", reason="open_clip comes with the cpu extra")
pytest.importorskip("timm", reason="timm comes with the cpu extra")

from iosr_fast.clip.adapter import init_adapter  # noqa: E402
from iosr_fast.clip.vision_tower import vision_tower  # noqa: E402
from iosr_fast.training.adapted_encoder import AdaptedEncoder  # noqa: E402
from tests.clip.families import FAMILIES, family_clip  # noqa: E402
from tests.clip.small_clip import random_adapter  # noqa: E402


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_through_the_view_is_the_encoders_own(family: str) -> None:
    clip = family_clip(family)
    visual = clip.model.visual
    tower = vision_tower(visual)
    pixels = torch.randn(2, 3, clip.image_size, clip.image_size)
    x = tower.embed(pixels)
    assert x.shape == (2, tower.tokens, tower.width) and not any(tower.refusals().values())
    for block in tower.blocks:
        x = block.attend(x)
        torch.testing.assert_close(block.attend_cls(x), block.attend(x)[:, :1], atol=1e-5, rtol=1e-5)
        x = x + block.mlp(x)
    expected = visual(pixels)
    assert expected.shape == (2, tower.embedding_width) and expected.std() > 0.1
    torch.testing.assert_close(tower.pool(x), expected, atol=1e-5, rtol=1e-5)
    if tower.reads_cls:
        torch.testing.assert_close(tower.pool(x[:, :1]), expected, atol=1e-5, rtol=1e-5)
    else:
        moved = x.clone()
        moved[:, -1] *= -1
        assert not torch.allclose(tower.pool(moved), expected, atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_equals_the_literal_pass(family: str) -> None:
    """Embeddings and the gradients of one step, for a first adapter in the middle and in the last block."""
    clip = family_clip(family)
    pixels = torch.randn(2, 3, clip.image_size, clip.image_size)
    for first in (1, 2):
        outputs, grads = [], []
        for shortcut in (True, False):
            adapter = random_adapter(clip, first).requires_grad_(True)
            encoder = AdaptedEncoder(clip, first)
            if shortcut:
                stem = encoder.stem(pixels)
                assert [tuple(part.shape[1:]) for part in stem] == [encoder.stem_shape] * 2
                torch.testing.assert_close(encoder.tail(None, *stem), clip.model.visual(pixels), atol=1e-4, rtol=1e-5)
                outputs.append(encoder.tail(adapter, *stem))
            else:
                from iosr_fast.clip.adapter import encode_adapted

                outputs.append(encode_adapted(clip, adapter, pixels))
            outputs[-1].square().sum().backward()
            grads.append(torch.cat([value.grad.flatten() for value in adapter.parameters()]))
        assert (outputs[1] - clip.model.visual(pixels)).abs().max() > 1e-2 and grads[1].abs().max() > 1e-3
        torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(grads[0], grads[1], atol=1e-4 * float(grads[1].abs().max()), rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_sizes_resample_positions(family: str) -> None:
    """At the own size the general way is the encoder's own; a smaller picture has a smaller grid."""
    clip = family_clip(family)
    tower = vision_tower(clip.model.visual)
    pixels = torch.randn(2, 3, clip.image_size, clip.image_size)
    own = tower.embed(pixels)
    tower.image_size = (0, 0)  # a size that is never the encoder's
    torch.testing.assert_close(tower.embed(pixels), own, atol=1e-5, rtol=1e-5)
    side = 2 * tower.patch_size
    crop = AdaptedEncoder(clip, 1).stem(pixels[:, :, :side, :side])
    assert crop[0].shape == (2, tower.prefix + 4, tower.width)
    embedding = AdaptedEncoder(clip, 1).tail(init_adapter(clip, 1), *crop)
    assert embedding.shape == (2, tower.embedding_width) and bool(embedding.isfinite().all())
