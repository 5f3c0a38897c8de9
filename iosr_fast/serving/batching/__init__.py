"""Dynamic batching for concurrent callers. The other files are parts of `batching_classifier.py`."""

from iosr_fast.images.limits import DecodeLimits
from iosr_fast.serving.batching.batching_classifier import BatchingClassifier
from iosr_fast.serving.batching.item import Observer

__all__ = ["BatchingClassifier", "DecodeLimits", "Observer"]
