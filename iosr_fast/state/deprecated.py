"""Calls of version 0.1 that version 0.2 still takes, with a FutureWarning."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.estimator import Estimator

# Arguments of `fit` in version 0.1, which are parameters of Classifier now.
FIT_ARGUMENTS = (
    *("templates", "method", "alpha", "beta", "gamma", "ridge", "reducer", "tune", "views", "mirror", "seed"),
    *("skip_bad", "key_precision", "thumbnails", "exif_orientation", "progress"),
)


class DeprecatedCalls(Estimator):
    """The part of Classifier that goes with version 0.3."""

    @classmethod
    def from_pretrained(
        cls,
        model: str | None = None,
        pretrained: str | Path | None = None,
        adapter: str | Path | None = "auto",
        runtime: str = "auto",
        precision: str = "fp32",
        engine: str | Path | None = None,
        progress: bool = False,
    ) -> Self:
        """Deprecated: `Classifier(...)` takes the same arguments, and opens the CLIP at its first fit."""
        warnings.warn(
            "Classifier.from_pretrained(...) is deprecated and will go with version 0.3: write Classifier(...) with "
            "the same arguments (runtime, precision and engine by name); it opens the CLIP at its first fit",
            FutureWarning,
            stacklevel=2,
        )
        classifier = cls(model, pretrained, adapter)  # type: ignore[call-arg]
        classifier.set_params(runtime=runtime, precision=precision, engine=engine, progress=progress)
        _ = classifier.encoder  # type: ignore[attr-defined]  # opens the CLIP, as it always did
        return classifier

    def _take_fit_arguments(self, method: str, positional: Sequence[Any], named: dict[str, Any]) -> None:
        """Set the parameters that version 0.1 took as arguments of `fit` or `fit_folder`."""
        if positional:
            raise IosrFastError(
                f"expected images, labels and class_names, got {3 + len(positional)} arguments: the others are "
                f"parameters now, like Classifier(templates={positional[0]!r})"
            )
        if not named:
            return
        if unknown := [name for name in named if name not in FIT_ARGUMENTS]:
            hint = "; give it to Classifier(...)" if unknown[0] in self.get_params() else ""
            expected = "a folder" if method == "fit_folder" else "images, labels and class_names"
            raise IosrFastError(f"{method} takes {expected}, got {', '.join(unknown)}{hint}")
        given = ", ".join(f"{name}={value!r}" for name, value in named.items())
        warnings.warn(
            f"{method}(..., {given}) is deprecated and will go with version 0.3: these are parameters of Classifier "
            f"now. Write Classifier(..., {given}), or set_params({given}) before {method}",
            FutureWarning,
            stacklevel=3,
        )
        self.set_params(**named)
