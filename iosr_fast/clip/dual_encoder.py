"""Both embeddings of an image in one pass: the plain encoder and the encoder with the adapter, fused.

The paper's public code runs the whole encoder twice. Here the common part of both streams runs once. Every
transformation is exact up to rounding:

    shared prefix    blocks before the first adapted one, and that block's attention and MLP, see the image once; then
                     both streams run as one batch of 2B through shared weights, the adapter added to the second half
    CLS-only end     the last block's output is used at the CLS token only, so its query, out-projection and MLP run for
                     one token. With a single query q, <q, W_k x_j> = <W_k' q, x_j> and sum_j p_j W_v x_j =
                     W_v sum_j p_j x_j: no token is projected to a key or a value. Key biases cancel in the softmax,
                     value biases add up
    preprocessing    the input is uint8 pixels; mean and std are folded into the patch projection and the positions
    merged tokens    optional and not exact: blocks average similar tokens (token_merging). The streams share a matching
                     where they share the tokens; from the first adapted block's output on each has its own
    scales           1/sqrt(head width) is folded into the query weights, LayerScale into the weights before it, the
                     adapter's scale into up_proj

Needs torch only; `fuse.build_dual_encoder` converts a loaded open_clip model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.require import require_installed

require_installed("torch", "cpu")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from iosr_fast.clip.token_merging import merge_tokens, merged_per_block  # noqa: E402

Precision = Literal["fp32", "fp16"]


@dataclass(frozen=True)
class DualEncoderConfig:
    """The shapes of a dual encoder: all that `DualEncoder` needs besides its weights.

    `merged` tokens disappear in each block but the last (token_merging).
    """

    image_size: int
    patch_size: int
    width: int
    blocks: int
    heads: int
    mlp_width: int
    embedding_width: int
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"]
    ln_pre: bool
    eps: float
    precision: Precision
    first_adapted_block: int | None = None
    bottleneck: int | None = None
    merged: int = 0

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of GEMM weights and activations; LayerNorm, softmax and the last normalisation are always fp32."""
        return torch.float16 if self.precision == "fp16" else torch.float32


class Norm(nn.LayerNorm):
    """LayerNorm computed in fp32, with the output in the input's dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).to(x.dtype)


class Block(nn.Module):
    """One transformer block in three parts, so that the dual encoder can share some of them between the streams."""

    def __init__(self, config: DualEncoderConfig, adapted: bool) -> None:
        super().__init__()
        width, dtype = config.width, config.dtype
        self.heads = config.heads
        self.activation = config.activation
        self.ln_1 = Norm(width, eps=config.eps)
        self._init_attention(config)
        self.out_proj = nn.Linear(width, width, dtype=dtype)
        self.ln_2 = Norm(width, eps=config.eps)
        self.c_fc = nn.Linear(width, config.mlp_width, dtype=dtype)
        self.c_proj = nn.Linear(config.mlp_width, width, dtype=dtype)
        self.adapted = adapted
        if adapted:
            assert config.bottleneck is not None
            self.down_proj = nn.Linear(width, config.bottleneck, dtype=dtype)
            self.up_proj = nn.Linear(config.bottleneck, width, dtype=dtype)

    def _init_attention(self, config: DualEncoderConfig) -> None:
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(config.width, config.width, dtype=config.dtype) for _ in range(3)
        )

    def attend(self, x: torch.Tensor, sizes: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """x + attention(ln_1(x)) and the keys (N, heads, L, width / heads); x (N, L, width).

        With `sizes` (N, L) of merged tokens a token counts as often as it has patches: log(size) is added to its logit.
        """
        length, width = x.shape[1:]
        y = self.ln_1(x)
        q, k, v = (
            proj(y).reshape(-1, length, self.heads, width // self.heads).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if torch.compiler.is_exporting():
            # Written out, because the exporter's form computes the softmax in the input's dtype.
            logits = (q @ k.transpose(2, 3)).float()
            weights = torch.softmax(logits if sizes is None else logits + sizes.log()[:, None, None], dim=-1)
            attended = weights.to(v.dtype) @ v
        else:
            mask = None if sizes is None else sizes.log()[:, None, None].to(q.dtype)
            attended = F.scaled_dot_product_attention(q, k, v, mask, scale=1.0)
        return x + self.out_proj(attended.transpose(1, 2).reshape(-1, length, width)), k

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """mlp(ln_2(x)); both streams of the first adapted block share it."""
        hidden = self.c_fc(self.ln_2(x))
        if self.activation == "quick_gelu":
            hidden = hidden * torch.sigmoid(1.702 * hidden)
        else:
            hidden = F.gelu(hidden, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        projected: torch.Tensor = self.c_proj(hidden)
        return projected

    def adapt(self, x: torch.Tensor) -> torch.Tensor:
        """scale * up_proj(relu(down_proj(x))) on the input of ln_2; the scale is in up_proj's weights and bias."""
        update: torch.Tensor = self.up_proj(torch.relu(self.down_proj(x)))
        return update


