"""Optional packages are imported where they are used; a missing one is answered with the command that brings it."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise an ImportError that names the extra of iosr_fast which installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise ImportError(
            f"{module} is needed here and is not installed: pip install 'iosr_fast[{extra}]' brings it"
        ) from error
