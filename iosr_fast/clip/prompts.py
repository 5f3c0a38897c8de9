"""Prompt templates, and class names -> text embeddings averaged over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from iosr_fast.exceptions import IosrFastError

if TYPE_CHECKING:
    from iosr_fast.clip.load import LoadedClip

PHOTO_TEMPLATES = ("a photo of a {}.", "a bad photo of a {}.", "a close-up photo of a {}.", "a drawing of a {}.")
MAX_TEMPLATES = 1000
_BATCH = 32  # texts of a run
# The demo's CLIP was trained with these (tools/demo/train_clip.py).
DEMO_TEMPLATES = ("{}", "a picture of {}", "an emoji of {}", "a drawing of {}", "an icon of {}")


def default_templates(clip: LoadedClip) -> tuple[str, ...]:
    """The templates that the demo's CLIP was trained with, or PHOTO_TEMPLATES for every other CLIP.

    SigLIP's authors evaluate it with CLIP's prompts, too (big_vision, discriminative_classifier.py, "clip_paper").
    """
    return DEMO_TEMPLATES if clip.name == "demo" else PHOTO_TEMPLATES


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """The templates as a tuple. Raises ValueError for none, too many, and one without a `{}` for the class name."""
    if not isinstance(templates, Sequence) or isinstance(templates, str) or not 1 <= len(templates) <= MAX_TEMPLATES:
        shown = f"{len(templates):,}" if isinstance(templates, Sequence) and len(templates) > 9 else repr(templates)
        raise IosrFastError(f"expected a list of one to {MAX_TEMPLATES:,} templates, got {shown}")
    for template in templates:
        if not isinstance(template, str) or "{}" not in template:
            raise IosrFastError(f"expected templates with {{}} where the class name goes, got {template!r}")
    return tuple(templates)


def embed_classes(clip: LoadedClip, class_names: Sequence[str], templates: Sequence[str] | None = None) -> np.ndarray:
    """(C, D) float32, L2-normalised: each class's mean over templates t of the normalised text(t.format(name)).

    `templates` default to `default_templates`. Raises ValueError as `check_templates` does. Source: Radford et al.
    2021, section 3.1.4.
    """
    import torch

    from iosr_fast.clip.text_tower import encode_tokens

    templates = default_templates(clip) if templates is None else check_templates(templates)
    texts = [template.replace("{}", name) for name in class_names for template in templates]
    with torch.inference_mode():
        parts = [encode_tokens(clip, clip.tokenizer(texts[i : i + _BATCH])) for i in range(0, len(texts), _BATCH)]
        means = torch.cat(parts).unflatten(0, (len(class_names), len(templates))).mean(1)
        return (means / means.norm(dim=1, keepdim=True)).numpy()
