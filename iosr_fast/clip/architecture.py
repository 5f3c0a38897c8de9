"""What open_clip's configurations say of a model, before it is made or its weights are downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from iosr_fast.utils.require import require

_CUSTOM = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")


def vision_config(name: str) -> dict[str, Any] | None:
    """The configuration of a model's image encoder; None for a name that open_clip has none of."""
    found = require("open_clip", "train").get_model_config(name.replace("/", "-"))
    return None if found is None else dict(found["vision_cfg"])


def check_architecture(name: str) -> None:
    """Raise ValueError for a model of open_clip whose image encoder can't be fused (fuse.infer_config
    says so of a loaded model): another than open_clip's own VisionTransformer with the CLS token's output."""
    vision = vision_config(name)
    if vision is None:
        return
    kind = "timm" if vision.get("timm_model_name") else "ResNet" if isinstance(vision.get("layers"), list) else None
    if kind:
        raise ValueError(
            f"{name} has a {kind} image encoder; expected open_clip's VisionTransformer (ViT-B-32, ViT-B-16, ViT-L-14, "
            "ViT-L-14-336 and their kind)"
        )
    custom = [option for option in _CUSTOM if vision.get(option)]
    pooling = vision.get("pool_type", "tok")
    refused = {
        "an attentional pooler; expected the CLS token's output ('tok' pooling)": bool(vision.get("attentional_pool")),
        f"{pooling!r} pooling; expected 'tok' (the CLS token's output)": pooling != "tok",
        f"blocks of its own kind ({', '.join(custom) or vision.get('block_type')}); expected plain "
        "ResidualAttentionBlock": bool(custom) or vision.get("block_type", "default") not in ("default", None),
        "pictures or patches that are not square": any(
            isinstance(side, list) and side[0] != side[1]
            for side in (vision.get("image_size"), vision.get("patch_size"))
        ),
    }
    for what, found in refused.items():
        if found:
            raise ValueError(f"{name} can't be fused: its image encoder has {what}")


@contextmanager
def downloading(name: str, what: str) -> Iterator[None]:
    """What fails within the block as one OSError that names the model and the way out: which library fetches a file,
    and what it raises without a network, depends on the model."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise OSError(
            f"{what} of {name} can't be downloaded or read: {first}; where there is no network, copy the file here and "
            "give its path (pretrained=FILE, --pretrained FILE: .safetensors or .pt)"
        ) from error
