"""From an image encoder and an adapter to a dual encoder; an encoder that can't be fused is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, get_args

from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.require import require_installed

require_installed("torch", "cpu")

import torch  # noqa: E402
from torch import nn  # noqa: E402

from iosr_fast.backbones.adapter import Adapter  # noqa: E402
from iosr_fast.backbones.dual_config import DualEncoderConfig, GraphPrecision  # noqa: E402
from iosr_fast.backbones.dual_encoder import DualEncoder  # noqa: E402
from iosr_fast.backbones.tower import Affine, AttentionPoolParts, BlockParts, MlpParts, TowerParts  # noqa: E402
from iosr_fast.backbones.vision_tower import vision_tower  # noqa: E402

if TYPE_CHECKING:
    from iosr_fast.backbones.load import LoadedModel

State = dict[str, torch.Tensor]


def build_dual_encoder(
    clip: LoadedModel, adapter: Adapter | None = None, precision: GraphPrecision = "fp32"
) -> DualEncoder:
    """Fuse a vision transformer of open_clip or timm (`vision_tower`) and its adapter; on the CPU.

    Without an adapter the result gives the plain embedding only. "fp16" is strongly typed: fp16 weights and GEMMs, fp32
    LayerNorm, softmax and last normalisation. `resize.resize_clip` gives a CLIP for smaller pictures.

    Raises ValueError for an image encoder that can't be fused: a convolutional network, an attentional pooler of
    open_clip, custom blocks.
    """
    if precision not in get_args(GraphPrecision):
        raise IosrFastError(f"expected a precision of {list(get_args(GraphPrecision))}, got {precision!r}")
    config = infer_config(clip.model.visual, clip.name, adapter, precision)
    encoder = DualEncoder.from_config(asdict(config))
    encoder.load_state_dict(fused_state_dict(clip, adapter, config))
    return encoder


def infer_config(
    visual: Any, name: str, adapter: Adapter | None = None, precision: GraphPrecision = "fp32"
) -> DualEncoderConfig:
    """The shapes of the dual encoder for an image encoder of open_clip, which may be of shapes alone
    (load.shapes_of). Raises ValueError, with the CLIP's `name`, for one that can't be fused."""
    tower = vision_tower(visual, name)
    _refuse(name, tower.refusals())
    parts = tower.parts()
    block, pool = parts.blocks[0], parts.attention_pool
    activation = _activation(name, block.mlp)
    _refuse(
        name,
        {
            "another activation in its stem than in its MLPs": len(parts.stem) > 1 and activation != "gelu",
            "another MLP in its attention pool than in its blocks": pool is not None
            and (_activation(name, pool.mlp) != activation or (pool.mlp.norm or block.mlp.norm) is not None),
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
        eps=_eps(name, parts),
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


def unfusible_reason(visual: Any, name: str) -> str | None:
    """Why this image encoder can't be fused, or None."""
    try:
        infer_config(visual, name)
    except IosrFastError as error:
        return str(error)
    return None


def check_adaptable(visual: Any, name: str) -> None:
    """Raise ValueError for an image encoder that can't have an adapter."""
    if reason := unfusible_reason(visual, name):
        raise IosrFastError(
            f"{reason}. Without an adapter {name} gives the plain embedding, for every method without ++"
        )


def _refuse(name: str, reasons: Mapping[str, bool]) -> None:
    """Raise ValueError with the first reason that applies."""
    for reason, applies in reasons.items():
        if applies:
            raise IosrFastError(f"{name} can't be fused: its image encoder has {reason}")


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


def fused_state_dict(clip: LoadedModel, adapter: Adapter | None, config: DualEncoderConfig) -> State:
    """The dual encoder's state dict in fp32: preprocessing, scales and biases are folded in float64."""
    parts = vision_tower(clip.model.visual, clip.name).parts()
    state: State = {}
    _put_norm(state, "ln_pre", parts.norm_pre)
    _put_norm(state, "ln_post", parts.norm)
    _put_embedding(state, parts, clip)
    if parts.rotary is not None:
        _put_rotary(state, parts.rotary, parts.half_layout, config.prefix)
    for i, block in enumerate(parts.blocks):
        last = config.pool == "cls" and i == config.blocks - 1
        interleaved = config.rotary and not parts.half_layout
        _put_block(state, f"blocks.{i}", block, config, last=last, interleaved=interleaved)
        if adapter is not None and str(i) in adapter.blocks:
            part: Any = adapter.blocks[str(i)]
            _put_affine(state, f"blocks.{i}.down_proj", Affine(part.down_proj.weight, part.down_proj.bias))
            _put_affine(state, f"blocks.{i}.up_proj", Affine(part.up_proj.weight, part.up_proj.bias), part.scale)
    if parts.attention_pool is not None:
        _put_attention_pool(state, parts.attention_pool)
    if parts.projection is not None:
        _put(state, "proj.weight", parts.projection.weight)
        if parts.projection.bias is not None:
            _put(state, "proj.bias", parts.projection.bias)
    return state


def _put(state: State, name: str, value: torch.Tensor) -> None:
    state[name] = value.detach().float().contiguous()


def _put_norm(state: State, prefix: str, norm: Any) -> None:
    if norm is not None:
        _put(state, f"{prefix}.weight", norm.weight)
        _put(state, f"{prefix}.bias", norm.bias)


def _put_affine(state: State, prefix: str, layer: Affine, scale: float | torch.Tensor = 1.0) -> None:
    """A layer with its output multiplied by `scale`, a number or one per output; a missing bias is 0."""
    weight, bias = _doubles(layer)
    per_row = scale.double().unsqueeze(1) if isinstance(scale, torch.Tensor) else scale
    _put(state, f"{prefix}.weight", weight * per_row)
    _put(state, f"{prefix}.bias", bias * scale)


