"""Where all tests together keep what is built of the demo's CLIP: its engine is built and exported once."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "IOSR_FAST_CACHE"


@functools.cache
def demo_cache() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="iosr-fast-cache-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextmanager
def shared_cache() -> Iterator[None]:
    """IOSR_FAST_CACHE as demo_cache() for the length of a with block."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(demo_cache())
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before
