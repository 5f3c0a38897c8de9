"""The transformer blocks of a dual encoder, in parts that its streams can share, and its pools."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from iosr_fast.backbones.dual_config import DualEncoderConfig

Rotary = tuple[torch.Tensor, torch.Tensor]  # cosines and signed sines, each (tokens, head width)
QUICK_GELU = 1.702


class Norm(nn.LayerNorm):
    """LayerNorm computed in fp32, with the output in the input's dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == self.weight.dtype:  # PyTorch computes the statistics of half precision in fp32
            return super().forward(x)
        return super().forward(x.float()).to(x.dtype)


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return F.silu(x)
    if activation == "quick_gelu":
        return x * torch.sigmoid(QUICK_GELU * x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotate the pairs (x_i, x_{i + d/2}) of x (N, heads, tokens, d) by the angles of their tokens."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([second, first], dim=-1) * sin


class Mlp(nn.Module):
    """c_proj(ln_mlp(activation(c_fc(x)))); SwiGLU: c_proj(ln_mlp(silu(c_gate(x)) * c_fc(x))).

    A base of blocks and of the attention pool rather than a part of them: engines have its layers by these names.
    """

    def __init__(self, config: DualEncoderConfig, hidden: int) -> None:
        super().__init__()
        width, dtype = config.width, config.dtype
        self.activation: str = config.activation
        self.c_fc = nn.Linear(width, hidden, dtype=dtype)
        if config.activation == "swiglu":
            self.c_gate = nn.Linear(width, hidden, dtype=dtype)
        self.ln_mlp = Norm(hidden, eps=config.eps) if config.mlp_norm else nn.Identity()
        self.c_proj = nn.Linear(hidden, width, dtype=dtype)

    def fold_activation(self) -> None:
        """quick_gelu(x) = silu(a x) / a, one kernel in place of three, with a and 1 / a in the weights around it."""
        if self.activation == "quick_gelu" and isinstance(self.ln_mlp, nn.Identity):
            self.activation = "silu"
            for weight, factor in (
                (self.c_fc.weight, QUICK_GELU),
                (self.c_fc.bias, QUICK_GELU),
                (self.c_proj.weight, 1 / QUICK_GELU),
            ):
                weight.copy_(weight.float() * factor)

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.c_fc(x)
        hidden = F.silu(self.c_gate(x)) * hidden if self.activation == "swiglu" else activate(hidden, self.activation)
        return self.c_proj(self.ln_mlp(hidden))


class Block(Mlp):
    """One transformer block."""

    def __init__(self, config: DualEncoderConfig, adapted: bool) -> None:
        super().__init__(config, config.mlp_width)
        width, dtype = config.width, config.dtype
        self.heads, self.post_norm, self.rotary = config.heads, config.post_norm, config.rotary
        self.ln_1 = Norm(width, eps=config.eps)
        self._init_attention(config)
        self.ln_attention = Norm(width, eps=config.eps) if config.attention_norm else nn.Identity()
        self.out_proj = nn.Linear(width, width, dtype=dtype)
        self.ln_2 = Norm(width, eps=config.eps)
        self.adapted = adapted
        if adapted:
            assert config.bottleneck is not None
            self.down_proj = nn.Linear(width, config.bottleneck, dtype=dtype)
            self.up_proj = nn.Linear(config.bottleneck, width, dtype=dtype)

    def _init_attention(self, config: DualEncoderConfig) -> None:
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(config.width, config.width, dtype=config.dtype) for _ in range(3)
        )

    def join_projections(self) -> None:
        """Compute queries, keys and values in one product."""
        layers = self.q_proj, self.k_proj, self.v_proj
        self.qkv_weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
        self.qkv_bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
        del self.q_proj, self.k_proj, self.v_proj

    def attend(self, x: torch.Tensor, rotary: Rotary | None) -> torch.Tensor:
        """x + attention(ln_1(x)); x (N, L, width)."""
        length, width = x.shape[1:]
        y = x if self.post_norm else self.ln_1(x)
        if hasattr(self, "qkv_weight"):
            projected = F.linear(y, self.qkv_weight, self.qkv_bias).chunk(3, dim=-1)
        else:
            projected = tuple(proj(y) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (one.reshape(-1, length, self.heads, width // self.heads).transpose(1, 2) for one in projected)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if torch.compiler.is_exporting():
            # Written out, because the exporter's form computes the softmax in the input's dtype.
            attended = torch.softmax((q @ k.transpose(2, 3)).float(), dim=-1).to(v.dtype) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return x + self._project(attended.transpose(1, 2).reshape(-1, length, width))

    def _project(self, attended: torch.Tensor) -> torch.Tensor:
        update: torch.Tensor = self.out_proj(self.ln_attention(attended))
        return self.ln_1(update) if self.post_norm else update

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """mlp(ln_2(x)); both streams of the first adapted block share it."""
        return self.ln_2(self.feed(x)) if self.post_norm else self.feed(self.ln_2(x))

    def adapt(self, x: torch.Tensor) -> torch.Tensor:
        """scale * up_proj(relu(down_proj(x))) on the MLP's input; the scale is in up_proj's weights and bias."""
        return self.up_proj(torch.relu(self.down_proj(x)))


class LastBlock(Block):
    """The last block, for the CLS token only."""

    def _init_attention(self, config: DualEncoderConfig) -> None:
        width, dtype = config.width, config.dtype
        self.q_proj = nn.Linear(width, width, dtype=dtype)
        if config.rotary:  # each key is rotated by its own angles, so none can be folded into the query
            self.k_proj = nn.Linear(width, width, dtype=dtype)
        else:
            self.k_weight = nn.Parameter(torch.empty(config.heads, config.head_width, width, dtype=dtype))
        self.v_weight = nn.Parameter(torch.empty(config.heads, width, config.head_width, dtype=dtype))
        if config.attention_norm:  # else part of out_proj's bias
            self.v_bias = nn.Parameter(torch.empty(width, dtype=dtype))

    def attend(self, x: torch.Tensor, rotary: Rotary | None) -> torch.Tensor:
        """(x + attention(ln_1(x)))[:, 0] without values, nor keys unless rotated; x (N, L, width)."""
        length, width = x.shape[1:]
        y = x if self.post_norm else self.ln_1(x)
        q = self.q_proj(y[:, 0]).reshape(-1, self.heads, width // self.heads)  # CLS is not rotated
        if rotary is None:
            q = (q.transpose(0, 1) @ self.k_weight).transpose(0, 1)  # (N, heads, width): W_k' q
            logits = (q @ y.transpose(1, 2)).float()
        else:
            k = self.k_proj(y).reshape(-1, length, self.heads, width // self.heads).transpose(1, 2)
            logits = (rotate(k, rotary) @ q[..., None])[..., 0].float()
        weights = torch.softmax(logits, dim=-1).to(y.dtype)
        mixed = (weights @ y).transpose(0, 1)  # (heads, N, width): sum_j p_j y_j
        attended = (mixed @ self.v_weight).transpose(0, 1).reshape(-1, width)
        if isinstance(self.ln_attention, Norm):
            attended = attended + self.v_bias
        return x[:, 0] + self._project(attended)


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
