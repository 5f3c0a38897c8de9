"""What users wait for: `fit` of pictures, a `change` of a classifier that runs, and the first label of a process.

fit                        Classifier.fit as it is called, parameters chosen on the pictures
logistic-regression        of fit: the same engine's embeddings, and scikit-learn's LogisticRegression
add, add-and-remove-class  of change: pictures come, a class comes and goes, until readers see them
fit-again                  of change: the same head fitted anew
iosr-fast                  of cold-start: a process that loads a saved classifier and labels a picture
open-clip                  of cold-start: one that imports PyTorch and open_clip, makes the same CLIP and embeds it
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from benchmarks.harness import Candidate, Run, ready
from benchmarks.photographs import write_photographs
from iosr_fast import Classifier
from iosr_fast.backbones.demo.pictures import load_pictures
from iosr_fast.images.preprocess import to_pixels

CLASSES, SHOTS = 100, 4
METHODS: dict[str, dict[str, Any]] = {"tip-adapter++": {"tune": "none"}, "proker++": {"tune": "none"}, "auto": {}}
LABEL = "from iosr_fast import Classifier; print(Classifier.load({folder!r}).predict([{path!r}])[0])"
EMBED = """
import open_clip, torch
from PIL import Image
model, _, preprocess = open_clip.create_model_and_transforms({model!r})
with torch.no_grad():
    print(tuple(model.encode_image(preprocess(Image.open({path!r}))[None]).shape))
"""
PEAK = "\nimport resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"


def made(model: str) -> Classifier:
    return Classifier(model, None if model == "demo" else "none")


def fit(run: Run, model: str = "ViT-B-32", pictures: int = 100) -> None:
    """Pictures like photographs of a tenth as many classes; the engine is built before."""
    with tempfile.TemporaryDirectory() as name:
        paths = write_photographs(Path(name), pictures)
        labels = [f"class {number % max(pictures // 10, 2)}" for number in range(pictures)]
        encoder = made(model).encoder

        def rival() -> Any:
            rows = np.concatenate([encoder.encode(to_pixels([path], encoder.geometry)).plain for path in paths])
            return LogisticRegression(max_iter=300).fit(rows, labels)

        candidates = {
            "fit": Candidate(ready(lambda: made(model).fit(paths, labels)), work=pictures, recorded=False),
            "logistic-regression": Candidate(ready(rival), work=pictures, rival=True, recorded=False),
        }
        packages = ("onnxruntime", "openvino", "scikit-learn")
        run.case(f"{model.lower()}-{pictures}-photographs", candidates, "images/s", packages, bursts=False)


def change(run: Run) -> None:
    """The demo's classifier of 1,000 pictures, whose parameters are not chosen anew by a change."""
    pictures = np.unique(load_pictures("generic").images, axis=0)[: 1_000 + SHOTS]  # a copy has one label
    labels = [f"class {number % CLASSES}" for number in range(1_000)]
    for method, options in METHODS.items():
        classifier = Classifier("demo", method=method, **options).fit(pictures[:-SHOTS], labels)

        def comes_and_goes(classifier: Classifier = classifier) -> int:
            classifier.add_class("new", pictures[-SHOTS:])
            found = len(classifier.classes())
            classifier.remove_class("new")
            return found

        again = partial(Classifier("demo", method=method, **options).fit, pictures[:-SHOTS], labels)
        candidates = {
            "add-and-remove-class": Candidate(ready(comes_and_goes), classes),
            "fit-again": Candidate(ready(again), rival=True),
        }
        run.case(f"demo-{method}-k1000-c{CLASSES}", candidates, packages=("onnxruntime", "openvino", "scikit-learn"))


def classes(found: int) -> dict[str, Any]:
    if found != CLASSES + 1:
        raise ArithmeticError(f"expected {CLASSES + 1} classes, got {found}")
    return {}


def cold_start(run: Run, model: str = "ViT-B-32") -> None:
    """Each call is a new process; peak_memory_mb is that of the one that was verified."""
    with tempfile.TemporaryDirectory() as name:
        paths = write_photographs(Path(name), 4)
        folder = str(Path(name, "classifier"))
        made(model).fit(paths, ["a", "a", "b", "b"]).save(folder)
        label = LABEL.format(folder=folder, path=str(paths[0]))
        candidates = {"iosr-fast": Candidate(ready(partial(process, label)), partial(peak, "a"), recorded=False)}
        if model != "demo":
            embed = EMBED.format(model=model, path=str(paths[0]))
            check = partial(peak, "(1, ")
            candidates["open-clip"] = Candidate(ready(partial(process, embed)), check, rival=True, recorded=False)
        run.case(
            model.lower(), candidates, packages=("onnxruntime", "openvino", "torch", "open_clip_torch"), bursts=False
        )


def process(script: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", script + PEAK], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def peak(expected: str, printed: list[str]) -> dict[str, Any]:
    if not printed[0].startswith(expected):
        raise ArithmeticError(f"expected {expected}, got {printed[0]}")
    return {"peak_memory_mb": round(int(printed[1]) * 1.024 / 1e3)}