class LastBlock(Block):
    """The last block, for the CLS token only."""

    def _init_attention(self, config: DualEncoderConfig) -> None:
        head_width = config.width // config.heads
        self.q_proj = nn.Linear(config.width, config.width, dtype=config.dtype)
        self.k_weight = nn.Parameter(torch.empty(config.heads, head_width, config.width, dtype=config.dtype))
        self.v_weight = nn.Parameter(torch.empty(config.heads, config.width, head_width, dtype=config.dtype))

    def attend(self, x: torch.Tensor, sizes: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + attention(ln_1(x)))[:, 0] without keys or values, and ln_1(x); x (N, L, width) -> (N, width)."""
        width = x.shape[2]
        y = self.ln_1(x)
        q = self.q_proj(y[:, 0]).reshape(-1, self.heads, width // self.heads).transpose(0, 1)
        q = (q @ self.k_weight).transpose(0, 1)  # (N, heads, width): W_k' q
        logits = (q @ y.transpose(1, 2)).float()
        weights = torch.softmax(logits if sizes is None else logits + sizes.log()[:, None], dim=-1).to(y.dtype)
        mixed = (weights @ y).transpose(0, 1)  # (heads, N, width): sum_j p_j y_j
        attended = (mixed @ self.v_weight).transpose(0, 1).reshape(-1, width)
        return x[:, 0] + self.out_proj(attended), y


class DualEncoder(nn.Module):
    """pixels uint8 (B, S, S, 3) -> (plain, adapted), each (B, D) fp32, L2-normalised; (plain,) without an adapter."""

    def __init__(self, config: DualEncoderConfig) -> None:
        super().__init__()
        self.shapes = config
        width, patches = config.width, config.patches_per_side**2
        self.patch_proj = nn.Linear(3 * config.patch_size**2, width, bias=False, dtype=config.dtype)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))  # with its position embedding
        self.position = nn.Parameter(torch.empty(patches, width))  # with the patch projection's bias
        self.ln_pre = Norm(width, eps=config.eps) if config.ln_pre else nn.Identity()
        first = config.blocks if config.first_adapted_block is None else config.first_adapted_block
        self.blocks = nn.ModuleList(
            (LastBlock if i == config.blocks - 1 else Block)(config, adapted=i >= first) for i in range(config.blocks)
        )
        self.merged = merged_per_block(patches, config.blocks, config.merged)
        self.ln_post = Norm(width, eps=config.eps)
        self.proj = nn.Linear(width, config.embedding_width, bias=False, dtype=config.dtype)

    @property
    def config(self) -> dict[str, Any]:
        """JSON-ready; `DualEncoder.from_config(config)` and `load_state_dict` restore the module."""
        return asdict(self.shapes)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DualEncoder:
        """The module in evaluation mode with uninitialised weights. Raises ValueError for missing or unknown fields."""
        expected = {field.name for field in fields(DualEncoderConfig)}
        # Engines of iosr_fast 0.2 and before have no `merged`.
        if set(config) | {"merged"} != expected:
            raise IosrFastError(
                f"expected the fields {sorted(expected)} in a dual encoder's config, got {sorted(config)}; "
                "was the engine built by another version of iosr_fast?"
            )
        with torch.device("meta"):
            encoder = cls(DualEncoderConfig(**config))
        return encoder.to_empty(device="cpu").eval().requires_grad_(False)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self._embed(pixels)
        split = False
        sizes: torch.Tensor | None = None  # of tokens, once some are merged
        for block, merged in zip(self.blocks, self.merged, strict=True):
            assert isinstance(block, Block)
            x, keys = block.attend(x, sizes)
            if merged:
                x, sizes = merge_tokens(x, sizes, keys, merged)
            update = block.mlp(x)
            if not block.adapted:
                x = x + update
            elif not split:
                plain = x + update
                x, split = torch.cat([plain, plain + block.adapt(x)]), True
                sizes = None if sizes is None else torch.cat([sizes, sizes])
            else:
                # As fast in ONNX Runtime as one GEMM [h, relu(down x)] @ [W_proj | scale W_up]; stores no weight twice.
                first, second = _halves(x + update)
                x = torch.cat([first, second + block.adapt(_halves(x)[1])])
        x = self.proj(self.ln_post(x)).float()
        # As F.normalize, whose exported form computes sizes.
        embeddings = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
        return tuple(_halves(embeddings)) if split else (embeddings,)

    def _embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Patch projection, CLS token, positions, ln_pre: (B, S, S, 3) uint8 -> (B, 1 + patches, width)."""
        side, patch = self.shapes.patches_per_side, self.shapes.patch_size
        # u = p/256 - 1/2 is exact in fp16 and centred, so folding the mean in loses no digits.
        x = pixels.to(self.shapes.dtype) * (1 / 256) - 0.5
        if side * patch != self.shapes.image_size:  # like the convolution, omit pixels that fill no patch
            x = x[:, : side * patch, : side * patch]
        x = x.reshape(-1, side, patch, side, patch, 3)
        x = self.patch_proj(x.permute(0, 1, 3, 2, 4, 5).reshape(-1, side * side, 3 * patch * patch))
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.float() + self.position], dim=1)
        embedded: torch.Tensor = self.ln_pre(x)
        return embedded.to(self.shapes.dtype)


def is_adapter_weight(name: str) -> bool:
    """Whether an entry of a dual encoder's state dict belongs to the adapter."""
    return ".down_proj." in name or ".up_proj." in name


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(2B, ...) -> twice (B, ...), by a reshape, so that the exported graph computes no sizes.

    `export.plain_graph` finds the streams by these reshapes.
    """
    return x.reshape(2, -1, *x.shape[1:]).unbind(0)
