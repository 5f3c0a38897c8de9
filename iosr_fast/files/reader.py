"""How the images of a run are read: decoded and encoded, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.encoders.rows import Rows, decode_rows
from iosr_fast.files.stream import Errors, Stage, batch_sizes, batches_of, choose_batch, choose_stage, encode_batches
from iosr_fast.images.preprocess import Decode, decode_batch

if TYPE_CHECKING:
    from iosr_fast.encoders.encoder import Encoder

_R = TypeVar("_R")


@dataclass(frozen=True)
class Reader:
    """Reads images for an encoder, whose folder is `engine`: `batch` are encoded at a time, with `threads` cores on a
    CPU (None: all). With `skip_bad` unreadable images are reported, else the first one is raised."""

    encoder: Encoder
    engine: Path
    decode: Decode
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
    ) -> Self:
        """The reader of the arguments of Classifier.predict_folder, and its errors about them."""
        pictures = partial(decode_batch, exif_orientation=exif_orientation)
        decode = decode_rows if isinstance(encoder, Rows) else pictures
        return cls(encoder, engine, decode, choose_batch(encoder, batch), threads, skip_bad)

    def stage(self, images: int) -> Stage:
        """How the cores are used for a number of images."""
        return choose_stage(self.encoder, self.engine, images, self.batch, self.threads)

    def read(
        self, sources: Sequence[Any], use: Callable[[Embeddings], _R]
    ) -> Generator[tuple[Errors, _R | None], None, None]:
        """For each batch of sources, in order, their errors, and `use` of the embeddings of the readable ones (None if
        there are none). Raises BadImageError for the first unreadable source unless `skip_bad`."""
        stage = self.stage(len(sources))
        return self.read_batches(stage, batches_of(sources, batch_sizes(len(sources), self.batch, stage.callers)), use)

    def read_batches(
        self, stage: Stage, batches: Iterable[tuple[int, Sequence[Any]]], use: Callable[[Embeddings], _R]
    ) -> Generator[tuple[Errors, _R | None], None, None]:
        """As `read`, of batches as `encode_batches` takes them."""
        with closing(encode_batches(stage, self.decode, batches, use)) as results:
            for errors, result in results:
                if not self.skip_bad and (unread := [error for error in errors if error is not None]):
                    raise unread[0]
                yield errors, result

    def embed(
        self, sources: Sequence[Any], advance: Callable[[int], None] = lambda images: None
    ) -> tuple[Errors, Embeddings | None]:
        """Each image's error, and the embeddings of all readable images; None if there are none."""
        errors: Errors = []
        parts: list[Embeddings] = []
        with closing(self.read(sources, Embeddings.to_numpy)) as batches:
            for unread, embeddings in batches:
                errors += unread
                if embeddings is not None:
                    parts.append(embeddings)
                advance(len(unread))
        return errors, Embeddings.concatenate(parts) if parts else None
