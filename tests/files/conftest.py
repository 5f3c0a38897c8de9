"""Fixtures of this room: the demo's engine and a bundle, built once, and pictures as files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.demo_cache import demo_bundle
from tests.files.runs import write_pictures


@pytest.fixture(scope="session")
def _demo(demo_cache: Path) -> Iterator[None]:
    for module in ("torch", "onnxruntime", "onnxscript", "open_clip"):
        pytest.importorskip(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IOSR_FAST_CACHE", str(demo_cache))
        yield


@pytest.fixture(scope="session")
def engine(_demo: None) -> Path:
    from iosr_fast.cli.embed import find_engine

    return find_engine("demo")


@pytest.fixture(scope="session")
def bundle(_demo: None) -> Path:
    """A classifier of 8 classes with 3 shots."""
    return demo_bundle(8, 3)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    return write_pictures(tmp_path / "in", 30)
