"""The form of a dual encoder that PyTorch executes: the same function up to rounding, in fewer kernels.

    queries, keys, values   one product with the three matrices, one below the other
    LayerNorm               one kernel in half precision, with statistics in fp32. CUDA's kernel takes weights of the
                            input's dtype only, so they are rounded to it
    quick_gelu              x sigmoid(1.702 x) = silu(1.702 x) / 1.702, with both factors in the products around it

Engines and ONNX files keep the layers of dual_blocks, which quantisers and passes over the graph find by name.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from iosr_fast.clip.dual_blocks import QUICK_GELU, Block, LastBlock, Mlp, Norm
from iosr_fast.clip.dual_encoder import DualEncoder

# On a GPU the first that takes the inputs is used. FlashAttention takes no mask, which merged tokens have; cuDNN and
# FlashAttention take no fp32.
ATTENTION = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


class ScaledLinear(nn.Linear):
    """y = scale x W' + b with the weights of `linear`. W times the scale would be rounded again in half precision."""

    def __init__(self, linear: nn.Linear, scale: float) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias, self.scale = linear.weight, linear.bias, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight.t(), alpha=self.scale)
        return y.reshape(*x.shape[:-1], y.shape[-1])


def to_inference_form(encoder: DualEncoder) -> None:
    """Change `encoder` to the form above, in place; its state dict is then no engine's. No weight is stored twice."""
    for name, module in encoder.named_modules():
        if isinstance(module, Norm) and name != "ln_pre":  # whose input is fp32
            module.to(encoder.shapes.dtype)
        if isinstance(module, Mlp) and module.activation == "quick_gelu" and not isinstance(module.ln_mlp, Norm):
            module.activation = "silu"
            module.c_fc.bias.mul_(QUICK_GELU)
            module.c_fc = ScaledLinear(module.c_fc, QUICK_GELU)
            module.c_proj = ScaledLinear(module.c_proj, 1 / QUICK_GELU)
    for block in encoder.blocks:
        if not isinstance(block, LastBlock):
            assert isinstance(block, Block)
            _merge_projections(block)


def _merge_projections(block: Block) -> None:
    parts = (block.q_proj, block.k_proj, block.v_proj)
    merged = block.q_proj
    for name in ("weight", "bias"):
        value = torch.cat([getattr(part, name) for part in parts])
        setattr(merged, name, nn.Parameter(value, requires_grad=False))
    merged.out_features *= 3
    block.qkv_proj = merged
    del block.q_proj, block.k_proj, block.v_proj


def attention_priority() -> AbstractContextManager[object]:
    """Within the block PyTorch chooses the first kernel of ATTENTION that takes the inputs, in the whole process."""
    return sdpa_kernel(list(ATTENTION), set_priority=True)
