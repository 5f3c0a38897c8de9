"""The shapes of the dual encoder for a CLIP, or why its image encoder can't be fused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.require import require_installed

require_installed("torch", "cpu")

from torch import nn  # noqa: E402

from iosr_fast.clip.adapter import Adapter  # noqa: E402
from iosr_fast.clip.architecture import refuse_fusing  # noqa: E402
from iosr_fast.clip.dual_config import DualEncoderConfig, Precision  # noqa: E402
from iosr_fast.clip.tower import MlpParts, TowerParts  # noqa: E402
from iosr_fast.clip.vision_tower import vision_tower  # noqa: E402

if TYPE_CHECKING:
    from iosr_fast.clip.load import LoadedClip


def infer_config(clip: LoadedClip, adapter: Adapter | None, precision: Precision) -> DualEncoderConfig:
    """The shapes of the dual encoder for this CLIP. Raises ValueError for an image encoder that can't be fused."""
    tower = vision_tower(clip.model.visual, clip.name)
    refuse_fusing(clip.name, tower.refusals())
    parts = tower.parts()
    block, pool = parts.blocks[0], parts.attention_pool
    activation = _activation(clip.name, block.mlp)
    refuse_fusing(
        clip.name,
        {
            "another activation in its stem than in its MLPs": len(parts.stem) > 1 and activation != "gelu",
            "another MLP in its attention pool than in its blocks": pool is not None
            and (_activation(clip.name, pool.mlp) != activation or (pool.mlp.norm or block.mlp.norm) is not None),
        },
    )
    return DualEncoderConfig(
        image_size=tower.image_size[0],
        patch_size=tower.patch_size,
        width=tower.width,
        blocks=len(parts.blocks),
        heads=tower.heads,
        mlp_width=len(block.mlp.expand.weight),
        embedding_width=tower.embedding_width,
        activation=activation,
        ln_pre=parts.norm_pre is not None,
        eps=_eps(clip.name, parts),
        precision=precision,
        first_adapted_block=None if adapter is None else adapter.config.first_adapted_block,
        bottleneck=None if adapter is None else adapter.config.bottleneck,
        prefix=tower.prefix,
        stem=tuple((conv.weight.shape[-1], len(conv.weight)) for conv in parts.stem[:-1]),
        rotary=parts.rotary is not None,
        attention_norm=block.attention_norm is not None,
        mlp_norm=block.mlp.norm is not None,
        post_norm=block.post_norm,
        pool=parts.pool,
        norm_after_pool=parts.norm_after_pool,
        pool_heads=0 if pool is None else pool.heads,
        pool_mlp_width=0 if pool is None else len(pool.mlp.expand.weight),
        pool_prefix=pool is not None and pool.with_prefix,
        proj=parts.projection is not None,
        proj_bias=parts.projection is not None and parts.projection.bias is not None,
    )


def unfusible_reason(clip: LoadedClip) -> str | None:
    """Why this CLIP's image encoder can't be fused, or None."""
    try:
        infer_config(clip, None, "fp32")
    except IosrFastError as error:
        return str(error)
    return None


def _activation(name: str, mlp: MlpParts) -> Any:
    """The config's name of an MLP's activation, which open_clip, PyTorch and timm have under several class names."""
    kind = type(mlp.activation).__name__
    if getattr(mlp.activation, "approximate", "none") == "tanh":
        kind = "GELUTanh"
    known = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}
    if mlp.gate is not None:
        known = {"SiLU": "swiglu"}
    if kind not in known:
        gated = "" if mlp.gate is None else " with a gate"
        raise IosrFastError(f"{name} can't be fused: expected GELU, QuickGELU or SwiGLU in its MLPs, got {kind}{gated}")
    return known[kind]


def _eps(name: str, parts: TowerParts) -> float:
    """The eps of all LayerNorms. Raises ValueError unless they have one, and weights and biases."""
    norms = [parts.norm, parts.norm_pre, parts.attention_pool and parts.attention_pool.norm]
    for block in parts.blocks:
        norms += [block.norm_1, block.norm_2, block.attention_norm, block.mlp.norm]
    used = [norm for norm in norms if norm is not None]
    eps = {norm.eps for norm in used if isinstance(norm, nn.LayerNorm) and norm.weight is not None}
    if len(eps) != 1 or not all(isinstance(norm, nn.LayerNorm) and norm.bias is not None for norm in used):
        raise IosrFastError(f"{name}: expected LayerNorms with weight, bias and one eps throughout")
    return float(eps.pop())
