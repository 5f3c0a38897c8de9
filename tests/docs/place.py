"""Where examples run: a folder with the files that documents speak of, and pretrained CLIPs without a download."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iosr_fast.clip.demo.pictures import load_pictures
from iosr_fast.export import build, pretrained
from iosr_fast.head import engine_judge
from tests import ROOT
from tests.demo_cache import demo_cache
from tests.docs import triton_python_backend_utils
from tests.docs.demo_weights import REPLACED, save_time, use_demo_weights

CLASSES = (
    *("banana", "carrot", "green apple", "lemon", "melon"),
    *("peach", "strawberry", "sushi", "tangerine", "tomato"),
)
NEW_CLASS = "pear"


def make_files(folder: Path) -> None:
    """support/CLASS/ with 4 pictures each, validation/CLASS/ with 1, photos/ has others; others/ of no class; a.jpg to
    e.jpg, labels.csv, several.csv."""
    pictures = load_pictures("held-out", min_styles=5)
    (folder / "others").mkdir(parents=True)
    for name in [name for name in pictures.names if name not in (*CLASSES, NEW_CLASS)][:6]:
        row = int(np.flatnonzero(pictures.concepts == pictures.names.index(name))[0])
        Image.fromarray(pictures.images[row]).save(folder / "others" / f"{row}.png")
    for name in (*CLASSES, NEW_CLASS):
        rows = np.flatnonzero(pictures.concepts == pictures.names.index(name))
        under = name.replace(" ", "_")
        for i, row in enumerate(rows):
            if name == NEW_CLASS:
                path = folder / f"{'de'[i]}.jpg" if i < 2 else folder / "pears" / f"{i}.jpg"
            elif i < 4:
                path = folder / "support" / under / f"{i}.jpg"
            elif i == 4:
                path = folder / "validation" / under / f"{i}.jpg"
            else:
                path = folder / "photos" / f"{under}-{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pictures.images[row]).resize((160, 160)).save(path, quality=95)
    (folder / "labels.csv").write_text("path,label\nd.jpg,pear\ne.jpg,\n")
    rows = ("a.jpg,banana; fruit", "b.jpg,melon; fruit", "c.jpg,", "d.jpg,banana", "e.jpg,melon")
    (folder / "several.csv").write_text("\n".join(["path,labels", *rows]) + "\n")
    shutil.copy(pretrained.DEMO_ADAPTER, folder / "adapter.safetensors")
    for letter, name in zip("abc", ("banana", "melon", "tomato"), strict=True):
        shutil.copy(folder / "validation" / name / "4.jpg", folder / f"{letter}.jpg")


@contextmanager
def users_place(folder: Path) -> Iterator[Path]:
    """Work in `folder`, a new one with the files. Commands are found by name; a pretrained CLIP is the demo's."""
    make_files(folder)
    commands = folder / ".bin"
    commands.mkdir()
    for name, module in {"iosr-fast": "-m iosr_fast", "python": ""}.items():
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        (commands / name).chmod(0o755)
    (folder / ".curlrc").write_text("silent\nshow-error\nfail\n")
    open_clip = pytest.importorskip("open_clip", reason="open_clip comes with the cpu extra")
    with pytest.MonkeyPatch.context() as patch:
        for name in REPLACED:
            patch.setattr(open_clip, name, getattr(open_clip, name))  # put back at the end
        for module in (build, engine_judge):
            save_time(patch.setattr, module)
        patch.setattr(pretrained, "_latest", None)  # no other test shares what is opened here
        use_demo_weights(open_clip)
        patch.setitem(sys.modules, "triton_python_backend_utils", triton_python_backend_utils)
        patch.setenv("PATH", str(commands), prepend=os.pathsep)
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, Path(__file__).parent / "site"))))
        patch.setenv("CURL_HOME", str(folder))
        patch.setenv("IOSR_FAST_CACHE", str(demo_cache()))
        patch.chdir(folder)
        yield folder
