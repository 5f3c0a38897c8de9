"""The reference: both embeddings by two separate passes of the libraries' own modules, without fusion."""

from __future__ import annotations

import numpy as np

from iosr_fast.utils.require import require_installed

require_installed("torch", "cpu")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from iosr_fast.backbones.adapter import Adapter, adapted_pass  # noqa: E402
from iosr_fast.backbones.load import LoadedModel  # noqa: E402


class TwoPasses(nn.Module):
    """uint8 pixels (B, S, S, 3) -> (plain, adapted), each (B, D) fp32, L2-normalised; (plain,) without an adapter.

    Shares its weights with `clip` and `adapter`; `copy.deepcopy` it before moving it to another device. Computes in the
    dtype of `visual` and `adapter`; pixels are normalised in fp32.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, clip: LoadedModel, adapter: Adapter | None = None) -> None:
        super().__init__()
        self.visual, self.adapter = clip.model.visual, adapter
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(clip, name)).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = (pixels.float().permute(0, 3, 1, 2) / 255 - self.mean) / self.std
        x = x.to(next(self.visual.parameters()).dtype)
        features = [self.visual(x)]
        if isinstance(features[0], tuple):  # CoCa returns its tokens, too
            features = [features[0][0]]
        if self.adapter is not None:
            features.append(adapted_pass(self.visual, self.adapter, x))
        return tuple(F.normalize(feature.float(), dim=-1) for feature in features)


@torch.inference_mode()
def two_passes(clip: LoadedModel, adapter: Adapter | None, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
    """`TwoPasses` on a NumPy array of uint8 pixels, on the CPU."""
    outputs = TwoPasses(clip, adapter)(torch.from_numpy(pixels.copy()))
    return tuple(output.numpy() for output in outputs)
