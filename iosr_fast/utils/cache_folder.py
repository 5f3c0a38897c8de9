"""Where iosr_fast keeps what it can make again: engines, plans compiled for this GPU. It may be deleted at any time."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """IOSR_FAST_CACHE, else iosr_fast in XDG_CACHE_HOME, else ~/.cache/iosr_fast. It need not exist yet."""
    chosen = os.environ.get("IOSR_FAST_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "iosr_fast"
