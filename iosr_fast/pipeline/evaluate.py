"""The work of Classifier.evaluate: labelled images, each encoded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.images.decoders import choose_decoder
from iosr_fast.pipeline.stream import choose_batch, encode_all
from iosr_fast.state.evaluation import Evaluation, evaluate

if TYPE_CHECKING:
    from iosr_fast.encoders.encoder import Embeddings, Encoder
    from iosr_fast.state.state import State


def evaluate_images(
    state: State,
    encoder: Encoder,
    engine: Path,
    images: Sequence[Any],
    class_ids: np.ndarray,
    unknown_images: Sequence[Any],
    *,
    coverage: float,
    keep: float,
    exif_orientation: bool,
    batch: int | None,
    skip_bad: bool,
    threads: int | None,
    decoder: str,
    advance: Callable[[int], None] = lambda images: None,
) -> Evaluation:
    """As Classifier.evaluate; `class_ids` (B,) are positions of classes. `engine` is `encoder`'s folder."""
    batch = choose_batch(encoder, batch)
    chosen = choose_decoder(decoder, encoder.input_device, exif_orientation)
    errors: list[BadImageError] = []

    def encoded(sources: Sequence[Any]) -> tuple[np.ndarray, list[Any], Embeddings | None]:
        """Positions and names of the readable images, and their embeddings."""
        unread, embeddings = encode_all(encoder, engine, chosen, sources, batch, threads, skip_bad, advance)
        errors.extend(error for error in unread if error is not None)
        rows = np.flatnonzero([error is None for error in unread])
        return rows, [source if isinstance(source := sources[i], str | Path) else i for i in rows.tolist()], embeddings

    rows, names, known = encoded(images)
    if known is None:
        raise IosrFastError(f"expected images to evaluate on, got {len(images)}, none of which can be read")
    _, others, unknown = encoded(unknown_images) if len(unknown_images) else (rows, [], None)
    return evaluate(
        state,
        known,
        class_ids[rows],
        images=names,
        unknown=unknown,
        unknown_images=others,
        coverage=coverage,
        keep=keep,
        errors=errors,
    )
