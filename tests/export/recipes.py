"""Programs of other runtimes for the tests of exported files, built once; skipped where what builds them is missing."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import runtimes
from tests.browser import playwright
from tests.demo_cache import build_once

RECIPES = runtimes.DOCS / "recipes"
UNREACHED = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ETIMEDOUT")  # npm's codes without a network
HEADER = Path("/usr/include/onnxruntime/onnxruntime_cxx_api.h")


def npm() -> Path:
    """A folder with npm's packages and the recipe for Node."""
    if shutil.which("npm") is None:
        pytest.skip("npm is missing (Debian's packages nodejs and npm)")
    try:
        return build_once("npm", [RECIPES / "classify.mjs"], runtimes.NPM, runtimes.install)
    except subprocess.CalledProcessError as error:
        if not any(code in error.stderr for code in UNREACHED):
            raise
        pytest.skip(f"npm reaches no registry: {error.stderr.strip()[:200]}")


def page() -> Path:
    """npm's folder, where there is a browser, too."""
    playwright()
    return npm()


def cpp() -> Path:
    """A folder with the recipe for C++, compiled."""
    if not HEADER.exists() or shutil.which("g++") is None:
        pytest.skip(f"g++ or {HEADER} is missing (Debian's package libonnxruntime-dev)")
    return build_once("c++", [RECIPES / "classify.cpp"], [], runtimes.compile_recipe)


TOOLS: dict[str, Callable[[], Path]] = {"node": npm, "wasm": npm, "chromium": page, "c++": cpp}
