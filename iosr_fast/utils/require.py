"""Optional packages, imported where they are used; the error for a missing one names the command that installs it.

Some of them send telemetry: ONNX Runtime and OpenVINO when they are imported (a device id in the home folder, events
over the network), Ray when a cluster starts, huggingface_hub with a download. This module switches all of it off, and
`import iosr_fast` imports it before any of them. Values already in the environment are kept.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType

from iosr_fast.exceptions import MissingPackageError

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# OpenVINO reads no such variable; if it can't import this package it uses its own stub.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def require_installed(module: str, extra: str) -> None:
    """Raise the error of `require` if `module` can't be found, without importing it."""
    if importlib.util.find_spec(module) is None:
        raise _missing(module, extra)


def require(module: str, extra: str = "") -> ModuleType:
    """Import `module`, or raise an ImportError that names the extra of iosr_fast that installs it, if one does."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise _missing(module, extra) from error


def _missing(module: str, extra: str) -> MissingPackageError:
    package = f"'iosr_fast[{extra}]'" if extra else module
    return MissingPackageError(f"{module} is needed here and is not installed: pip install {package} brings it")
