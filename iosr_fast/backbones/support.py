"""What is supported of a model, seen on its image encoder of shapes alone, before weights are downloaded."""

from __future__ import annotations

from dataclasses import dataclass

from iosr_fast.backbones.image_models import image_model, is_image_model
from iosr_fast.backbones.load import shapes_of
from iosr_fast.backbones.models import model_config, own_name
from iosr_fast.utils.require import require


@dataclass(frozen=True)
class ModelSupport:
    """What is supported of a model; `family` is the class of its image encoder.

    dual  its image encoder is fused with an adapter (backbones.dual_encoder); without one, every model has an engine
    text  its text encoder is exported, so that a saved classifier adds classes without PyTorch; False: it is one of
          Hugging Face's and runs in transformers; None: the model reads no texts
    """

    name: str
    tags: tuple[str, ...]
    family: str
    image_size: int
    width: int
    dual: bool
    text: bool | None


def list_models() -> list[ModelSupport]:
    """Every model of open_clip that has published weights, in 10 s."""
    open_clip = require("open_clip", "cpu")
    names = dict.fromkeys(name for name, _ in open_clip.list_pretrained())
    return [describe_model(name) for name in sorted(names, key=str.casefold)]


def describe_model(name: str) -> ModelSupport:
    """What is supported of one model. Raises for an unknown one as `model_config` and `image_model` do."""
    from iosr_fast.backbones.fuse import unfusible_reason

    if is_image_model(name):
        known = image_model(name)
        family, size = type(known.shapes).__name__, known.geometry.size
        return ModelSupport(name, known.tags, family, size, known.width, dual=False, text=None)
    config = model_config(name)
    size, visual = config["vision_cfg"].get("image_size", 224), shapes_of(name, config)
    return ModelSupport(
        name=name,
        tags=tuple(require("open_clip", "cpu").list_pretrained_tags_by_model(own_name(name))),
        family=type(getattr(visual, "trunk", visual)).__name__,
        image_size=size if isinstance(size, int) else size[0],
        width=config["embed_dim"],
        dual=unfusible_reason(visual, name) is None,
        text=not config["text_cfg"].get("hf_model_name"),
    )
