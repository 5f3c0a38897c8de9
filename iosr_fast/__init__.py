"""Few-shot CLIP classification with reduced intra-modal overlap.

Names are imported at first use, so that `import iosr_fast` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from iosr_fast.utils import require as _require  # noqa: F401  first of all: it switches telemetry off

if TYPE_CHECKING:
    from iosr_fast.classifier import Classifier
    from iosr_fast.encoders.encoder import Embeddings
    from iosr_fast.exceptions import IosrFastError
    from iosr_fast.few_shot_head import FewShotHead
    from iosr_fast.head.labelled_images import labelled_images
    from iosr_fast.scoring.plan import ScoringPlan
    from iosr_fast.scoring.score import score

    __version__: str

_HOME = {
    "Classifier": "classifier",
    "Embeddings": "encoders.encoder",
    "FewShotHead": "few_shot_head",
    "IosrFastError": "exceptions",
    "ScoringPlan": "scoring.plan",
    "labelled_images": "head.labelled_images",
    "score": "scoring.score",
}
__all__ = [
    "Classifier",
    "Embeddings",
    "FewShotHead",
    "IosrFastError",
    "ScoringPlan",
    "__version__",
    "labelled_images",
    "score",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("iosr_fast")
        except PackageNotFoundError:
            return "0+uninstalled"
    if name not in _HOME:
        raise AttributeError(f"module 'iosr_fast' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"iosr_fast.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
