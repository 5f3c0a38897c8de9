"""How many images are read: decoded and encoded, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from iosr_fast.files.stream import Errors, Stage, choose_batch, choose_stage, encode_all
from iosr_fast.images.decode import Decoder, choose_decoder

if TYPE_CHECKING:
    from iosr_fast.encoders.encoder import Embeddings, Encoder


@dataclass(frozen=True)
class Reader:
    """Reads images for an encoder, whose folder is `engine`: `batch` are encoded at a time, with `threads` cores on a
    CPU (None: all). With `skip_bad` unreadable images are reported, else the first one is raised."""

    encoder: Encoder
    engine: Path
    decoder: Decoder
    batch: int
    threads: int | None
    skip_bad: bool

    @classmethod
    def of(
        cls,
        encoder: Encoder,
        engine: Path,
        exif_orientation: bool,
        batch: int | None,
        skip_bad: bool,
        threads: int | None,
        decoder: str,
    ) -> Self:
        """The reader of the arguments of Classifier.predict_folder, and its errors about them."""
        chosen = choose_decoder(decoder, exif_orientation)
        return cls(encoder, engine, chosen, choose_batch(encoder, batch), threads, skip_bad)

    def stage(self, images: int) -> Stage:
        """How the cores are used for a number of images."""
        return choose_stage(self.encoder, self.engine, images, self.batch, self.threads)

    def embed(
        self, sources: Sequence[Any], advance: Callable[[int], None] = lambda images: None
    ) -> tuple[Errors, Embeddings | None]:
        """Each image's error, and the embeddings of all readable images; None if there are none."""
        return encode_all(
            self.encoder, self.engine, self.decoder, sources, self.batch, self.threads, self.skip_bad, advance
        )
