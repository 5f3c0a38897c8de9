"""Small random affine and colour changes for training, drawn for each picture and applied to a batch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def draw_augmentation(count: int, generator: torch.Generator) -> torch.Tensor:
    """(count, 10): angle in radians, zoom, shift x and y, gain and offset of R, G, B, for each of `count` pictures.

    Shifts are shares of the half width. No mirroring: a left arrow would become a right one.
    """

    def uniform(low: float, high: float, columns: int = 1) -> torch.Tensor:
        return torch.rand(count, columns, generator=generator) * (high - low) + low

    return torch.cat(
        [
            uniform(-12.0, 12.0) * (math.pi / 180),
            1 / uniform(0.75, 1.1),
            uniform(-0.1, 0.1, 2),
            uniform(0.8, 1.2, 3),
            uniform(-0.1, 0.1, 3),
        ],
        dim=1,
    )


def augment_batch(images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Rotate, shift, scale, brighten and recolour each picture by its row of `drawn` (B, 10).

    `images` (B, 3, H, W), float in [0, 1]; returns the same shape and range. Uncovered areas repeat the border.
    """
    drawn = drawn.to(images.device)
    angle, zoom, shift = drawn[:, 0], drawn[:, 1], drawn[:, 2:4]
    cosine, sine = angle.cos() * zoom, angle.sin() * zoom
    matrix = torch.stack(
        [torch.stack([cosine, -sine, shift[:, 0]], 1), torch.stack([sine, cosine, shift[:, 1]], 1)], dim=1
    )
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    gain, offset = drawn[:, 4:7, None, None], drawn[:, 7:10, None, None]
    return (moved * gain + offset).clamp(0, 1)
