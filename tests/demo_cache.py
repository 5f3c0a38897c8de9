"""The demo's engine and saved classifiers, built once for all tests, workers and runs of one state of the sources."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests import ROOT

VARIABLE = "IOSR_FAST_CACHE"
CACHES = ROOT / "build" / "test-cache"
UNUSED_S = 24 * 3600
# The code that computes an engine, a text encoder and a saved classifier.
SOURCES = ("backbones", "delivery", "encoders", "export", "head", "images", "methods", "scoring", "sealed")
SOURCES += ("store", "utils")


@functools.cache
def demo_cache() -> Path:
    """A folder for IOSR_FAST_CACHE, named after the sources; it holds whatever an earlier test built of the demo."""
    digest = hashlib.sha256()
    package = ROOT / "iosr_fast"
    files = [path for room in SOURCES for path in (package / room).rglob("*")]
    for path in sorted([*files, package / "classifier.py", ROOT / "tools" / "demo" / "bundle.py"]):
        if path.suffix in (".py", ".json", ".safetensors", ".webp"):
            digest.update(f"{path.relative_to(ROOT)} {hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
    folder = CACHES / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    for other in CACHES.iterdir():
        if other.is_dir() and other.stat().st_mtime < time.time() - UNUSED_S:
            shutil.rmtree(other, ignore_errors=True)
    return folder


@contextmanager
def shared_cache() -> Iterator[None]:
    """Set IOSR_FAST_CACHE to demo_cache() within the block, in which one process at a time builds."""
    before = os.environ.get(VARIABLE)
    with _locked(demo_cache()):
        os.environ[VARIABLE] = str(demo_cache())
        try:
            yield
        finally:
            del os.environ[VARIABLE]
            if before is not None:
                os.environ[VARIABLE] = before


def demo_bundle(classes: int = 12, shots: int = 3, method: str = "tip-adapter++") -> Path:
    """A saved classifier of the demo, written once (make_demo_bundle). Read it, never change it."""
    from tools.demo.bundle import make_demo_bundle

    folder = demo_cache() / "bundles" / f"{classes}-{shots}-{method}"
    with shared_cache():
        if not (folder / "manifest.json").is_file():
            make_demo_bundle(folder, classes, shots, method)
    return folder


def demo_engine() -> Path:
    """The demo's ONNX Runtime engine with the shipped adapter, in fp32. Read it, never change it."""
    return demo_bundle() / "engine"


def build_once(name: str, sources: Iterable[Path], facts: Sequence[str], build: Callable[[Path], None]) -> Path:
    """The folder that build(folder) has filled, once for these sources (files or folders) and facts (flags, versions).

    A build that raises leaves nothing; test workers wait for one another.
    """
    digest = hashlib.sha256("\0".join([name, *facts]).encode())
    files = [file for path in sources for file in ([path] if path.is_file() else path.rglob("*"))]
    for file in sorted(file for file in files if file.is_file() and "__pycache__" not in file.parts):
        digest.update(f"{file.relative_to(ROOT)} {hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
    CACHES.mkdir(parents=True, exist_ok=True)
    folder = CACHES / f"{name}-{digest.hexdigest()[:16]}"
    with _locked(folder):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=CACHES, ignore_cleanup_errors=True) as unfinished:
                build(Path(unfinished))
                Path(unfinished).rename(folder)
    os.utime(folder)  # demo_cache removes what has not been used for a day
    return folder


def export_once(encoder: Any, path: Path) -> None:
    """`export_onnx` to `path`, encoder.onnx in some folder: it takes seconds, and runs once for each encoder."""
    from iosr_fast.export.onnx import export_onnx

    weights = hashlib.sha256()
    for value in encoder.state_dict().values():
        weights.update(value.numpy().tobytes())
    packages = ("torch", "onnx", "onnxscript", "open_clip_torch", "timm")
    facts = [str(getattr(encoder, "config", encoder)), weights.hexdigest(), *map(version, packages)]
    # The helpers of the tests choose what a plain encoder computes.
    rooms = ("iosr_fast/backbones", "iosr_fast/export", "tests/backbones")
    code = [file for room in rooms for file in (ROOT / room).rglob("*.py") if not file.name.startswith("test_")]
    cached = build_once("export", code, facts, lambda folder: export_onnx(encoder, folder / "encoder.onnx"))
    assert path.name == "encoder.onnx", "the graph names the weights file, encoder.weights"
    for file in cached.iterdir():
        shutil.copyfile(file, path.with_name(file.name))


_depths: dict[Path, int] = {}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time for each folder. A block within a block of the same process enters at once."""
    with folder.with_suffix(".lock").open("w") as file:
        depth = _depths.get(folder, 0)
        if depth == 0:
            fcntl.flock(file, fcntl.LOCK_EX)
        _depths[folder] = depth + 1
        try:
            yield
        finally:
            _depths[folder] = depth
