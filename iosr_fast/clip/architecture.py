"""Check open_clip's configuration of a model before its weights are downloaded. Needs open_clip, no weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.require import require

_CUSTOM = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")


def vision_config(name: str) -> dict[str, Any] | None:
    """The configuration of a model's image encoder; None for a name that open_clip does not know."""
    config = require("open_clip", "cpu").get_model_config(name.replace("/", "-"))
    return None if config is None else dict(config["vision_cfg"])


def check_architecture(name: str) -> None:
    """Raise ValueError for a model of open_clip that can't be fused; `fuse.infer_config` checks a loaded one.

    Only open_clip's VisionTransformer with the CLS token's output can be fused.
    """
    vision = vision_config(name)
    if vision is None:
        return
    kind = "timm" if vision.get("timm_model_name") else "ResNet" if isinstance(vision.get("layers"), list) else None
    if kind:
        raise not_a_vision_transformer(name, kind)
    custom = [option for option in _CUSTOM if vision.get(option)]
    pooling = vision.get("pool_type", "tok")
    reasons = {
        "an attentional pooler; expected the CLS token's output ('tok' pooling)": bool(vision.get("attentional_pool")),
        f"{pooling!r} pooling; expected 'tok' (the CLS token's output)": pooling != "tok",
        f"custom blocks ({', '.join(custom) or vision.get('block_type')}); expected plain ResidualAttentionBlock": bool(
            custom
        )
        or vision.get("block_type", "default") not in ("default", None),
        "pictures or patches that are not square": any(
            isinstance(side, list) and side[0] != side[1]
            for side in (vision.get("image_size"), vision.get("patch_size"))
        ),
    }
    refuse_fusing(name, reasons)


def not_a_vision_transformer(name: str, kind: str) -> IosrFastError:
    """The error for a model with another kind of image encoder."""
    return IosrFastError(
        f"{name} has a {kind} image encoder; expected open_clip's VisionTransformer (ViT-B-32, ViT-B-16, ViT-L-14, "
        "ViT-L-14-336 and similar models)"
    )


def refuse_fusing(name: str, reasons: Mapping[str, bool]) -> None:
    """Raise ValueError with the first reason that applies."""
    for reason, applies in reasons.items():
        if applies:
            raise IosrFastError(f"{name} can't be fused: its image encoder has {reason}")


@contextmanager
def downloading(name: str, what: str) -> Iterator[None]:
    """Raise any error of the block as an OSError that names the model and how to load it without a network.

    Which library downloads a file, and what it raises, depends on the model.
    """
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise OSError(
            f"{what} of {name} can't be downloaded or read: {first}; without a network, copy the file here and "
            "give its path (pretrained=FILE, --pretrained FILE: .safetensors or .pt)"
        ) from error