def _doubles(layer: Affine) -> tuple[torch.Tensor, torch.Tensor]:
    weight = layer.weight.double()
    return weight, weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.double()


def _put_embedding(state: State, parts: TowerParts, clip: LoadedModel) -> None:
    """The stem's convolutions as products with flattened windows, the last one's bias with the positions."""
    bias = torch.zeros(())
    for i, layer in enumerate(parts.stem):
        kernel, bias = _doubles(layer)
        if i == 0:
            # Pixels p: (p/255 - mean)/std = (256/255 u + 128/255 - mean)/std with u = p/256 - 1/2, as the encoder has.
            mean, std = (torch.tensor(value, dtype=torch.float64).view(1, 3, 1, 1) for value in (clip.mean, clip.std))
            bias = bias + (kernel * ((128 / 255 - mean) / std)).sum((1, 2, 3))
            kernel = kernel * (256 / 255) / std
        weight = kernel.permute(0, 2, 3, 1).flatten(1)
        if i < len(parts.stem) - 1:
            _put(state, f"stem.{i}.weight", weight)
            _put(state, f"stem.{i}.bias", bias)
        else:
            _put(state, "patch_proj.weight", weight)
    _put(state, "position", parts.positions.double() + bias)
    if len(parts.prefix):
        _put(state, "cls_token", parts.prefix.double()[None])


def _put_rotary(state: State, rotary: tuple[torch.Tensor, torch.Tensor], half_layout: bool, prefix: int) -> None:
    """Tables for pairs (i, i + d/2); the sine is negative where the first of a pair takes the second."""
    sin, cos = (table[:, : table.shape[1] // 2] if half_layout else table[:, ::2] for table in rotary)
    pad = torch.zeros(prefix, 2 * sin.shape[1])
    _put(state, "rotary_cos", torch.cat([pad + 1, torch.cat([cos, cos], dim=1)]))
    _put(state, "rotary_sin", torch.cat([pad, torch.cat([-sin, sin], dim=1)]))


def _put_block(
    state: State, prefix: str, block: BlockParts, config: DualEncoderConfig, last: bool, interleaved: bool
) -> None:
    _put_norm(state, f"{prefix}.ln_1", block.norm_1)
    _put_norm(state, f"{prefix}.ln_2", block.norm_2)
    _put_norm(state, f"{prefix}.ln_attention", block.attention_norm)
    _put_mlp(state, prefix, block.mlp, block.scale_2)
    scale = 1.0 if block.scale_1 is None else block.scale_1
    query, key = block.query, block.key
    if interleaved:  # products of queries and keys stay the same
        query, key = (_pairs_apart(layer, config.heads) for layer in (query, key))
    _put_affine(state, f"{prefix}.q_proj", query, config.head_width**-0.5)
    if not last or config.rotary:
        _put_affine(state, f"{prefix}.k_proj", key)
    if not last:
        _put_affine(state, f"{prefix}.out_proj", block.out, scale)
        _put_affine(state, f"{prefix}.v_proj", block.value)
        return
    value, value_bias = _doubles(block.value)
    if not config.rotary:  # key biases cancel
        _put(state, f"{prefix}.k_weight", key.weight.view(config.heads, config.head_width, -1))
    _put(state, f"{prefix}.v_weight", value.view(config.heads, config.head_width, -1).transpose(1, 2))
    if config.attention_norm:
        _put(state, f"{prefix}.v_bias", value_bias)
        _put_affine(state, f"{prefix}.out_proj", block.out, scale)
    else:
        _put_affine(state, f"{prefix}.out_proj", _after_values(block.out, value_bias), scale)


def _after_values(out: Affine, value_bias: torch.Tensor) -> Affine:
    """out_proj with the value biases, which attention adds unchanged, because its weights sum to one."""
    weight, bias = _doubles(out)
    return Affine(weight, bias + weight @ value_bias)


def _pairs_apart(layer: Affine, heads: int) -> Affine:
    """The rows x0 y0 x1 y1 ... of each head as x0 x1 ... y0 y1 ...."""

    def reorder(rows: torch.Tensor) -> torch.Tensor:
        return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)

    return Affine(reorder(layer.weight), None if layer.bias is None else reorder(layer.bias))


def _put_mlp(state: State, prefix: str, mlp: MlpParts, scale: torch.Tensor | None = None) -> None:
    _put_affine(state, f"{prefix}.c_fc", mlp.expand)
    if mlp.gate is not None:
        _put_affine(state, f"{prefix}.c_gate", mlp.gate)
    _put_norm(state, f"{prefix}.ln_mlp", mlp.norm)
    _put_affine(state, f"{prefix}.c_proj", mlp.project, 1.0 if scale is None else scale)


def _put_attention_pool(state: State, pool: AttentionPoolParts) -> None:
    value, value_bias = _doubles(pool.value)
    key = pool.key.weight.double().view(pool.heads, -1, value.shape[1])
    query = pool.query.double().view(pool.heads, -1) * key.shape[1] ** -0.5
    _put(state, "pool.query.weight", torch.einsum("hd,hdw->hw", query, key))  # key biases cancel
    _put(state, "pool.v_weight", value.view(key.shape).transpose(1, 2))
    _put_affine(state, "pool.out_proj", _after_values(pool.out, value_bias))
    _put_norm(state, "pool.ln", pool.norm)
    _put_mlp(state, "pool", pool.mlp)
