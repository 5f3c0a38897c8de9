"""Both embeddings of an image in one pass: the plain encoder and the encoder with the adapter, fused.

The paper's public code runs the whole encoder twice. Here the common part of both streams runs once. Every
transformation is exact up to rounding:

    shared prefix    blocks before the first adapted one, and that block's attention and MLP, see the image once; then
                     both streams run as one batch of 2B through shared weights, the adapter added to the second half
    CLS-only end     if the last block's output is used at the CLS token only, its query, out-projection and MLP run for
                     one token. With a single query q, <q, W_k x_j> = <W_k' q, x_j> and sum_j p_j W_v x_j =
                     W_v sum_j p_j x_j: no token is projected to a key or a value, except to keys that are rotated by
                     their positions. Key biases cancel in the softmax, value biases add up
    constant query   attention pooling has a constant query, so W_k' q is a constant too (dual_blocks.AttentionPool)
    preprocessing    the input is uint8 pixels; mean and std are folded into the first convolution and the positions
    scales           1/sqrt(head width) is folded into the query weights, LayerScale into the weights before it, the
                     adapter's scale into up_proj

One module serves every family of vision transformers (dual_config). It needs torch only; `fuse.build_dual_encoder`
converts a loaded open_clip model.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Self

from iosr_fast.utils.require import require_installed

require_installed("torch", "cpu")

import torch  # noqa: E402
from torch import nn  # noqa: E402

from iosr_fast.backbones.dual_blocks import AttentionPool, Block, LastBlock, Mlp, Norm, activate  # noqa: E402
from iosr_fast.backbones.dual_config import DualEncoderConfig  # noqa: E402


class DualEncoder(nn.Module):
    """pixels uint8 (B, S, S, 3) -> (plain, adapted), each (B, D) fp32, L2-normalised; (plain,) without an adapter."""

    def __init__(self, config: DualEncoderConfig) -> None:
        super().__init__()
        self.shapes = config
        width, dtype, kernels = config.width, config.dtype, config.kernels
        inputs = 3
        self.stem = nn.ModuleList()
        for kernel, outputs in config.stem:
            self.stem.append(nn.Linear(inputs * kernel**2, outputs, dtype=dtype))
            inputs = outputs
        self.patch_proj = nn.Linear(inputs * kernels[-1] ** 2, width, bias=False, dtype=dtype)
        if config.prefix:
            self.cls_token = nn.Parameter(torch.empty(1, config.prefix, width))  # and registers, with their positions
        self.position = nn.Parameter(torch.empty(config.tokens - config.prefix, width))  # with patch_proj's bias
        self.ln_pre = Norm(width, eps=config.eps) if config.ln_pre else nn.Identity()
        if config.rotary:
            self.rotary_cos, self.rotary_sin = (
                nn.Parameter(torch.empty(config.tokens, config.head_width, dtype=dtype)) for _ in range(2)
            )
        first = config.blocks if config.first_adapted_block is None else config.first_adapted_block
        last: type[Block] = LastBlock if config.pool == "cls" else Block
        self.blocks = nn.ModuleList(
            (last if i == config.blocks - 1 else Block)(config, adapted=i >= first) for i in range(config.blocks)
        )
        self.ln_post = Norm(width, eps=config.eps)
        self.pool = AttentionPool(config) if config.pool == "map" else None
        self.proj = (
            nn.Linear(width, config.embedding_width, bias=config.proj_bias, dtype=dtype)
            if config.proj
            else nn.Identity()
        )

    @property
    def image_size(self) -> int:
        return self.shapes.image_size

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what `forward` returns."""
        return ("plain",) if self.shapes.first_adapted_block is None else ("plain", "adapted")

    @property
    def config(self) -> dict[str, Any]:
        """JSON-ready; `DualEncoder.from_config(config)` and `load_state_dict` restore the module."""
        return asdict(self.shapes)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DualEncoder:
        """The module in evaluation mode with uninitialised weights. Raises ValueError for missing or unknown fields."""
        with torch.device("meta"):
            encoder = cls(DualEncoderConfig.from_dict(config))
        return encoder.to_empty(device="cpu").eval().requires_grad_(False)

    @torch.no_grad()
    def for_gpu(self) -> Self:
        """Fewer and larger kernels, for a GPU: one product for queries, keys and values, one kernel for an activation,
        and LayerNorms that take and give the dtype of the products. Gamma and beta are rounded to it; statistics stay
        fp32. Changes the module.

        The module of the files keeps three products, by whose names a graph is quantised.
        """
        for part in self.blocks:
            if isinstance(part, Block) and not isinstance(part, LastBlock):
                part.join_projections()
        for part in self.modules():
            if isinstance(part, Mlp):
                part.fold_activation()
            if isinstance(part, Norm) and part is not self.ln_pre:  # which reads fp32
                part.to(self.shapes.dtype)
        return self

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self._embed(pixels)
        rotary = (self.rotary_cos, self.rotary_sin) if self.shapes.rotary else None
        split = False
        for block in self.blocks:
            assert isinstance(block, Block)
            x = block.attend(x, rotary)
            update = block.mlp(x)
            if not block.adapted:
                x = x + update
            elif not split:
                plain = x + update
                x, split = torch.cat([plain, plain + block.adapt(x)]), True
            else:
                # As fast in ONNX Runtime as one GEMM [h, relu(down x)] @ [W_proj | scale W_up]; stores no weight twice.
                adapted, x = block.adapt(_halves(x)[1]), x + update
                first, second = _halves(x)
                if torch.compiler.is_exporting():
                    x = torch.cat([first, second + adapted])
                else:
                    second.add_(adapted)  # in x
        x = self.proj(self._pool(x)).float()
        # As F.normalize, whose exported form computes sizes.
        embeddings = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
        return tuple(_halves(embeddings)) if split else (embeddings,)

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        """(N, L, width) -> (N, width), ln_post before or after the pool; LastBlock has left the CLS token alone."""
        x = x if self.shapes.norm_after_pool else self.ln_post(x)
        if self.pool is not None:
            x = self.pool(x)
        elif self.shapes.pool == "avg":
            x = x[:, self.shapes.prefix :].float().mean(1).to(x.dtype)
        return self.ln_post(x) if self.shapes.norm_after_pool else x

    def _embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Convolutions, prefix tokens, positions, ln_pre: (B, S, S, 3) uint8 -> (B, tokens, width)."""
        side, patch = self.shapes.patches_per_side, self.shapes.patch_size
        # u = p/256 - 1/2 is exact in fp16 and centred, so folding the mean in loses no digits.
        x = pixels.to(self.shapes.dtype) * (1 / 256) - 0.5
        if side * patch != self.shapes.image_size:  # like the convolution, omit pixels that fill no patch
            x = x[:, : side * patch, : side * patch]
        x = self._windows(x)
        for layer in self.stem:
            x = activate(layer(x), self.shapes.activation)
            x = x.reshape(-1, *x.shape[1:-2], x.shape[-2] * x.shape[-1])
        x = self.patch_proj(x).float() + self.position
        if self.shapes.prefix:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        embedded: torch.Tensor = self.ln_pre(x)
        return embedded.to(self.shapes.dtype)

    def _windows(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels (B, S, S, 3) -> (B, patches, ..., 3 k**2) by the windows of the stem's convolutions.

        Windows don't overlap, so a convolution is a product with the flattened window. The axes between hold the
        windows of the later convolutions, the last first: the output of a product is flattened into the next window.
        """
        side, kernels = self.shapes.patches_per_side, self.shapes.kernels[::-1]
        levels = len(kernels)
        x = x.reshape(-1, side, *kernels, side, *kernels, 3)
        pairs = [axis for level in range(levels + 1) for axis in (1 + level, 2 + levels + level)]
        later = [kernel**2 for kernel in kernels[:-1]]
        return x.permute(0, *pairs, 3 + 2 * levels).reshape(-1, side * side, *later, 3 * kernels[-1] ** 2)


def is_adapter_weight(name: str) -> bool:
    """Whether an entry of a dual encoder's state dict belongs to the adapter."""
    return ".down_proj." in name or ".up_proj." in name


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(2B, ...) -> twice (B, ...), by a reshape, so that the exported graph computes no sizes.

    `export.onnx.plain_graph` finds the streams by these reshapes.
    """
    return x.reshape(2, -1, *x.shape[1:]).unbind(0)
