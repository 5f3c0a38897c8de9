"""A page that classifies pictures of the user's disk in the browser, by a classifier that is exported as one file.

Nothing is uploaded. The page finds onnxruntime-web in its own folder, where npm and `cp` put it.
"""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

from iosr_fast.exceptions import IosrFastError
from iosr_fast.sealed.files import new_file
from iosr_fast.utils.require import require

RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")  # in onnxruntime-web/dist
NEEDED = (
    "the page needs onnxruntime-web in its folder: npm install --ignore-scripts onnxruntime-web && "
    f"cp node_modules/onnxruntime-web/dist/{{{','.join(RUNTIME)}}} . && python -m http.server"
)
# What the page shares with the server's, and its own files.
_FILES = {
    "serving/http/page": ("icon.svg", "theme.css", "page.css", "dom.js", "pictures.js"),
    "export/web": ("classify.js",),
}


def check_folder(folder: Path) -> None:
    """Raise IosrFastError for a folder with another page, which would be lost."""
    if (folder / "index.html").exists() and not (folder / "classify.js").exists():
        raise IosrFastError(f"expected a folder without a page, or with an earlier one of export, got {folder}")


def write_page(model: Path, folder: Path) -> None:
    """Write FOLDER/model.onnx, a copy of `model`, and FOLDER/index.html with its scripts, in place of older ones.

    `model` is a classifier that was exported with source="picture" and turns pictures upright. Raises IosrFastError for
    another one, and for a folder with another page.
    """
    check_folder(folder)
    facts = json.dumps(_facts(model)).replace("<", "\\u003c")  # no class name ends the element that it stands in
    home = files("iosr_fast")
    contents = {name: (home / room / name).read_bytes() for room, names in _FILES.items() for name in names}
    page = (home / "export/web/index.html").read_text("utf-8")
    contents["index.html"] = page.replace("FACTS", facts).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with new_file(folder / "model.onnx") as copy:
        shutil.copyfile(model, copy)
    for name, content in contents.items():
        with new_file(folder / name) as file:
            file.write_bytes(content)


def _facts(model: Path) -> dict[str, Any]:
    """What the page shows: a browser's runtime gives it no metadata."""
    graph = require("onnx", "cpu").load(model)
    properties = {each.key: each.value for each in graph.metadata_props}
    inputs = [each.name for each in graph.graph.input]
    if inputs != ["picture"] or "iosr_fast" not in properties:
        raise IosrFastError(f"expected a classifier exported for pictures, got {model} of {', '.join(inputs)}")
    facts, promise = json.loads(properties["iosr_fast"]), ""
    if not facts["exif_orientation"]:
        raise IosrFastError(
            "expected a classifier that turns pictures upright, as browsers always do, got one that doesn't"
        )
    if (most := facts["max_error"]) is not None:
        wrong = f"at most {100 * most:.4g}% are wrong"
        promise = f"Of the labels that it is sure of, {wrong}, for pictures like its examples."
    names = json.loads(properties["class_names"])
    return {"class_names": names, "geometry": facts["geometry"], "promise": promise, "missing": NEEDED}
