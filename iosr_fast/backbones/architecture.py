"""What open_clip's configuration of an image encoder says, before weights are downloaded: whether it can be fused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from iosr_fast.exceptions import IosrFastError

_CUSTOM = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
# timm's names of the vision transformers that `fuse` reads, and the family of each.
_TIMM_FAMILIES = {
    r"vit_\w+_siglip_\d+": "siglip",
    r"vit_\w+_(clip|gap)_\d+": "vit",
    r"vit_base_mci_\d+": "mobileclip-b",
    r"vit_pe_core_\w+": "pe-core",
    r"eva_giant_\w+": "eva",
    r"eva02_\w+": "eva02",
}


def fused_family(vision: Mapping[str, Any]) -> str | None:
    """The family of an image encoder that can be fused, by its configuration; None if it can't be.

    vit           open_clip's VisionTransformer with the CLS token's output, and timm's copies of it
    clipa         the same with the mean of its patches
    siglip, pe-core, eva, eva02, mobileclip-b    timm's transformers of these names

    Examples:
        >>> fused_family({"layers": 12, "width": 768, "patch_size": 16})
        'vit'
        >>> fused_family({"timm_model_name": "convnext_base", "timm_proj": "linear"}) is None
        True
    """
    return None if any(_refusals(vision).values()) else _family(vision)


def check_architecture(name: str, vision: Mapping[str, Any]) -> None:
    """Raise ValueError for an image encoder that can't be fused; `fuse.infer_config` checks a loaded one."""
    if _family(vision) is None:
        raise not_a_vision_transformer(name, vision.get("timm_model_name") or "ResNet")
    refuse_fusing(name, _refusals(vision))


def _family(vision: Mapping[str, Any]) -> str | None:
    """The family by name, whatever the options; None for what is no transformer that `fuse` knows."""
    timm_name = vision.get("timm_model_name")
    if timm_name:
        return next((family for name, family in _TIMM_FAMILIES.items() if re.fullmatch(name, timm_name)), None)
    if isinstance(vision.get("layers"), list | tuple):
        return None
    return "clipa" if vision.get("pool_type") == "avg" else "vit"


def _refusals(vision: Mapping[str, Any]) -> dict[str, bool]:
    """{what can't be fused: whether this configuration has it}."""
    if _family(vision) is None:
        return {"no transformer": True}
    if vision.get("timm_model_name"):
        pool, projection = vision.get("timm_pool", "avg"), vision.get("timm_proj", "linear")
        return {
            f"{pool!r} pooling; expected 'token', 'avg', 'map' or timm's own": pool not in ("token", "avg", "map", ""),
            f"{projection!r} projection; expected a linear one or none": projection == "mlp",
        }
    custom = [option for option in _CUSTOM if vision.get(option)]
    pooling = vision.get("pool_type", "tok")
    return {
        "an attentional pooler; expected the CLS token or the mean of patches": bool(vision.get("attentional_pool")),
        f"{pooling!r} pooling; expected 'tok' (the CLS token) or 'avg' (the mean of patches)": pooling
        not in ("tok", "avg"),
        f"custom blocks ({', '.join(custom) or vision.get('block_type')}); expected plain ResidualAttentionBlock": bool(
            custom
        )
        or vision.get("block_type", "default") not in ("default", None),
        "pictures or patches that are not square": any(
            isinstance(side, list) and side[0] != side[1]
            for side in (vision.get("image_size"), vision.get("patch_size"))
        ),
    }


def not_a_vision_transformer(name: str, kind: str) -> IosrFastError:
    """The error for a model with another kind of image encoder."""
    return IosrFastError(
        f"{name} has a {kind} image encoder; expected a vision transformer of open_clip or timm (ViT-B-16, "
        "ViT-L-14, ViT-B-16-SigLIP2, PE-Core-B-16, EVA02-B-16 and similar models)"
    )


def refuse_fusing(name: str, reasons: Mapping[str, bool]) -> None:
    """Raise ValueError with the first reason that applies."""
    for reason, applies in reasons.items():
        if applies:
            raise IosrFastError(f"{name} can't be fused: its image encoder has {reason}")
