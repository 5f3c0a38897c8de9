"""Changing the engine of a fitted classifier for the fastest one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.engine_choice import EngineChoice, Objective
from iosr_fast.head.fit import Fit, FitInputs
from iosr_fast.images.preprocess import as_image_list
from iosr_fast.store.updates import LiveUpdates


class Optimizing(LiveUpdates):
    """The part of Classifier that chooses its engine."""

    progress: bool
    runtime: str

    def optimize(
        self,
        images: Any,
        labels: Sequence[Any] | np.ndarray,
        objective: Objective = "latency",
        tolerance: float = 0.5,
        runtime: str = "auto",
        precision: str = "auto",
        pretrained: str | Path | None = None,
        adapter: str | Path | None = "auto",
        smaller_images: bool = False,
        unknown_images: Any = None,
    ) -> EngineChoice:
        """Choose the fastest engine that this machine can run and that keeps the accuracy; encode the examples with it.

        `images` and `labels` are those of the fit, in any order, and of later changes; images that are no example are
        left out. Runtimes and precisions are built, calibrated on the images, timed, and judged by the labels of
        left-out examples; `tolerance` is the loss of accuracy in points that is accepted (engine_choice.rejection has
        the rule). The `objective` is "latency" (one image), "throughput" (a batch) or "size" (the engine's bytes).
        `runtime` and `precision` restrict the candidates. Returns the table, which is also `engine_choice_` and is
        saved with the classifier.

        A classifier that was fitted with `unknown_images` needs pictures of none of the classes again, those of the fit
        or others. Classes, ids, thumbnails, method and parameters stay. Where the embeddings change, so do the keys:
        `version` rises by one, and an audit log that began before refuses the classifier. Some engines are exported
        from the CLIP in torch: fp16, on a GPU int8 and fp8, and any other of a classifier that is not in fp32. A loaded
        classifier has no CLIP, so these are left out unless `pretrained` (and `adapter`) name it as for Classifier.

        `smaller_images` tries engines for smaller images, too, with interpolated positions. Their embeddings are
        others, so any loss above the tolerance rejects them.

        Raises ValueError for an unknown objective, a tolerance out of range, an example without its image, another
        CLIP or adapter than the engine's, and where a log is open or the classifier changes meanwhile.
        """
        self._fitted().head.one_label("optimize", "it compares single labels; build the engine that you want")
        from iosr_fast.head.optimize import OptimizeOptions, optimize
        from iosr_fast.head.reencode import match_images

        options = OptimizeOptions(objective, tolerance, runtime, precision, smaller_images, bool(self.progress))
        fit = self._fitted()
        self._check_no_log()
        listed, unknown = as_image_list(images), [] if unknown_images is None else as_image_list(unknown_images)
        if fit.head.unknown_images is not None and not unknown:
            raise IosrFastError(
                f"this classifier was fitted with {len(fit.head.unknown_images)} unknown images: expected "
                "unknown_images, so that the engine that is chosen can encode them, got none"
            )
        loaded = fit
        if pretrained is not None:
            from iosr_fast.export.pretrained import with_loaded

            loaded = replace(fit, clip=with_loaded(fit.clip, pretrained, adapter))
        sources = match_images(fit, listed, labels, options.progress)
        optimized = optimize(loaded, sources, options, fit.head.version + 1, unknown)
        with self._changing:
            if self._fitted() is not fit:
                raise IosrFastError("the classifier has changed while engines were tried: optimize again")
            self._check_no_log()
            self._fit = optimized
        choice = optimized.engine_choice
        assert choice is not None
        return choice

    def _with_best_engine(self, fit: Fit, inputs: FitInputs) -> Fit:
        """A new fit on its fastest engine."""
        from iosr_fast.head.optimize import OptimizeOptions, optimize
        from iosr_fast.head.reencode import support_sources

        options = OptimizeOptions(runtime=self.runtime, progress=bool(self.progress))
        skipped = {error.position for error in fit.skipped}
        unknown = [image for i, image in enumerate(inputs.unknown_images, len(inputs.images)) if i not in skipped]
        return optimize(fit, support_sources(fit, inputs.images), options, fit.head.version, unknown)
