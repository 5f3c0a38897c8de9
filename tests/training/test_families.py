"""One step of training for every family of image encoders: against a float64 pass, cached, and by DINO."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from iosr_fast.backbones.adapter import Adapter, adapted_pass
from iosr_fast.backbones.load import LoadedModel
from iosr_fast.training.adapted_encoder import AdaptedEncoder
from iosr_fast.training.config import DinoConfig, TrainConfig
from iosr_fast.training.objectives import Supervised
from iosr_fast.training.pictures import TensorPictures
from iosr_fast.training.train import train_adapter
from tests.backbones.families import FAMILIES, family_clip
from tests.backbones.small_clip import random_adapter
from tests.training.small import weights

pytestmark = pytest.mark.slow
STEP = TrainConfig(epochs=1, batch=6)


def pictures(clip: LoadedModel) -> TensorPictures:
    generator = torch.Generator().manual_seed(0)
    shape = (6, 3, clip.image_size, clip.image_size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return TensorPictures(images, torch.arange(6) % 3, ["a", "b", "c"])


def adapter_without_dropout(clip: LoadedModel) -> Adapter:
    adapter = random_adapter(clip, 1)
    for block in adapter.blocks.values():
        block.dropout.p = 0.0
    return adapter


def gradient(adapter: Adapter) -> torch.Tensor:
    return torch.cat([value.grad.flatten().double() for value in adapter.parameters() if value.grad is not None])


def literal_gradient(clip: LoadedModel) -> torch.Tensor:
    """The gradient of one whole pass of open_clip's and timm's modules with the adapter, in float64."""
    adapter, exact = adapter_without_dropout(clip).double(), copy.deepcopy(clip)
    exact.model.visual.double()
    torch.manual_seed(STEP.seed)
    head = Supervised(AdaptedEncoder(clip, 1), adapter, 3).head.double()
    source = pictures(clip)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (clip.mean, clip.std))
    features = adapted_pass(
        exact.model.visual, adapter.requires_grad_(True), ((source.images / 255 - mean) / std).double()
    )
    F.cross_entropy(head(features), source.labels).backward()
    return gradient(adapter)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.isa) if name == "pe-core" else name for name in FAMILIES]
)
def test_one_step_is_that_of_the_literal_pass(family: str) -> None:
    """Gradients, not weights: Adam's first step is the gradient's sign, which rounding decides where it is near zero.

    Bounds are relative to the largest entry: rounding errors of float32 (2^-24) and of the cache's float16 (2^-11),
    times the length of a dot product (64) or less.
    """
    clip = family_clip(family)
    exact = literal_gradient(clip)
    largest = float(exact.abs().max())
    assert largest > 1e-3
    for cached_views, bound in ((0, 64 * 2**-24), (1, 8 * 2**-11)):
        config = replace(STEP, cached_views=cached_views)
        ours = gradient(train_adapter(clip, adapter_without_dropout(clip), pictures(clip), config))
        torch.testing.assert_close(ours, exact, atol=bound * largest, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_dino_trains_the_adapter_alone_on_crops_of_another_size(family: str) -> None:
    clip = family_clip(family)
    size = 2 * AdaptedEncoder(clip, 1).patch_size
    dino = DinoConfig(out_dim=8, hidden=16, head_bottleneck=8, local_crops=2, local_size=size, momentum=0.5)
    adapter, losses = adapter_without_dropout(clip), list[float]()
    before = {name: value.clone() for name, value in clip.model.visual.state_dict().items()}
    config = replace(STEP, epochs=2, dino=dino)  # the teacher, which is the result, stays at the last step
    source = TensorPictures(pictures(clip).images, torch.zeros(6, dtype=torch.int64), ["one class is enough"])
    trained = train_adapter(clip, adapter, source, config, report=lambda step: losses.append(step.loss))
    assert len(losses) == 2 and min(losses) > 0 and bool(weights(trained).isfinite().all())
    assert trained is not adapter and trained.config.training["dino"]["out_dim"] == 8
    assert len({weights(one).sum().item() for one in (trained, adapter, adapter_without_dropout(clip))}) == 3
    assert all(torch.equal(value, before[name]) for name, value in clip.model.visual.state_dict().items())
