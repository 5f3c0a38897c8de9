"""Where a classifier gets the embeddings of class names from, and how that goes into a bundle."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from iosr_fast.encoders.text_encoder import FILE, TOKENIZER_FILE, TextEncoder


class TextSource(Protocol):
    """A text encoder: a whole CLIP (offline.text.ClipText), or what a bundle has of one."""

    def embed_classes(self, names: Sequence[str], templates: Sequence[str] | None = None) -> np.ndarray:
        """(C, D) float32, L2-normalised: the mean over templates of the embeddings of template.format(name)."""
        ...

    def write(self, folder: Path) -> dict[str, Any] | None:
        """Put its files into an existing folder; the facts that open it again, or None where it can't be exported."""
        ...


class SavedText(TextEncoder):
    """The text encoder of a bundle, which goes on into the next bundle as it is."""

    def write(self, folder: Path) -> dict[str, Any]:
        """Copy the files as they were verified; the facts they were opened with. Raises ValueError for changed ones."""
        for name in (FILE, TOKENIZER_FILE):
            if self.held is None:
                shutil.copyfile(self.folder / name, folder / name)
            else:
                self.held.copy(name, folder / name)
        return self.facts
