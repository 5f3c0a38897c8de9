"""Chromium for the tests of pages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.runtimes import CHROMIUM

# No background requests, no GPU; runs as root in a container.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def playwright() -> Any:
    """Playwright, where it finds Chromium; without, the test is skipped."""
    if not os.access(CHROMIUM, os.X_OK):
        pytest.skip(f"no browser: {CHROMIUM} is missing (Debian's package chromium)")
    from playwright import sync_api

    return sync_api


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium. A module finds it by the name `browser`."""
    with playwright().sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()
