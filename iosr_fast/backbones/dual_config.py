"""The shapes of a dual encoder, of whichever family."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

import torch

from iosr_fast.exceptions import IosrFastError

GraphPrecision = Literal["fp32", "fp16", "bf16"]
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class DualEncoderConfig:
    """All that `DualEncoder` needs besides its weights.

    The fields from `prefix` on describe other families than CLIP's own ViT, whose values are the defaults:

    prefix            tokens before the patches: CLS, registers
    stem              (kernel, width) of each convolution before the patch projection; activations between them
    rotary            queries and keys are rotated by their positions
    attention_norm, mlp_norm    LayerNorms before out_proj and before c_proj
    post_norm         LayerNorms at the ends of the branches, not at their starts
    pool              "cls": the CLS token's output; "avg": the mean of the patches; "map": attention with one query
    norm_after_pool   ln_post follows the pool
    pool_heads, pool_mlp_width, pool_prefix    of "map"; whether it attends to the prefix
    proj              False: the pool's output is the embedding
    """

    image_size: int
    patch_size: int
    width: int
    blocks: int
    heads: int
    mlp_width: int
    embedding_width: int
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"]
    ln_pre: bool
    eps: float
    precision: GraphPrecision
    first_adapted_block: int | None = None
    bottleneck: int | None = None
    prefix: int = 1
    stem: Sequence[tuple[int, int]] = ()
    rotary: bool = False
    attention_norm: bool = False
    mlp_norm: bool = False
    post_norm: bool = False
    pool: Literal["cls", "avg", "map"] = "cls"
    norm_after_pool: bool = False
    pool_heads: int = 0
    pool_mlp_width: int = 0
    pool_prefix: bool = False
    proj: bool = True
    proj_bias: bool = False

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> DualEncoderConfig:
        """From JSON. Raises ValueError for unknown fields and for missing ones without a default."""
        config = dict(config)
        if config.pop("merged", 0):  # 0 in engines of version 0.2
            raise IosrFastError(
                "the engine merges tokens, which iosr_fast no longer does: build it again; `iosr-fast optimize "
                "--smaller-images` tries engines with fewer tokens"
            )
        expected = {field.name for field in fields(cls)}
        required = {field.name for field in fields(cls) if field.default is MISSING}
        if not required <= set(config) <= expected:
            raise IosrFastError(
                f"expected the fields {sorted(expected)} in a dual encoder's config, got {sorted(config)}; "
                "was the engine built by another version of iosr_fast?"
            )
        return cls(**config)

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        return self.prefix + self.patches_per_side**2

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def kernels(self) -> tuple[int, ...]:
        """The sides of the windows of the stem's convolutions, the patch projection as the last."""
        before = [kernel for kernel, _ in self.stem]
        return (*before, self.patch_size // math.prod(before))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of GEMM weights and activations; LayerNorm, softmax and the last normalisation are always fp32."""
        return _DTYPES[self.precision]
