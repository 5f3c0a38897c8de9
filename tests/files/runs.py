"""Runs of `iosr-fast embed` and `classify` into folders of parts: pictures for them, and what they write."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from typer.testing import CliRunner, Result

from iosr_fast.classifier import Classifier
from iosr_fast.cli import app
from iosr_fast.clip.demo.pictures import load_pictures
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.files.embedding_files import Part, read_embeddings
from iosr_fast.files.part_folder import LOG
from iosr_fast.files.prediction_files import SCORES, read_predictions
from iosr_fast.images.preprocess import to_pixels
from iosr_fast.utils.manifest import read_manifest


@cache
def load_images() -> np.ndarray:
    return load_pictures("held-out").images


def write_pictures(folder: Path, n: int) -> list[Path]:
    """n of the demo's pictures as files of two sizes in sub-folders; their paths, sorted by key."""
    paths = [folder / f"c{i % 3}" / f"{i:04d}.png" for i in range(n)]
    for i, (path, picture) in enumerate(zip(paths, load_images()[:n], strict=True)):
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(picture)
        (image.resize((90, 70)) if i % 5 == 0 else image).save(path)
    return sorted(paths, key=lambda path: path.relative_to(folder).as_posix())


def words(tool: str, model: Path, given: Path | str, out: Path, *options: str) -> list[str]:
    first = ["--engine", str(model), "--input", str(given)] if tool == "embed" else [str(model), str(given)]
    return [tool, *first, "--out", str(out), "--threads", "1", *options]


def run(tool: str, model: Path, given: Path | str, out: Path, *options: str) -> Result:
    return CliRunner().invoke(app, words(tool, model, given, out, *options))


def embedded(engine: Path, given: Path | str, out: Path, *options: str) -> Part:
    """The result of a run that must succeed."""
    done = run("embed", engine, given, out, *options)
    assert done.exit_code == 0, done.output
    return read_embeddings(out)


def classified(bundle: Path, given: Path | str, out: Path, *options: str) -> Any:
    """The result of a run that must succeed, a pyarrow.Table."""
    done = run("classify", bundle, given, out, *options)
    assert done.exit_code == 0, done.output
    return read_all(out)


def read_all(out: Path) -> Any:
    import pyarrow as pa

    parts = read_manifest(out, "classifications")["parts"]
    return pa.concat_tables([read_predictions(out / name).table for name in parts])


def assert_encodes(engine: Path, part: Part, paths: Sequence[Path], atol: float = 1e-6) -> None:
    encoder = open_engine(engine, threads=1)
    expected = encoder.encode(to_pixels(paths, encoder.geometry))
    np.testing.assert_allclose(part.embeddings.plain, expected.plain, rtol=0, atol=atol)
    np.testing.assert_allclose(part.embeddings.adapted, expected.adapted, rtol=0, atol=atol)
    assert part.errors == [None] * len(paths)


def assert_answers(bundle: Path, table: Any, paths: list[Path], top: int = 5) -> None:
    """Every row is the classifier's answer to its picture."""
    classifier = Classifier.load(bundle)
    logits, probabilities = classifier.decision_function(paths), classifier.predict_proba(paths)
    assert table["label"].to_pylist() == classifier.predict(paths).tolist()
    np.testing.assert_allclose(table["probability"].to_numpy(), probabilities.max(1), atol=1e-5)
    sums = table["zero_shot"].to_numpy() + table["cache"].to_numpy()
    np.testing.assert_allclose(sums, logits.max(1), atol=1e-4)
    ids = {info.name: info.class_id for info in classifier.classes()}
    for row, classes in zip(probabilities, table["top"].to_pylist(), strict=True):
        best = np.argsort(-row)[:top]
        assert [one["label"] for one in classes] == classifier.classes_[best].tolist()
        assert [one["class_id"] for one in classes] == [ids[one["label"]] for one in classes]
        np.testing.assert_allclose([one["probability"] for one in classes], row[best], atol=1e-5)
    for name in SCORES:
        assert [classes[0][name] for classes in table["top"].to_pylist()] == table[name].to_pylist()
    assert table["error"].null_count == len(paths)


def part_bytes(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("part-*"))}


def logged(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / LOG).read_text().splitlines()]


def kill_in_the_middle(tool: str, model: Path, given: Path, out: Path, parts: int, *options: str) -> None:
    """Start a run of `parts` parts in a process, and kill it once 3 are written."""
    command = [sys.executable, "-m", "iosr_fast", *words(tool, model, given, out, *options)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while len(list(out.glob("part-*"))) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 3 <= len(part_bytes(out)) < parts, "the run was to be killed in its middle"
    assert process.returncode == -signal.SIGKILL and not (out / "manifest.json").exists()
