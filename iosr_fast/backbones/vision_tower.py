"""The tower of an image encoder of open_clip, its own VisionTransformer or one of timm's, and its size."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from iosr_fast.backbones.image_models import is_image_model
from iosr_fast.backbones.tower import VisionTower, shallow_copy
from iosr_fast.backbones.tower_open_clip import OpenClipTower
from iosr_fast.backbones.tower_timm import TimmTower
from iosr_fast.exceptions import IosrFastError

if TYPE_CHECKING:
    from iosr_fast.backbones.load import LoadedModel


def vision_tower(visual: Any, name: str = "this CLIP") -> VisionTower:
    """The tower of `clip.model.visual`. Raises ValueError, which names the CLIP, for an encoder that is none."""
    if is_image_model(name):
        raise IosrFastError(f"expected a CLIP, whose image encoder can be fused and have an adapter, got {name}")
    if type(visual).__name__ == "VisionTransformer":
        return OpenClipTower(visual)
    trunk = getattr(visual, "trunk", None)
    if type(trunk).__name__ in ("VisionTransformer", "Eva") and not getattr(trunk, "rope_mixed", False):
        return TimmTower(visual)
    raise IosrFastError(
        f"{name} has a {type(visual if trunk is None else trunk).__name__} image encoder; expected a vision "
        "transformer of open_clip or timm (ViT-B-16, ViT-L-14, ViT-B-16-SigLIP2, PE-Core-B-16, EVA02-B-16 and similar "
        "models)"
    )


def resize_clip(clip: LoadedModel, image_size: int) -> LoadedModel:
    """The CLIP for pictures of `image_size` pixels; it shares all other weights with `clip`.

    Positions of patches are interpolated bicubically with antialiasing, as open_clip and timm do when a model takes
    another size; those of CLS and registers stay. Rotary positions span the new grid as they span their own, as in
    timm. The fingerprint stays that of the weights. Raises ValueError for an encoder that is no vision transformer of
    open_clip or timm, and for a size that is not a multiple of its patches or is larger than its own.
    """
    if image_size == clip.image_size:
        return clip
    tower = vision_tower(clip.model.visual, clip.name)
    patch = tower.patch_size
    if image_size % patch or not patch <= image_size <= clip.image_size:
        raise IosrFastError(
            f"expected an image_size that is a multiple of {patch}, the patches of {clip.name}, up to "
            f"{clip.image_size}, got {image_size}"
        )
    model = shallow_copy(clip.model)
    model.visual = tower.resized(image_size)
    return replace(clip, model=model, geometry=replace(clip.geometry, size=image_size))
