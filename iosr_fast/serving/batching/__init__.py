"""Dynamic batching for concurrent callers. BatchingClassifier is in `front.py`; the other files are its parts."""

from iosr_fast.images.limits import DecodeLimits
from iosr_fast.serving.batching.front import BatchingClassifier
from iosr_fast.serving.batching.item import Observer

__all__ = ["BatchingClassifier", "DecodeLimits", "Observer"]
