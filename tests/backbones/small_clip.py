"""A CLIP with random weights that is small enough to fuse and export in a second, and an adapter for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import open_clip
import torch

from iosr_fast.backbones.adapter import init_adapter
from iosr_fast.backbones.load import LoadedModel
from iosr_fast.images.geometry import Geometry

TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}


def small_clip(quick_gelu: bool = False, fingerprint: str = "small", **vision: Any) -> LoadedModel:
    """Random weights with nothing left at its trivial start: biases, LayerNorms and LayerScales are drawn too."""
    config = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16} | vision
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = open_clip.model.CLIP(24, open_clip.CLIPVisionCfg(**config), open_clip.CLIPTextCfg(**TEXT), quick_gelu)
        for name, value in model.visual.named_parameters():
            if value.ndim == 1:
                torch.nn.init.normal_(value, mean=float(name.endswith(("weight", "gamma"))), std=0.2)
    model = model.eval().requires_grad_(False)
    size = config["image_size"]
    return LoadedModel(
        model=model,
        tokenizer=lambda texts: texts,
        name="small",
        geometry=Geometry(size if isinstance(size, int) else size[0]),
        mean=(0.48, 0.46, 0.41),
        std=(0.27, 0.26, 0.28),
        logit_scale=100.0,
        fingerprint=fingerprint,
    )


def random_adapter(clip: LoadedModel, first: int, bottleneck: int = 7) -> Any:
    adapter = init_adapter(clip, first, bottleneck, scale=0.3, seed=first)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in adapter.parameters():
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return adapter.eval()


def random_pixels(batch: int, size: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)


def run(encoder: torch.nn.Module, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
    with torch.no_grad():
        return tuple(output.numpy() for output in encoder(torch.from_numpy(pixels)))
