"""One step of training for every family of image encoders: against literal passes, cached, by DINO, interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch comes with the cpu extra")
pytest.importorskip("open_clip", reason="open_clip comes with the cpu extra")
pytest.importorskip("timm", reason="timm comes with the cpu extra")
pytest.importorskip("lightning_fabric", reason="lightning-fabric comes with the train extra")

from iosr_fast.clip.adapter import Adapter, encode_adapted, encode_plain  # noqa: E402
from iosr_fast.clip.load import LoadedClip  # noqa: E402
from iosr_fast.training import train  # noqa: E402
from iosr_fast.training.adapted_encoder import AdaptedEncoder  # noqa: E402
from iosr_fast.training.data import TensorPictures  # noqa: E402
from iosr_fast.training.train import train_adapter  # noqa: E402
from iosr_fast.training.train_config import DinoConfig, TrainConfig  # noqa: E402
from tests.clip.families import FAMILIES, family_clip  # noqa: E402
from tests.clip.small_clip import random_adapter  # noqa: E402

pytestmark = pytest.mark.slow
STEP = TrainConfig(epochs=1, batch=6)


class LiteralEncoder(AdaptedEncoder):
    """No stem: whole passes of open_clip's and timm's modules, with and without the adapter."""

    def __init__(self, clip: LoadedClip, first_adapted_block: int) -> None:
        super().__init__(clip, first_adapted_block)
        self.clip = clip

    def stem(self, pixels: Any) -> tuple[Any, Any]:
        return pixels, pixels

    def tail(self, adapter: Adapter | None, after_attention: Any, after_mlp: Any) -> Any:
        if adapter is None:
            return encode_plain(self.clip, after_mlp)
        return encode_adapted(self.clip, adapter, after_mlp)


def pictures(clip: LoadedClip) -> TensorPictures:
    generator = torch.Generator().manual_seed(0)
    shape = (6, 3, clip.image_size, clip.image_size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return TensorPictures(images, torch.arange(6) % 3, ["a", "b", "c"])


def trained(clip: LoadedClip, config: TrainConfig, folder: Path | None = None, first: int = 1, **more: Any) -> Any:
    """All weights after training from a random adapter without dropout."""
    adapter = random_adapter(clip, first)
    for block in adapter.blocks.values():
        block.dropout.p = 0.0
    result = train_adapter(clip, adapter.requires_grad_(True), pictures(clip), config, folder, **more)
    return torch.cat([value.flatten() for value in result.parameters()])


@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_is_that_of_the_literal_pass(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = family_clip(family)
    before = torch.cat([value.flatten() for value in random_adapter(clip, 1).parameters()])
    ours = trained(clip, STEP)
    cached = trained(clip, replace(STEP, cached_views=1))
    monkeypatch.setattr(train, "AdaptedEncoder", LiteralEncoder)
    literal = trained(clip, STEP)
    step = (literal - before).detach().abs().max()
    assert step > 1e-4
    torch.testing.assert_close(ours, literal, atol=1e-3 * float(step), rtol=0)
    # The cache rounds to fp16, and Adam's first step is nearly the gradient's sign.
    assert ((cached - literal).abs() > 0.05 * step).float().mean() < 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_dino_trains_on_crops_of_another_size(family: str) -> None:
    clip = family_clip(family)
    size = 2 * AdaptedEncoder(clip, 1).patch_size
    dino = DinoConfig(out_dim=8, hidden=16, head_bottleneck=8, local_crops=2, local_size=size, momentum=0.5)
    losses: list[float] = []
    before = torch.cat([value.flatten() for value in random_adapter(clip, 1).parameters()])
    config = replace(STEP, epochs=2, dino=dino)  # the teacher, which is the result, stays at the last step
    after = trained(clip, config, report=lambda step: losses.append(step.loss))
    assert len(losses) == 2 and min(losses) > 0 and bool(after.isfinite().all())
    assert not torch.equal(after, before)


@pytest.mark.parametrize("family", ["siglip", "pe-core", "eva02"])
def test_an_interrupted_training_resumes(family: str, tmp_path: Path) -> None:
    clip = family_clip(family)
    config = replace(STEP, epochs=3, cached_views=1)

    def stop(progress: Any) -> None:
        if progress.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(clip, config, tmp_path / "stopped", report=stop)
    resumed = trained(clip, config, tmp_path / "stopped")
    torch.testing.assert_close(resumed, trained(clip, config, tmp_path / "whole"), atol=0, rtol=0)
