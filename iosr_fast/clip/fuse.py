"""From an open_clip image encoder and an adapter to a dual encoder; an encoder that can't be fused is refused."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.require import require_installed

require_installed("torch", "cpu")

import torch  # noqa: E402
from torch import nn  # noqa: E402

from iosr_fast.clip.adapter import Adapter, check_belongs  # noqa: E402
from iosr_fast.clip.architecture import not_a_vision_transformer, refuse_fusing  # noqa: E402
from iosr_fast.clip.dual_encoder import DualEncoder, DualEncoderConfig, Precision  # noqa: E402

if TYPE_CHECKING:
    from iosr_fast.clip.load import LoadedClip

State = dict[str, torch.Tensor]


def infer_config(clip: LoadedClip, adapter: Adapter | None, precision: Precision, merged: int = 0) -> DualEncoderConfig:
    """The shapes of the dual encoder for this CLIP. Raises ValueError for an image encoder that can't be fused."""
    visual = clip.model.visual
    _check_fusible(clip.name, visual)
    blocks, norms = visual.transformer.resblocks, [m for m in visual.modules() if isinstance(m, nn.LayerNorm)]
    if len({norm.eps for norm in norms}) != 1 or any(norm.weight is None or norm.bias is None for norm in norms):
        raise IosrFastError(f"{clip.name}: expected LayerNorms with weight, bias and one eps throughout")
    return DualEncoderConfig(
        image_size=visual.image_size[0],
        patch_size=visual.conv1.kernel_size[0],
        width=visual.conv1.out_channels,
        blocks=len(blocks),
        heads=blocks[0].attn.num_heads,
        mlp_width=blocks[0].mlp.c_fc.out_features,
        embedding_width=visual.proj.shape[1],
        activation=_activation(clip.name, blocks[0].mlp.gelu),
        ln_pre=not isinstance(visual.ln_pre, nn.Identity),
        eps=norms[0].eps,
        precision=precision,
        first_adapted_block=None if adapter is None else adapter.config.first_adapted_block,
        bottleneck=None if adapter is None else adapter.config.bottleneck,
        merged=merged,
    )


def _check_fusible(name: str, visual: Any) -> None:
    kind = type(visual).__name__
    if kind != "VisionTransformer":
        raise not_a_vision_transformer(name, kind)
    (height, width), (patch_height, patch_width) = visual.image_size, visual.patch_size
    custom = {type(block).__name__ for block in visual.transformer.resblocks} - {"ResidualAttentionBlock"}
    reasons = {
        "an attentional pooler; expected the CLS token's output ('tok' pooling)": visual.attn_pool is not None,
        f"{visual.pool_type!r} pooling; expected 'tok' (the CLS token's output)": visual.pool_type != "tok",
        f"{'/'.join(sorted(custom))} blocks (query-key norms, cosine attention, scaled heads); expected plain "
        "ResidualAttentionBlock": bool(custom),
        f"images of {height}x{width} in patches of {patch_height}x{patch_width}; expected both square": height != width
        or patch_height != patch_width,
        "no projection to the embedding width": visual.proj is None,
    }
    refuse_fusing(name, reasons)


def _activation(name: str, module: nn.Module) -> Any:
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    if type(module).__name__ == "QuickGELU":
        return "quick_gelu"
    raise IosrFastError(f"{name} can't be fused: expected GELU or QuickGELU in its MLPs, got {type(module).__name__}")


def fused_state_dict(clip: LoadedClip, adapter: Adapter | None, config: DualEncoderConfig) -> State:
    """The dual encoder's state dict in fp32: preprocessing, scales and biases are folded in float64."""
    visual = clip.model.visual
    state: State = {}
    for name in ("ln_pre", "ln_post"):
        _copy(state, name, getattr(visual, name))
    state["proj.weight"] = visual.proj.double().T

    # Pixels p: (p/255 - mean)/std = (256/255 u + 128/255 - mean)/std with u = p/256 - 1/2, computed by the encoder.
    kernel = visual.conv1.weight.double()
    mean, std = (torch.tensor(value, dtype=torch.float64).view(1, 3, 1, 1) for value in (clip.mean, clip.std))
    state["patch_proj.weight"] = (kernel * (256 / 255) / std).permute(0, 2, 3, 1).flatten(1)
    bias = (kernel * ((128 / 255 - mean) / std)).sum((1, 2, 3))
    if visual.conv1.bias is not None:
        bias = bias + visual.conv1.bias.double()
    position = visual.positional_embedding.double()
    state["cls_token"] = (visual.class_embedding.double() + position[0]).view(1, 1, -1)
    state["position"] = position[1:] + bias

    for i, block in enumerate(visual.transformer.resblocks):
        _fold_block(state, f"blocks.{i}", block, config, last=i == config.blocks - 1)
        if adapter is not None and str(i) in adapter.blocks:
            part: Any = adapter.blocks[str(i)]
            _copy(state, f"blocks.{i}.down_proj", part.down_proj)
            _copy(state, f"blocks.{i}.up_proj", part.up_proj, scale=part.scale)
    return {key: value.detach().float().contiguous() for key, value in state.items()}


