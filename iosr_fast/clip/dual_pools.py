"""From a dual encoder's tokens to one vector, for encoders that read more than the CLS token."""

from __future__ import annotations

import torch
from torch import nn

from iosr_fast.clip.dual_blocks import Mlp, Norm
from iosr_fast.clip.dual_config import DualEncoderConfig


class AveragePool(nn.Module):
    """The mean of the patches."""

    def __init__(self, config: DualEncoderConfig) -> None:
        super().__init__()
        self.prefix = config.prefix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, L, width) -> (N, width)."""
        return x[:, self.prefix :].float().mean(1).to(x.dtype)


class AttentionPool(Mlp):
    """y = attention of one constant query, then y + mlp(ln(y)).

    The query q is a constant, so <q, W_k x_j> = <W_k' q, x_j> with one constant vector W_k' q for each head: no token
    is projected to a key or a value.
    """

    def __init__(self, config: DualEncoderConfig) -> None:
        super().__init__(config, config.pool_mlp_width)
        width, heads, dtype = config.width, config.pool_heads, config.dtype
        self.skipped = 0 if config.pool_prefix else config.prefix
        self.query = nn.Linear(width, heads, bias=False, dtype=dtype)
        self.v_weight = nn.Parameter(torch.empty(heads, width, width // heads, dtype=dtype))
        self.out_proj = nn.Linear(width, width, dtype=dtype)
        self.ln = Norm(width, eps=config.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, L, width) -> (N, width)."""
        if self.skipped:
            x = x[:, self.skipped :]
        logits = self.query(x).float().transpose(1, 2)
        weights = torch.softmax(logits, dim=-1).to(x.dtype)
        mixed = (weights @ x).transpose(0, 1)  # (heads, N, width): sum_j p_j x_j
        y: torch.Tensor = self.out_proj((mixed @ self.v_weight).transpose(0, 1).reshape(-1, x.shape[2]))
        return y + self.feed(self.ln(y))
