"""Chromium for the tests of pages, and the application on a free port."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from iosr_fast import Classifier

CHROMIUM = "/usr/bin/chromium"
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


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; tests that ask for it are skipped without one. A module finds it by the name `browser`."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright comes with the dev extra")
    if not os.access(CHROMIUM, os.X_OK):
        pytest.skip(f"no browser: {CHROMIUM} is missing (Debian's package chromium)")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@contextlib.contextmanager
def served(classifier: Classifier, token: str) -> Iterator[str]:
    """The address of the application around `classifier`, served by a thread on a free port."""
    import uvicorn  # of the serve extra, which the tests of reports don't need

    from iosr_fast.serving.batching import BatchingClassifier
    from iosr_fast.serving.http.app import create_app
    from iosr_fast.serving.http.metrics import Metrics
    from iosr_fast.serving.http.service import Service
    from iosr_fast.serving.http.settings import Settings

    with BatchingClassifier(classifier) as batching:
        app = create_app(Service(batching, Settings(token=token), Metrics()))
        server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", ws="none", log_config=None))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise RuntimeError("the server did not start")
                time.sleep(0.01)
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(20)
