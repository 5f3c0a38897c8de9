"""The HTTP server of a saved classifier: `iosr-fast serve BUNDLE`. Needs the `serve` extra.

Names are imported at first use, so that settings and the command line cost nothing but themselves.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iosr_fast.serving.http.app import create_app
    from iosr_fast.serving.http.server import run
    from iosr_fast.serving.http.settings import Settings

_HOME = {"Settings": "settings", "create_app": "app", "run": "server"}
__all__ = ["Settings", "create_app", "run"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'iosr_fast.serving.http' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"iosr_fast.serving.http.{_HOME[name]}"), name)
