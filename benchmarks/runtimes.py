"""Runtimes that execute a classifier's ONNX file, each by its recipe: pictures to labels and probabilities.

python        ONNX Runtime, pictures by the recipe of docs/export.md
openvino      the same pictures
node, wasm    docs/recipes/classify.mjs with onnxruntime-node and with onnxruntime-web
chromium      the page of `iosr-fast export --web`
c++           docs/recipes/classify.cpp with Debian's libonnxruntime
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

from iosr_fast.encoders.runtimes.openvino import openvino_core
from iosr_fast.export.web import RUNTIME, write_page

DOCS = Path(__file__).resolve().parents[1] / "docs"
NPM = ("onnxruntime-node@1.30", "onnxruntime-web@1.30", "sharp@0.35")
CHROMIUM = "/usr/bin/chromium"
Answer = dict[str, Any]  # of a picture: label, accepted, probabilities, ms
_IN_PAGE = """async (names) => {
  const { model, opened, tensor } = await import("./classify.js");
  const [session, answers] = [await model, []];
  for (const name of names) {
    const picture = tensor(await opened(await (await fetch(name)).blob()));
    const start = performance.now();
    const { label, accepted, probabilities } = await session.run({ picture });
    const ms = performance.now() - start;
    const [which, sure] = [Number(label.data[0]), Boolean(accepted.data[0])];
    answers.push({ label: which, accepted: sure, probabilities: [...probabilities.data], ms });
  }
  return answers;
}"""


def runtimes(folder: Path) -> dict[str, Callable[[Path, Sequence[Path]], list[Answer]]]:
    """All by name; each takes the model and pictures. `folder` has what `install` and `compile_recipe` made."""
    return {
        "python": partial(in_python, "onnxruntime"),
        "openvino": partial(in_python, "openvino"),
        "node": partial(lines_from, ["node", folder / "node.mjs"]),
        "wasm": partial(lines_from, ["node", folder / "wasm.mjs"]),
        "chromium": partial(in_chromium, folder),
        "c++": partial(lines_from, [folder / "classify"]),
    }


def in_python(runtime: str, model: Path, paths: Sequence[Path]) -> list[Answer]:
    """By the Python block of docs/export.md, run where its model and its picture are; in OpenVINO the same pictures."""
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "export.md").read_text("utf-8"), re.DOTALL)
    recipe: dict[str, Any] = {}
    Image.new("RGB", (64, 64)).save(model.with_name("a.jpg"))
    with chdir(model.parent):
        exec(compile(block, "export.md", "exec"), recipe)
    execute = partial(recipe["session"].run, None)
    if runtime == "openvino":
        compiled = openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        execute = lambda inputs: list(compiled(inputs).values())  # noqa: E731
    answers = []
    for path in paths:
        inputs, start = {"picture": recipe["picture"](path)}, time.perf_counter()
        probabilities, label, accepted = execute(inputs)
        ms = 1e3 * (time.perf_counter() - start)
        one = {"label": int(label[0]), "accepted": bool(accepted[0]), "probabilities": probabilities[0], "ms": ms}
        answers.append(one)
    return answers


def install(folder: Path) -> None:
    """npm's packages in `folder`, with the recipe for Node as node.mjs and as wasm.mjs."""
    skip = {"ONNXRUNTIME_NODE_INSTALL_CUDA": "skip", "npm_config_fetch_retries": "0"}
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error", *NPM]
    subprocess.run(command, cwd=folder, env=os.environ | skip, check=True, capture_output=True, text=True)
    program = (DOCS / "recipes" / "classify.mjs").read_text("utf-8")
    (folder / "node.mjs").write_text(program, "utf-8")
    (folder / "wasm.mjs").write_text(program.replace('from "onnxruntime-node"', 'from "onnxruntime-web"'), "utf-8")


def compile_recipe(folder: Path) -> None:
    """The recipe for C++, by the command in its first lines."""
    source = DOCS / "recipes" / "classify.cpp"
    command = re.search(r"// (g\+\+ .*)", source.read_text("utf-8"))
    assert command is not None
    words = command[1].replace("classify.cpp", str(source)).split()
    subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True)


def lines_from(command: Sequence[Any], model: Path, paths: Sequence[Path]) -> list[Answer]:
    """What a recipe prints: a line of JSON for each picture."""
    done = subprocess.run([*command, model, *paths], check=True, capture_output=True, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def in_chromium(folder: Path, model: Path, paths: Sequence[Path]) -> list[Answer]:
    from playwright.sync_api import sync_playwright

    with site(folder, model) as (root, address), sync_playwright() as driver:
        for path in paths:
            (root / path.name).symlink_to(path)
        page = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]).new_page()
        page.goto(address)
        answers: list[Answer] = page.evaluate(_IN_PAGE, [path.name for path in paths])
        return answers


@contextmanager
def site(folder: Path, model: Path) -> Iterator[tuple[Path, str]]:
    """The page of a model, with onnxruntime-web from `folder`, served: (its folder, its address)."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_page(model, root)
        for file in RUNTIME:
            shutil.copyfile(folder / "node_modules" / "onnxruntime-web" / "dist" / file, root / file)
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=name))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield root, f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass
