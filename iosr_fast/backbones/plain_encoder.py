"""The image encoder of any model of open_clip or timm as one module from uint8 pixels to the plain embedding.

For encoders that `fuse` can't fuse: ConvNeXt, ResNet, MobileCLIP-S, ViTamin, CoCa, and timm's. The layers are the
model's own, with these changes, all exact up to rounding:

    attention      nn.MultiheadAttention and the ResNet's attention pool become `Attention` and `AttentionPool`, because
                   the exporter writes the batch size of the example into their reshapes; attention by windows (Hiera,
                   NesT), which has five axes, becomes products, because the exporter takes fused attention of four
    branches       parallel convolutions that only training needs (MobileCLIP-S) are summed into one
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from iosr_fast.backbones.tower import shallow_copy

if TYPE_CHECKING:
    from iosr_fast.backbones.load import LoadedModel

_BY_WINDOWS = ("timm.models.hiera", "timm.models.nest")


class PlainEncoder(nn.Module):
    """pixels uint8 (B, S, S, 3) -> (plain,), (B, D) fp32, L2-normalised: open_clip's encode_image, in fp32.

    It shares its weights with `clip`.
    """

    mean: torch.Tensor
    std: torch.Tensor
    outputs = ("plain",)

    def __init__(self, clip: LoadedModel) -> None:
        super().__init__()
        self.image_size = clip.image_size
        self.visual = _exportable(clip.model.visual)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(clip, name)).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = (pixels.float().permute(0, 3, 1, 2) / 255 - self.mean) / self.std  # TensorRT can't transpose uint8
        features = self.visual(x)
        if isinstance(features, tuple):  # CoCa returns its tokens, too
            features = features[0]
        # As F.normalize, whose exported form computes sizes.
        return (features / torch.linalg.vector_norm(features, dim=-1, keepdim=True).clamp_min(1e-12),)


class Attention(nn.Module):
    """nn.MultiheadAttention (batch first) without masks or weights; any number of queries and of keys."""

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        width = source.embed_dim
        self.num_heads, self.out_proj = source.num_heads, source.out_proj
        weights = (
            (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)
            if source.in_proj_weight is None
            else source.in_proj_weight.split(width)
        )
        biases = (None,) * 3 if source.in_proj_bias is None else source.in_proj_bias.split(width)
        self.q_proj, self.k_proj, self.v_proj = (_linear(w, b) for w, b in zip(weights, biases, strict=True))

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        attended = _attend(self.q_proj(query), self.k_proj(key), self.v_proj(value), self.num_heads)
        return self.out_proj(attended), None


class AttentionPool(nn.Module):
    """open_clip's AttentionPool2d: the mean of all places attends to it and to them. (N, C, H, W) -> (N, D)."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.heads, self.positional_embedding = source.num_heads, source.positional_embedding
        self.q_proj, self.k_proj, self.v_proj = source.q_proj, source.k_proj, source.v_proj
        self.c_proj = source.c_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positional_embedding
        attended = _attend(self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x), self.heads)
        return self.c_proj(attended[:, 0])


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """softmax(q k' / sqrt(d)) v of each head; q (N, Q, width), k and v (N, K, width) -> (N, Q, width)."""
    q, k, v = (x.reshape(-1, x.shape[1], heads, x.shape[2] // heads).transpose(1, 2) for x in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return attended.reshape(-1, attended.shape[1], heads * attended.shape[3])


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _exportable(module: Any) -> Any:
    """The module with its attention replaced; `module` stays as it is, and weights are shared."""
    if isinstance(module, nn.MultiheadAttention):
        return Attention(module)
    if type(module).__name__ == "AttentionPool2d" and hasattr(module, "c_proj"):  # open_clip's, not timm's
        return AttentionPool(module)
    if hasattr(module, "reparameterize"):
        module = copy.deepcopy(module).eval()
        module.reparameterize()
        return module
    children = {name: _exportable(child) for name, child in module.named_children()}
    by_windows = hasattr(module, "fused_attn") and type(module).__module__ in _BY_WINDOWS
    if not by_windows and all(child is module._modules[name] for name, child in children.items()):
        return module
    clone = shallow_copy(module)
    clone._modules |= children
    if by_windows:
        clone.fused_attn = False
    return clone
