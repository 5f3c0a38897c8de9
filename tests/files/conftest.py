"""Fixtures of this room: the demo's engine and a bundle, built once, and pictures as files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.demo_cache import demo_bundle
from tests.files.runs import write_pictures


@pytest.fixture(scope="session")
def bundle(demo_cache: Path) -> Iterator[Path]:
    """A classifier of 8 classes with 3 shots."""
    for module in ("torch", "onnxruntime", "onnxscript", "open_clip"):
        pytest.importorskip(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IOSR_FAST_CACHE", str(demo_cache))
        yield demo_bundle(8, 3)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    return write_pictures(tmp_path / "in", 30)
