"""A page that classifies pictures of the user's disk in the browser, by a classifier that is exported as one file.

Nothing is uploaded. The page finds onnxruntime-web in its own folder, where npm and `cp` put it.
"""

from __future__ import annotations

import json
import shutil
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

from iosr_fast.exceptions import IosrFastError
from iosr_fast.pages import page_file
from iosr_fast.sealed.files import new_file
from iosr_fast.sealed.outputs import check_writable
from iosr_fast.utils.require import require

RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")  # in onnxruntime-web/dist
NEEDED = (
    "the page needs onnxruntime-web in its folder: npm install --ignore-scripts onnxruntime-web && "
    f"cp node_modules/onnxruntime-web/dist/{{{','.join(RUNTIME)}}} . && python -m http.server"
)
MODEL = "model.onnx"
# The page's own files, and what it shares with the server's. An earlier page has the first.
_FILES = {
    **{name: f"file/{name}" for name in ("classify.js", "index.html")},
    **{name: f"server/{name}" for name in ("icon.svg", "theme.css", "page.css", "dom.js", "pictures.js")},
}


def check_page(model: Path, folder: Path, upright: bool) -> None:
    """Raise IosrFastError for a classifier that doesn't turn pictures `upright`, and for a folder with files that the
    page would replace and no earlier page, but for `model` itself; OSError for a folder that can't be written."""
    if not upright:
        raise IosrFastError(
            "expected a classifier that turns pictures upright, as browsers always do, got one that doesn't"
        )
    written = [folder / name for name in (*_FILES, MODEL)]
    others = [path for path in written if path.exists() and path.resolve() != model.resolve()]
    if others and written[0] not in others:
        raise IosrFastError(
            f"expected a folder without a page, or with an earlier one of export, got {others[0]}, which would be lost"
        )
    check_writable(next(place for place in (folder, *folder.absolute().parents) if place.exists()), folder)


def write_page(model: Path, folder: Path) -> None:
    """Write FOLDER/model.onnx, a copy of `model`, and FOLDER/index.html with its scripts, in place of older ones.

    `model` is a classifier that was exported with source="picture". Raises as `check_page`.
    """
    facts = _facts(model)
    check_page(model, folder, facts.pop("upright"))
    texts = json.dumps(facts).replace("<", "\\u003c")  # no class name ends the element that it stands in
    contents = {name: page_file(place) for name, place in _FILES.items()}
    contents["index.html"] = contents["index.html"].replace(b"FACTS", texts.encode())
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        with new_file(folder / name) as file:
            file.write_bytes(content)
    with new_file(folder / MODEL) as copy:
        shutil.copyfile(model, copy)


def _facts(model: Path) -> dict[str, Any]:
    """What the page shows: a browser's runtime gives it no metadata."""
    content = model.read_bytes()
    graph = require("onnx", "cpu").load_from_string(content)
    properties = {each.key: each.value for each in graph.metadata_props}
    inputs = [each.name for each in graph.graph.input]
    if inputs != ["picture"] or "iosr_fast" not in properties:
        raise IosrFastError(f"expected a classifier exported for pictures, got {model} of {', '.join(inputs)}")
    facts, promise = json.loads(properties["iosr_fast"]), ""
    if (most := facts["max_error"]) is not None:
        wrong = f"at most {100 * most:.4g}% are wrong"
        promise = f"Of the labels that it is sure of, {wrong}, for pictures like its examples."
    names = json.loads(properties["class_names"])
    return {
        "class_names": names,
        "geometry": facts["geometry"],
        "promise": promise,
        "missing": NEEDED,
        "integrity": "sha256-" + b64encode(sha256(content).digest()).decode(),
        "upright": facts["exif_orientation"],
    }
