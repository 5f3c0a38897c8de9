"""Class names -> text embeddings, averaged over prompt templates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from iosr_fast.clip.load import LoadedClip

PHOTO_TEMPLATES = ("a photo of a {}.", "a bad photo of a {}.", "a close-up photo of a {}.", "a drawing of a {}.")
# What the demo's CLIP was trained with (tools/demo/train_clip.py).
DEMO_TEMPLATES = ("{}", "a picture of {}", "an emoji of {}", "a drawing of {}", "an icon of {}")


def default_templates(clip: LoadedClip) -> tuple[str, ...]:
    """The templates for whom none were chosen."""
    return DEMO_TEMPLATES if clip.name == "demo" else PHOTO_TEMPLATES


def embed_classes(clip: LoadedClip, class_names: Sequence[str], templates: Sequence[str] | None = None) -> np.ndarray:
    """(C, D) float32, L2-normalised: each class's mean over templates t of the normalised text(t.format(name)).

    Raises ValueError for a template without a `{}` to put the name into. Source: Radford et al. 2021, section 3.1.4.
    """
    templates = default_templates(clip) if templates is None else templates
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"expected templates with {{}} where the class name goes, got {template!r}")
    rows = []
    with torch.inference_mode():
        for name in class_names:
            tokens = clip.tokenizer([template.replace("{}", name) for template in templates])
            mean = clip.model.encode_text(tokens, normalize=True).mean(0)
            rows.append(mean / mean.norm())
    return torch.stack(rows).numpy()