def _fold_block(state: State, prefix: str, block: Any, config: DualEncoderConfig, last: bool) -> None:
    for name in ("ln_1", "ln_2"):
        _copy(state, f"{prefix}.{name}", getattr(block, name))
    _copy(state, f"{prefix}.c_fc", block.mlp.c_fc)
    _copy(state, f"{prefix}.c_proj", block.mlp.c_proj, scale=_layer_scale(block.ls_2))
    _copy(state, f"{prefix}.out_proj", block.attn.out_proj, scale=_layer_scale(block.ls_1))

    width, head_width = config.width, config.width // config.heads
    weights = block.attn.in_proj_weight.double().view(3, width, width)
    biases = block.attn.in_proj_bias.double().view(3, width)
    state[f"{prefix}.q_proj.weight"] = weights[0] * head_width**-0.5
    state[f"{prefix}.q_proj.bias"] = biases[0] * head_width**-0.5
    if last:
        state[f"{prefix}.k_weight"] = weights[1].view(config.heads, head_width, width)
        state[f"{prefix}.v_weight"] = weights[2].view(config.heads, head_width, width).transpose(1, 2)
        # Attention weights sum to one, so the value biases are added unchanged.
        state[f"{prefix}.out_proj.bias"] = state[f"{prefix}.out_proj.bias"] + (
            state[f"{prefix}.out_proj.weight"] @ biases[2]
        )
    else:
        for j, name in enumerate(("k_proj", "v_proj"), start=1):
            state[f"{prefix}.{name}.weight"], state[f"{prefix}.{name}.bias"] = weights[j], biases[j]


def _copy(state: State, prefix: str, module: Any, scale: float | torch.Tensor = 1.0) -> None:
    """Copy weight and bias of a Linear or LayerNorm, its output multiplied by `scale` (a number, or one per output)."""
    if isinstance(module, nn.Identity):
        return
    per_row = scale.unsqueeze(1) if isinstance(scale, torch.Tensor) else scale
    state[f"{prefix}.weight"] = module.weight.double() * per_row
    state[f"{prefix}.bias"] = module.bias.double() * scale


def _layer_scale(module: Any) -> float | torch.Tensor:
    """LayerScale's gamma in float64; 1 for a block without one."""
    return 1.0 if isinstance(module, nn.Identity) else module.gamma.double()


def build_dual_encoder(
    clip: LoadedClip, adapter: Adapter | None = None, precision: Precision = "fp32", merged: int = 0
) -> DualEncoder:
    """Fuse an open_clip image encoder and its adapter; on the CPU, in evaluation mode.

    Without an adapter the result gives the plain embedding only. "fp16" is strongly typed: fp16 weights and GEMMs, fp32
    LayerNorm, softmax and last normalisation. Each block but the last merges `merged` tokens (token_merging), 0 for
    none; `resize.resize_clip` gives a CLIP for smaller pictures.

    Raises ValueError for an image encoder that can't be fused (no VisionTransformer, attentional pooler, average
    pooling, custom blocks), an adapter of another CLIP, and a negative `merged`.
    """
    if precision not in ("fp32", "fp16"):
        raise IosrFastError(f"expected precision 'fp32' or 'fp16', got {precision!r}")
    if adapter is not None:
        check_belongs(adapter, clip)
    if merged < 0:
        raise IosrFastError(f"expected merged of at least 0 tokens a block, got {merged}")
    config = infer_config(clip, adapter, precision, merged)
    encoder = DualEncoder.from_config(asdict(config))
    encoder.load_state_dict(fused_state_dict(clip, adapter, config))
    return encoder
