"""A CLIP that takes smaller pictures: its positions are interpolated."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.require import require_installed

require_installed("torch", "cpu")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from iosr_fast.clip.architecture import not_a_vision_transformer  # noqa: E402

if TYPE_CHECKING:
    from iosr_fast.clip.load import LoadedClip


def resize_clip(clip: LoadedClip, image_size: int) -> LoadedClip:
    """The CLIP for pictures of `image_size` pixels; it shares all other weights with `clip`.

    Positions of patches are interpolated bicubically with antialiasing, as open_clip and timm do when a model takes
    another size; that of CLS stays. The fingerprint stays that of the weights. Raises ValueError for an encoder that is
    no VisionTransformer and for a size that is not a multiple of its patches or is larger than its own.
    """
    if image_size == clip.image_size:
        return clip
    visual = clip.model.visual
    if type(visual).__name__ != "VisionTransformer":
        raise not_a_vision_transformer(clip.name, type(visual).__name__)
    patch = visual.conv1.kernel_size[0]
    if image_size % patch or not patch <= image_size <= clip.image_size:
        raise IosrFastError(
            f"expected an image_size that is a multiple of {patch}, the patches of {clip.name}, up to "
            f"{clip.image_size}, got {image_size}"
        )
    old, new = clip.image_size // patch, image_size // patch
    position = visual.positional_embedding.detach()
    grid = position[1:].double().T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True, align_corners=False)
    resized = torch.cat([position[:1], grid.flatten(2)[0].T.to(position.dtype)])

    def shallow(module: Any) -> Any:
        clone = copy.copy(module)
        clone._parameters, clone._modules = dict(module._parameters), dict(module._modules)
        return clone

    model, smaller = shallow(clip.model), shallow(visual)
    smaller.positional_embedding = nn.Parameter(resized, requires_grad=False)
    smaller.image_size, smaller.grid_size = (image_size, image_size), (new, new)
    model.visual = smaller
    return replace(clip, model=model, image_size=image_size)
