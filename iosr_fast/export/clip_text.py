"""The text encoder of a CLIP in torch, as a classifier asks for it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.clip.load import LoadedClip
from iosr_fast.clip.prompts import embed_classes
from iosr_fast.export.export_text import export_text
from iosr_fast.utils.files import new_folder
from iosr_fast.utils.manifest import MANIFEST, SCHEMA, write_manifest
from iosr_fast.utils.verified_folder import open_verified

TEXT_KIND = "text-encoder"
TEXT_EXPORT = 1  # raise it when export_text writes other files for the same CLIP


@dataclass(frozen=True)
class ClipText:
    """A CLIP's text encoder, as encoders.text_encoder.TextSource describes it."""

    clip: LoadedClip
    kept_in: Path  # exports are kept here: exporting takes seconds

    def embed_classes(self, names: Sequence[str], templates: Sequence[str] | None = None) -> np.ndarray:
        """embed_classes of this CLIP."""
        return embed_classes(self.clip, names, templates)

    def write(self, folder: Path) -> dict[str, Any] | None:
        """Export text encoder and tokenizer into `folder`; None, with a warning, where this CLIP's can't be."""
        kept = self.kept_in / f"{self.clip.fingerprint[:16]}-v{SCHEMA}.{TEXT_EXPORT}"
        if not (kept / MANIFEST).is_file():
            try:
                with new_folder(kept) as made:
                    write_manifest(made, TEXT_KIND, {"text": export_text(self.clip, made)})
            except (ValueError, ArithmeticError, ImportError, RuntimeError) as error:
                logging.getLogger("iosr_fast").warning("saved without a text encoder: %s", error)
                return None
        held = open_verified(kept, TEXT_KIND)
        for name in held.files:
            held.copy(name, folder / name)
        facts: dict[str, Any] = held.manifest["text"]
        return facts
