"""Make the screenshot of the server's page in the documentation.

    python tools/page_screenshot.py --out docs/page.png

Fits the demo's classifier, serves it on a free port, and drives Chromium with playwright (extras dev and serve).
Classifies the first pictures of a random order of the held-out ones (the order of the gallery's grid, whatever their
labels), and one of a class that is missing. Adds that class from three examples, filters the list of classes by its
name, and takes a screenshot of the whole page.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import typer
from PIL import Image

from iosr_fast import Classifier
from iosr_fast.clip.demo.pictures import load_pictures
from iosr_fast.evaluation.demo_bundle import METHOD, held_out_queries, make_demo_bundle
from iosr_fast.utils.command import new_file, run
from iosr_fast.utils.require import require

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
TOKEN = "a-token-for-this-page-only"
NEWCOMER = "pear"
SHOWN = 4  # pictures of the other classes; docs/gallery.md has their number
MARGIN = 32  # below the page, in CSS pixels


@contextlib.contextmanager
def served(classifier: Classifier, token: str) -> Iterator[str]:
    """The address of the application around `classifier`, served by a thread on a free port."""
    uvicorn = require("uvicorn", "serve")
    from iosr_fast.serving.batching import BatchingClassifier
    from iosr_fast.serving.http.app import create_app
    from iosr_fast.serving.http.settings import Settings

    with BatchingClassifier(classifier) as batching:
        app = create_app(batching, Settings(token=token))
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


def as_file(image: np.ndarray, name: str) -> Any:
    """A picture for playwright's set_input_files."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return {"name": f"{name}.png", "mimeType": "image/png", "buffer": buffer.getvalue()}


def photograph(page: Any, address: str, out: Path) -> None:
    """Classify some pictures and one of a missing class, add that class, and take the screenshot."""
    images, labels = held_out_queries()
    chosen = np.random.default_rng(0).permutation(len(images))[:SHOWN]
    known = [as_file(images[i], labels[i]) for i in chosen]
    pictures = load_pictures("held-out")
    newcomer = pictures.images[pictures.concepts == pictures.names.index(NEWCOMER)]
    page.goto(address)
    page.set_input_files("#choose", [*known, as_file(newcomer[3], NEWCOMER)])
    page.locator("#file-name", has_text=NEWCOMER).wait_for()
    page.fill("#new-name", NEWCOMER)
    page.set_input_files("#new-examples", [as_file(image, str(i)) for i, image in enumerate(newcomer[:3])])
    page.locator("#new-strip li").nth(2).wait_for()
    page.fill("#token", TOKEN)
    page.click("#add-class")
    page.locator(".bars .tag").wait_for()
    page.click("#notice-close")
    page.fill("#filter", NEWCOMER)
    page.click("#classes button")
    page.locator(".panel img").nth(2).wait_for()
    page.evaluate("document.activeElement.blur()")
    # A full-page screenshot would end the emulation of a phone.
    height = page.evaluate("document.querySelector('main').getBoundingClientRect().bottom + scrollY")
    page.set_viewport_size({"width": page.viewport_size["width"], "height": int(height) + MARGIN})
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_load_state("networkidle")
    page.screenshot(path=out, animations="disabled")


def main(
    out: Path = typer.Option(Path("docs/page.png"), callback=new_file, help="the PNG to write"),
    browser: str = typer.Option(CHROMIUM, help="Chromium's executable"),
    width: int = typer.Option(1120, help="of the window in CSS pixels"),
    dark: bool = typer.Option(False, help="dark colour scheme"),
    phone: bool = typer.Option(False, help="emulate a phone of that width"),
) -> None:
    playwright = require("playwright.sync_api", "dev")
    with (
        tempfile.TemporaryDirectory() as folder,
        served(Classifier.load(make_demo_bundle(folder, method=METHOD)), TOKEN) as address,
        playwright.sync_playwright() as driver,
    ):
        chromium = driver.chromium.launch(executable_path=browser, args=ARGUMENTS)
        page = chromium.new_page(
            viewport={"width": width, "height": 800},
            color_scheme="dark" if dark else "light",
            is_mobile=phone,
            has_touch=phone,
            device_scale_factor=2 if phone else 1,
        )
        photograph(page, address, out)
        chromium.close()
    print(f"{out}: {out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    run(main)
