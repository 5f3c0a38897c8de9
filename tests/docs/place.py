"""Where examples run: a folder with the files that documents speak of, and pretrained CLIPs without a download."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from PIL import Image

from iosr_fast.backbones.demo.pictures import load_pictures
from iosr_fast.backbones.load import DEMO_FOLDER, DEMO_NAME
from iosr_fast.delivery import engine_judge
from iosr_fast.export import pretrained
from tests import ROOT
from tests.demo_cache import demo_cache, export_once
from tests.docs import triton_python_backend_utils
from tests.pictures import encode

CLASSES = (
    *("banana", "carrot", "green apple", "lemon", "melon"),
    *("peach", "strawberry", "sushi", "tangerine", "tomato"),
)
NEW_CLASS = "pear"


@functools.cache
def users_files() -> dict[str, bytes]:
    """support/CLASS/ with 4 pictures each, validation/CLASS/ with 1, photos/ has others; pictures/ has them as train,
    validation and test; others/ of no class; a.jpg to e.jpg, labels.csv, several.csv; table.csv of several questions;
    tree.csv, and nested/ with two pictures of a few classes; boxes.csv and detections.json."""
    pictures = load_pictures("held-out", min_styles=5)
    rows_of = {name: np.flatnonzero(pictures.concepts == i) for i, name in enumerate(pictures.names)}
    files = {"adapter.safetensors": pretrained.DEMO_ADAPTER.read_bytes()}
    for name in [name for name in pictures.names if name not in (*CLASSES, NEW_CLASS)][:6]:
        files[f"others/{rows_of[name][0]}.png"] = encode(pictures.images[rows_of[name][0]])
    for name in (*CLASSES, NEW_CLASS):
        under = name.replace(" ", "_")
        for i, row in enumerate(rows_of[name]):
            if name == NEW_CLASS:
                path = f"{'de'[i]}.jpg" if i < 2 else f"pears/{i}.jpg"
            else:
                path = f"support/{under}/{i}.jpg" if i < 4 else f"photos/{under}-{i}.jpg"
            if i == 4 and name != NEW_CLASS:
                path = f"validation/{under}/{i}.jpg"
            large = Image.fromarray(pictures.images[row]).resize((160, 160))
            files[path] = encode(large, "JPEG", quality=95)
    for place, under in (("train", "support"), ("validation", "validation"), ("test", "validation")):
        files |= {
            f"pictures/{place}{path.removeprefix(under)}": one for path, one in files.items() if path.startswith(under)
        }
    for letter, name in zip("abc", ("banana", "melon", "tomato"), strict=True):
        files[f"{letter}.jpg"] = files[f"validation/{name}/4.jpg"]
    files["labels.csv"] = b"path,label\nd.jpg,pear\ne.jpg,\n"
    colours = ("yellow", "red", "green", "yellow", "green", *["red"] * 5)
    rows = [
        f"support/{name.replace(' ', '_')}/{i}.jpg,{name},{colour},{'yes' if i % 2 else 'no'}"
        for name, colour in zip(CLASSES, colours, strict=True)
        for i in range(4)
    ]
    files["table.csv"] = "\n".join(["path,kind,colour,damaged", *rows, ""]).encode()
    files["tree.csv"] = b"class,parent\nlemon,citrus\ntangerine,citrus\ncitrus,fruit\nbanana,fruit\n"
    for name in ("fruit/citrus/lemon", "fruit/citrus/tangerine", "fruit/banana", "carrot"):
        files |= {f"nested/{name}/{i}.jpg": files[f"support/{name.split('/')[-1]}/{i}.jpg"] for i in range(2)}
    files["boxes.csv"] = b"path,x,y,width,height\na.jpg,10,20,100,90\na.jpg,0.5,0,0.5,1\nb.jpg,,,,\n"
    boxes = [{"category": "1", "conf": 0.9, "bbox": [0.1, 0.1, 0.8, 0.8]}]
    found = {"images": [{"file": "a.jpg", "detections": boxes}], "detection_categories": {"1": "animal"}, "info": {}}
    files["detections.json"] = json.dumps(found).encode()
    rows = ("a.jpg,banana; fruit", "b.jpg,melon; fruit", "c.jpg,", "d.jpg,banana", "e.jpg,melon")
    files["several.csv"] = "\n".join(["path,labels", *rows, ""]).encode()
    return files


def use_demo_weights(patch: pytest.MonkeyPatch, open_clip: Any) -> None:
    """open_clip with the demo's architecture and weights under the name of every pretrained ViT.

    The documents name real CLIPs, whose weights tests can't download. What is replaced is the hub's file of weights and
    the architecture: names and tags are still checked against open_clip's own list, and everything in iosr_fast runs
    as it is.
    """
    create, config, tokenizer = open_clip.create_model, open_clip.get_model_config, open_clip.get_tokenizer
    open_clip.add_model_config(DEMO_FOLDER / f"{DEMO_NAME}.json")

    def demo_name(name: str) -> str:
        return DEMO_NAME if name.startswith("ViT-") else name

    def create_model(name: str, force_quick_gelu: bool = False, **options: Any) -> Any:
        return create(demo_name(name), force_quick_gelu=force_quick_gelu and demo_name(name) == name, **options)

    patch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(DEMO_FOLDER / "clip.safetensors"))
    patch.setattr(open_clip, "create_model", create_model)
    patch.setattr(open_clip, "get_model_config", lambda name: config(demo_name(name)))
    patch.setattr(open_clip, "get_tokenizer", lambda name: tokenizer(demo_name(name)))


@contextmanager
def users_place(folder: Path) -> Iterator[Path]:
    """Work in `folder`, a new one with the files. Commands are found by name; a pretrained CLIP is the demo's."""
    for name, data in users_files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    commands = folder / ".bin"
    commands.mkdir()
    (commands / "iosr-fast").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m iosr_fast "$@"\n')
    (commands / "iosr-fast").chmod(0o755)
    (folder / ".curlrc").write_text("silent\nshow-error\nfail\n")
    import open_clip

    with pytest.MonkeyPatch.context() as patch:
        use_demo_weights(patch, open_clip)
        patch.setattr("iosr_fast.export.source.export_onnx", export_once)
        patch.setattr(engine_judge, "_TIMING_S", 0.1)
        patch.setitem(sys.modules, "triton_python_backend_utils", triton_python_backend_utils)
        patch.setenv("PATH", str(commands), prepend=os.pathsep)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("CURL_HOME", str(folder))
        patch.setenv("IOSR_FAST_CACHE", str(demo_cache() / "documents"))  # engines with other models' names
        patch.chdir(folder)
        yield folder
