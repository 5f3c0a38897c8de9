"""The tower of an image encoder of open_clip: its own VisionTransformer, or one of timm's transformers."""

from __future__ import annotations

from typing import Any

from iosr_fast.clip.architecture import not_a_vision_transformer
from iosr_fast.clip.tower import VisionTower
from iosr_fast.clip.tower_open_clip import OpenClipTower
from iosr_fast.clip.tower_timm import TimmTower


def vision_tower(visual: Any, name: str = "this CLIP") -> VisionTower:
    """The tower of `clip.model.visual`. Raises ValueError, which names the CLIP, for an encoder that is none."""
    if type(visual).__name__ == "VisionTransformer":
        return OpenClipTower(visual)
    trunk = getattr(visual, "trunk", None)
    if type(trunk).__name__ in ("VisionTransformer", "Eva") and not getattr(trunk, "rope_mixed", False):
        return TimmTower(visual)
    raise not_a_vision_transformer(name, type(visual if trunk is None else trunk).__name__)
