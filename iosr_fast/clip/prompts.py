"""Class names -> text embeddings, averaged over prompt templates."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iosr_fast.clip.load import LoadedClip
from iosr_fast.utils.files import MANIFEST, SCHEMA, new_folder, write_manifest
from iosr_fast.utils.verified_folder import hold

PHOTO_TEMPLATES = ("a photo of a {}.", "a bad photo of a {}.", "a close-up photo of a {}.", "a drawing of a {}.")
TEXT_KIND = "text-encoder"
TEXT_EXPORT = 1  # goes up when export_text makes other files of the same CLIP
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


@dataclass(frozen=True)
class ClipText:
    """A CLIP's text encoder, as text_source.TextSource asks for it."""

    clip: LoadedClip
    kept_in: Path  # exports are kept here: exporting takes seconds

    def embed_classes(self, names: Sequence[str], templates: Sequence[str] | None = None) -> np.ndarray:
        """embed_classes of this CLIP."""
        return embed_classes(self.clip, names, templates)

    def write(self, folder: Path) -> dict[str, Any] | None:
        """Export text encoder and tokenizer into `folder`; None, with a warning, where this CLIP's can't be."""
        from iosr_fast.export.export_text import export_text

        kept = self.kept_in / f"{self.clip.fingerprint[:16]}-v{SCHEMA}.{TEXT_EXPORT}"
        if not (kept / MANIFEST).is_file():
            try:
                with new_folder(kept) as made:
                    write_manifest(made, TEXT_KIND, {"text": export_text(self.clip, made)})
            except (ValueError, ArithmeticError, ImportError, RuntimeError) as error:
                logging.getLogger("iosr_fast").warning("saved without a text encoder: %s", error)
                return None
        held = hold(kept, TEXT_KIND)
        for name in held.files:
            held.copy(name, folder / name)
        facts: dict[str, Any] = held.manifest["text"]
        return facts
