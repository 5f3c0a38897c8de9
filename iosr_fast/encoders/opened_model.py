"""An opened model: what a classifier encodes images with, and class names where the model is a CLIP."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from iosr_fast.encoders.encoder import Encoder
from iosr_fast.encoders.engine_folder import has_plain_form
from iosr_fast.encoders.text_encoder import TextSource

if TYPE_CHECKING:
    from iosr_fast.backbones.adapter import Adapter
    from iosr_fast.backbones.load import LoadedModel

_opening = threading.Lock()  # of the process: a model with a lock of its own could not be pickled


@dataclass(frozen=True, eq=False)
class OpenedModel:
    """`encoder` for images, opened from the folder `engine`; `text` for class names, None if the model has no texts
    (`reads_text`) or a saved classifier no text encoder; `tau`, its logit scale; `loaded`, the model in torch
    and its adapter, None for a saved classifier.

    `encoder` gives both embeddings or, if it was opened so, the plain one alone. `encoder_for` opens the other form of
    the same engine at its first use, and keeps it: support images need both embeddings, queries those that their method
    compares. With `one_form` the open one serves for both, as classifiers that share it compare both.
    """

    encoder: Encoder
    engine: Path
    text: TextSource | None
    tau: float
    loaded: tuple[LoadedModel, Adapter | None] | None = None
    reads_text: bool = True
    one_form: bool = False
    _other: list[Encoder] = field(default_factory=list, init=False, repr=False)

    @property
    def has_adapter(self) -> bool:
        """Whether the model has an adapter, whichever form of its engine is open."""
        source = self.encoder.source
        return self.encoder.adapted or (source is not None and source.manifest["first_adapted_block"] is not None)

    def encoder_for(self, adapted: bool) -> Encoder:
        """The encoder that gives adapted embeddings, or the cheaper one that does not.

        The same encoder serves for both where the engine has one form, for example without an adapter.
        """
        from iosr_fast.encoders.runtimes import open_engine

        first, source = self.encoder, self.encoder.source
        if adapted == first.adapted or (first.adapted and self.one_form):
            return first
        if source is None or not has_plain_form(source.manifest, first.runtime):
            return first
        if not self._other:
            with _opening:
                if not self._other:  # by another thread meanwhile
                    self._other.append(open_engine(source, first.runtime, False, first.threads, first.runs, adapted))
        return self._other[0]
