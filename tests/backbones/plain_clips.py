"""A small CLIP of every family of image encoders that is not fused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import open_clip
import torch
from timm.models.vitamin import GeGluMlp, VitCfg, VitConvCfg, _create_vitamin

from iosr_fast.backbones.load import LoadedModel
from tests.backbones.families import named, randomise, timm_clip
from tests.backbones.small_clip import TEXT, small_clip


def vitamin(_small: str, pretrained: bool = False, **options: Any) -> Any:
    stages = VitCfg(
        embed_dim=(16, 32, 64),
        depths=(1, 1, 1),
        stem_width=16,
        conv_cfg=VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6),
        head_type="1d",
    )
    sizes = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 2, "mlp_layer": GeGluMlp, "mlp_ratio": 2.0}
    return _create_vitamin(
        "vitamin_small_224", pretrained, stages, class_token=False, global_pool="avg", **sizes, **options
    )


def resnet() -> LoadedModel:
    clip = small_clip(layers=[1, 2, 1, 1], width=16, image_size=64, patch_size=None, head_width=32)
    visual = clip.model.visual
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        randomise(visual)
    for module in visual.modules():  # statistics of its own activations, so that pictures differ in the end
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        visual.train()(torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    visual.eval()
    return clip


def coca() -> LoadedModel:
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8}
    vision |= {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = open_clip.CoCa(24, {**TEXT, "dim_head": 16}, text, vision)
        randomise(model.visual)
        torch.nn.init.normal_(model.text_decoder.text_projection)  # open_clip leaves it as memory was, at times NaN
    return replace(small_clip(), model=model.eval().requires_grad_(False))


FASTVIT = {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64)}
PLAIN_CLIPS: dict[str, Callable[[], LoadedModel]] = {
    "resnet": resnet,
    "convnext": lambda: timm_clip(named("test_convnext", {}), 64, timm_pool="", timm_proj="linear"),
    "convnext-mlp": lambda: timm_clip(named("test_convnext", {}), 64, timm_pool="", timm_proj="mlp"),
    "mobileclip-s": lambda: timm_clip(named("fastvit_mci0", FASTVIT), 64, timm_pool="avg"),
    "vitamin": lambda: timm_clip(vitamin, 64, timm_pool="", timm_proj="linear"),
    "coca": coca,
}


@functools.cache
def plain_clip(name: str) -> LoadedModel:
    """The small CLIP of a family; don't change it."""
    return PLAIN_CLIPS[name]()
