"""A classifier that is one ONNX file in other runtimes, beside the library: labels, probabilities, time of a picture.

Pictures are photographs.py's, of 20 to 2,200 pixels a side, two JPEGs for each PNG. JPEGs that the library decodes at a
fraction of their size are a case of their own, as not every runtime can. Times are medians of pictures in memory, one
after another.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.harness import Run
from benchmarks.photographs import photograph
from benchmarks.runtimes import Answer, compile_recipe, install, runtimes
from benchmarks.show import lines_of
from iosr_fast.backbones.demo.pictures import load_pictures
from iosr_fast.classifier import Classifier
from iosr_fast.evaluation.table import facts
from iosr_fast.images.preprocess import open_image
from tools.demo.bundle import make_demo_bundle

CLASSIFIERS, MAX_ERROR = ((12, 5), (100, 4)), 0.3  # classes and pictures of each; with 100 none is accepted
PACKAGES = ("onnxruntime", "openvino", "onnx", "pillow")
SMALLEST, LARGEST = 20, 2200  # pixels of a side


def run(run: Run, pictures: int = 330) -> None:
    """Compare the runtimes that are here. One that decodes as the library does must give the same labels."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_pictures(folder / "pictures", pictures)
        for build in (install, compile_recipe):
            with left_out(run, build.__name__):
                build(folder)
        for classes, shots in CLASSIFIERS:
            classifier = Classifier.load(make_demo_bundle(folder / f"{classes}", classes, shots))
            compare(run, classifier, f"{classes}-classes", paths, folder)
        print("\n".join(lines_of(run.rows)), flush=True)


def compare(run: Run, classifier: Classifier, case: str, paths: Sequence[Path], folder: Path) -> None:
    """The rows of one classifier, with the programs in `folder`."""
    model = folder / case / "pets.onnx"
    model.parent.mkdir()
    classifier.export(model, max_error=MAX_ERROR)
    truth, drafted = in_library(classifier, paths, MAX_ERROR), are_drafted(classifier, paths)
    shared = {**facts(PACKAGES), "device": run.device.description, "file_mb": model.stat().st_size / 1e6}
    for package in (folder / "node_modules").glob("onnxruntime-*/package.json"):
        shared["versions"][package.parent.name] = json.loads(package.read_text())["version"]
    for impl, answer in runtimes(folder).items():
        with left_out(run, impl):
            pairs = np.array(list(zip(answer(model, paths), truth, strict=True)))
            for kind, chosen in (("", pairs[~drafted]), ("-large-jpegs", pairs[drafted])):
                if not len(chosen):
                    continue
                row = {"bench": "one-file", "case": case + kind, "impl": impl, **compared(*chosen.T)}
                run.rows.append(row | shared)
                run.say(found := f"{row['case']}: {impl}: {row['labels_equal']:.1%} of the labels are equal")
                if not kind and row["labels_equal"] < 1:
                    run.failed.append(found)
            run.write()


@contextmanager
def left_out(run: Run, name: str) -> Iterator[None]:
    """A runtime that is not here is left out with a line."""
    try:
        yield
    except (OSError, ImportError, subprocess.CalledProcessError) as error:
        run.say(f"left out: {name}: {error}")


def write_pictures(folder: Path, count: int) -> list[Path]:
    """JPEG and PNG files of the demo's held-out pictures, their sides drawn evenly by their logarithm."""
    folder.mkdir()
    rng, pictures, paths = np.random.default_rng(0), load_pictures("held-out").images, []
    for i, chosen in enumerate(rng.permutation(len(pictures))[:count].tolist()):
        width, height = np.exp(rng.uniform(np.log(SMALLEST), np.log(LARGEST), 2)).astype(int).tolist()
        paths.append(folder / f"{i:04d}.{'jpg' if i % 3 else 'png'}")
        photograph(pictures[chosen], width, height, i).save(paths[-1], quality=88)
    return paths


def are_drafted(classifier: Classifier, paths: Sequence[Path]) -> np.ndarray:
    """(N,) bool: which files the library decodes at a fraction of their size."""
    geometry = classifier.encoder.geometry
    return np.array([open_image(path, geometry=geometry).size != Image.open(path).size for path in paths])


def in_library(classifier: Classifier, paths: Sequence[Path], max_error: float) -> list[Answer]:
    rows = zip(classifier.predict_proba(paths), classifier.predict(paths, max_error=max_error), strict=True)
    return [{"label": row.argmax(), "accepted": label is not None, "probabilities": row} for row, label in rows]


def compared(answers: Sequence[Answer], truth: Sequence[Answer]) -> dict[str, Any]:
    """A row's figures: shares of equal answers, the largest difference of a probability, and the median time."""
    got, expected = ({name: np.array([one[name] for one in each]) for name in each[0]} for each in (answers, truth))
    equal = {name: round(float((got[name] == expected[name]).mean()), 4) for name in ("label", "accepted")}
    return {
        "images": len(truth),
        "accepted": round(float(expected["accepted"].mean()), 4),
        "labels_equal": equal["label"],
        "accepted_equal": equal["accepted"],
        "max_dp": float(f"{np.abs(got['probabilities'] - expected['probabilities']).max():.2g}"),
        "runtime_ms": round(float(np.median(got["ms"])), 2),
    }
