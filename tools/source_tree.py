"""Imports where nothing is installed: PYTHONPATH names the source tree, in which kernels/ lies beside iosr_fast/."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def use_source_tree() -> None:
    """Make iosr_fast.kernels importable, which an installed package contains and a source tree has beside it."""
    if importlib.util.find_spec("iosr_fast.kernels") is not None:
        return
    import iosr_fast

    folder = ROOT / "kernels"
    spec = importlib.util.spec_from_file_location(
        "iosr_fast.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    iosr_fast.kernels = module  # type: ignore[attr-defined]
