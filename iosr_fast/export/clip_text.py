"""The text encoder of a loaded CLIP, for classifiers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.clip.load import LoadedClip
from iosr_fast.clip.prompts import default_templates, embed_classes
from iosr_fast.clip.tokenizer import Tokenizer
from iosr_fast.export.export_text import export_text
from iosr_fast.utils.files import in_cache
from iosr_fast.utils.folders import new_folder
from iosr_fast.utils.manifest import MANIFEST, SCHEMA, write_manifest
from iosr_fast.utils.verified_folder import open_verified

TEXT_KIND = "text-encoder"
TEXT_EXPORT = 2  # increases when export_text writes other files for the same CLIP


@dataclass(frozen=True)
class ClipText:
    """A TextSource over a loaded CLIP. Exporting takes seconds, so exports are cached."""

    clip: LoadedClip

    def embed_classes(self, names: Sequence[str], templates: Sequence[str] | None = None) -> np.ndarray:
        """As clip.prompts.embed_classes, with this CLIP."""
        return embed_classes(self.clip, names, templates)

    def write(self, folder: Path) -> dict[str, Any] | None:
        """Export text encoder and tokenizer into `folder`; None, with a warning, if they can't be exported."""
        export = in_cache("text", self._name())
        if not (export / MANIFEST).is_file():
            try:
                with new_folder(export, TEXT_KIND) as temporary:
                    write_manifest(temporary, TEXT_KIND, {"text": export_text(self.clip, temporary)})
            except (ValueError, ArithmeticError, ImportError, RuntimeError) as error:
                logging.getLogger("iosr_fast").warning("saved without a text encoder: %s", error)
                return None
        source = open_verified(export, TEXT_KIND)
        for name in source.files:
            source.copy(name, folder / name)
        # A CLIP of the same weights under another name has other prompts.
        return {**source.manifest["text"], "templates": list(default_templates(self.clip))}

    def _name(self) -> str:
        """Of the cached export. The CLIP's fingerprint covers its weights, not the files of a tokenizer."""
        tokenizer = self.clip.tokenizer
        tokens = f"-{tokenizer.digest()[:16]}" if isinstance(tokenizer, Tokenizer) else ""
        return f"{self.clip.fingerprint[:16]}{tokens}-v{SCHEMA}.{TEXT_EXPORT}"
