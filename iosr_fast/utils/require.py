"""Optional packages are imported where they are used; a missing one is answered with the command that brings it.

Some of them report to their makers about the machine and its use: ONNX Runtime and OpenVINO when they are imported (a
device id in the home folder, events over the network), Ray when a cluster starts, huggingface_hub with a download. All
of that is switched off here, before any of them is imported: `import iosr_fast` imports this module. A value that is in
the environment already is kept.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# OpenVINO reads no such variable; where this package can't be imported it takes its own stub.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def require_installed(module: str, extra: str) -> None:
    """Raise what `require` raises where `module` can't be found, and import nothing."""
    if importlib.util.find_spec(module) is None:
        raise _missing(module, extra)


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise an ImportError that names the extra of iosr_fast which installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise _missing(module, extra) from error


def _missing(module: str, extra: str) -> ImportError:
    return ImportError(f"{module} is needed here and is not installed: pip install 'iosr_fast[{extra}]' brings it")
