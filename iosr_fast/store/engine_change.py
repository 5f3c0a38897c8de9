"""The fastest engine for a fitted classifier: when it is fitted, and later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.engine_choice import EngineChoice
from iosr_fast.head.fit import FitInputs
from iosr_fast.head.fitted import Fit
from iosr_fast.images.preprocess import as_image_list
from iosr_fast.store.store import Store


def change_engine(
    store: Store,
    images: Any,
    labels: Sequence[Any] | np.ndarray,
    options: tuple[Any, ...],
    pretrained: str | Path | None,
    adapter: str | Path | None,
    unknown_images: Any,
) -> EngineChoice:
    """As Classifier.optimize, with the fields of OptimizeOptions: the head is encoded again with the chosen engine, and
    replaces the store's.

    Classes, ids, thumbnails, method and parameters stay. Where the embeddings change, so do the keys, and `version`
    rises by one. Raises IosrFastError for an unknown objective, a tolerance out of range, an example without its image,
    a head that was fitted with unknown images if there are none, another CLIP or adapter than the engine's, and where a
    log is open or the classifier changes meanwhile.
    """
    fit = store.fitted()
    head = fit.head.one_label("optimize", "it compares single labels; build the engine that you want")
    from iosr_fast.head.optimize import OptimizeOptions, optimize
    from iosr_fast.head.reencode import match_images

    chosen = OptimizeOptions(*options)
    store.check_no_log()
    listed, unknown = as_image_list(images), [] if unknown_images is None else as_image_list(unknown_images)
    if head.unknown_images is not None and not unknown:
        raise IosrFastError(
            f"this classifier was fitted with {len(head.unknown_images)} unknown images: expected unknown_images, so "
            "that the engine that is chosen can encode them, got none"
        )
    loaded = fit
    if pretrained is not None:
        from iosr_fast.export.pretrained import with_loaded

        loaded = replace(fit, clip=with_loaded(fit.clip, pretrained, adapter))
    sources = match_images(fit, listed, labels, chosen.progress)
    optimized = optimize(loaded, sources, chosen, head.version + 1, unknown)
    store.replace(optimized, instead_of=fit)
    assert optimized.engine_choice is not None
    return optimized.engine_choice


def with_fastest_engine(fit: Fit, inputs: FitInputs, runtime: str) -> Fit:
    """A new fit on its fastest engine, of one runtime or of any ("auto")."""
    from iosr_fast.head.optimize import OptimizeOptions, optimize

    options = OptimizeOptions(runtime=runtime, progress=inputs.progress)
    skipped, ids = {error.position for error in fit.skipped}, fit.head.examples.ids
    given = enumerate([*inputs.images, *inputs.unknown_images])
    readable = [image for position, image in given if position not in skipped]  # the support images first
    sources, unknown = [readable[number] for number in ids.tolist()], readable[len(ids) :]
    return optimize(fit, sources, options, fit.head.version, unknown)
