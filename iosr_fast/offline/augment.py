"""Random small affine and colour changes of a whole batch at once, for training on small pictures."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def augment_batch(
    images: torch.Tensor,
    generator: torch.Generator,
    *,
    max_rotation_deg: float = 12.0,
    max_shift: float = 0.1,
    scale_range: tuple[float, float] = (0.75, 1.1),
    max_colour: float = 0.2,
) -> torch.Tensor:
    """Each picture is turned, shifted, scaled, brightened and recoloured a little, independently.

    `images` (B, 3, H, W), float in [0, 1]; returns the same shape and range. `max_shift` is a share of the half width.
    What the shift uncovers repeats the border. There is no mirroring: a left arrow would become a right one.
    """
    count, device = len(images), images.device

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, generator=generator).to(device) * (high - low) + low

    angle = uniform(-max_rotation_deg, max_rotation_deg) * (math.pi / 180)
    zoom = 1 / uniform(*scale_range)
    shift = uniform(-max_shift, max_shift, 2)
    cosine, sine = angle.cos() * zoom, angle.sin() * zoom
    matrix = torch.stack(
        [torch.stack([cosine, -sine, shift[:, 0]], 1), torch.stack([sine, cosine, shift[:, 1]], 1)], dim=1
    )
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    gain = uniform(1 - max_colour, 1 + max_colour, 3, 1, 1)
    offset = uniform(-max_colour / 2, max_colour / 2, 3, 1, 1)
    return (moved * gain + offset).clamp(0, 1)
