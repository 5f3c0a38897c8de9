"""A small CLIP of every family of image encoders, built by open_clip from timm's own models with other sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from unittest import mock

import open_clip
import timm
import torch
from timm.models.vision_transformer_hybrid import ConvStem, _create_vision_transformer_hybrid

from iosr_fast.backbones.load import LoadedModel
from iosr_fast.images.geometry import Geometry
from tests.backbones.small_clip import TEXT, small_clip

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4}


def randomise(visual: torch.nn.Module) -> None:
    """Draw every weight, so that no norm, bias, scale or token is trivially one or zero."""
    for name, value in [*visual.named_parameters(), *visual.named_buffers()]:
        if name.endswith(("running_var", "num_batches_tracked")) or ".rope." in name or name.endswith("k_bias"):
            continue
        if value.ndim == 1:
            gain = name.endswith("weight") or "gamma" in name
            value.data = torch.randn(value.shape) * 0.2 + float(gain)
        elif name.endswith("weight"):
            value.data = torch.randn(value.shape) * (value.numel() / len(value)) ** -0.5
        elif name.endswith(("token", "embed", "latent")):
            value.data = torch.randn(value.shape) * 0.5


def timm_clip(create: Callable[..., Any], size: int = 32, **vision: Any) -> LoadedModel:
    """A CLIP with open_clip's TimmModel around the model of `create`, which replaces timm.create_model."""
    config = {"image_size": size, "timm_model_name": "small", "timm_proj": None, **vision}
    with torch.random.fork_rng(devices=[]), mock.patch("timm.create_model", create):
        torch.manual_seed(1)
        width = 64 if config["timm_proj"] == "none" else 24
        model = open_clip.model.CLIP(width, open_clip.CLIPVisionCfg(**config), open_clip.CLIPTextCfg(**TEXT))
        randomise(model.visual)
    return replace(small_clip(), model=model.eval().requires_grad_(False), geometry=Geometry(size))


def named(name: str, sizes: Mapping[str, Any] = SMALL, **changes: Any) -> Callable[..., Any]:
    """timm.create_model of `name` in these sizes; what open_clip names is left out."""
    create = timm.create_model
    return lambda _small, **options: create(name, **{**sizes, **changes, **options})


def mobileclip(_small: str, pretrained: bool = False, **options: Any) -> Any:
    stem = ConvStem(channels=(24, 20, 64), stride=(4, 2, 2), kernel_size=(4, 2, 2), padding=0, act_layer=torch.nn.GELU)
    sizes = {"img_size": 64, "embed_dim": 64, "depth": 3, "num_heads": 4, "no_embed_class": True}
    return _create_vision_transformer_hybrid(
        "vit_base_mci_224", backbone=stem, embed_args={"proj": False}, pretrained=pretrained, **sizes, **options
    )


ROTARY = {"ref_feat_shape": (5, 5)}  # unlike the grid of 4 x 4 patches, so that the tables are scaled
FAMILIES: dict[str, Callable[[], LoadedModel]] = {
    "vit": small_clip,
    "clipa": lambda: small_clip(
        pool_type="avg", final_ln_after_pool=True, no_ln_pre=True, pos_embed_type="sin_cos_2d", patch_dropout=0.5
    ),
    "mean-of-norms": lambda: small_clip(pool_type="avg", ls_init_value=0.5),
    "siglip": lambda: timm_clip(named("vit_base_patch16_siglip_224"), timm_pool="map", timm_proj="none"),
    "siglip2": lambda: timm_clip(
        named("vit_base_patch32_siglip_256", img_size=35, mlp_ratio=3.5), 35, timm_pool="map", timm_proj="none"
    ),
    "timm-clip": lambda: timm_clip(named("vit_large_patch14_clip_224"), timm_pool="token", timm_drop_path=0.1),
    "registers": lambda: timm_clip(
        named("vit_large_patch14_clip_224", reg_tokens=2, init_values=0.5), timm_pool="token", timm_proj="linear"
    ),
    "gap": lambda: timm_clip(named("vit_medium_patch16_gap_256"), timm_pool="", timm_proj="linear"),
    "mobileclip-b": lambda: timm_clip(mobileclip, 64, timm_pool="token"),
    "pe-core": lambda: timm_clip(
        named("vit_pe_core_base_patch16_224", attn_pool_num_heads=8, attn_pool_mlp_ratio=3.0, **ROTARY), timm_pool="map"
    ),
    "pe-core-g": lambda: timm_clip(named("vit_pe_core_gigantic_patch14_448", **ROTARY), timm_pool="map"),
    "eva": lambda: timm_clip(named("eva_giant_patch14_224", init_values=0.5), timm_pool="token"),
    "eva02": lambda: timm_clip(named("eva02_base_patch16_clip_224", **ROTARY), timm_pool="token"),
    "eva02-packed": lambda: timm_clip(
        named("eva02_base_patch16_clip_224", scale_mlp=False, rope_rotate_half=True, qkv_fused=True), timm_pool="token"
    ),
    "eva02-e": lambda: timm_clip(named("eva02_enormous_patch14_clip_224"), timm_pool="token"),
}


@functools.cache
def family_clip(name: str) -> LoadedModel:
    """The small CLIP of a family; don't change it."""
    return FAMILIES[name]()
