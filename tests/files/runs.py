"""Runs of `iosr-fast embed` and `classify`: pictures for them, and what they write."""

from __future__ import annotations

import csv
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from typer.testing import CliRunner, Result

from iosr_fast.backbones.demo.pictures import load_pictures
from iosr_fast.classifier import Classifier
from iosr_fast.cli import app
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.files.embedding_files import Part
from iosr_fast.files.parts import LOG
from iosr_fast.files.tables import SCORES
from iosr_fast.images.preprocess import to_pixels
from iosr_fast.sealed.manifest import read_manifest


@cache
def load_images() -> np.ndarray:
    return load_pictures("held-out").images


def write_pictures(folder: Path, n: int) -> list[Path]:
    """n of the demo's pictures as files of two sizes in sub-folders; their paths, in the order of a run."""
    paths = [folder / f"c{i % 3}" / f"{i:04d}.png" for i in range(n)]
    for i, (path, picture) in enumerate(zip(paths, load_images()[:n], strict=True)):
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(picture)
        (image.resize((90, 70)) if i % 5 == 0 else image).save(path)
    return sorted(paths)


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [*map(str, words), "--threads", "1"])


def classify(bundle: Path, *words: object) -> Result:
    return run("classify", bundle, *words)


def embed(bundle: Path, given: Path, out: Path, *words: object) -> Result:
    return run("embed", "--engine", bundle, "--input", given, "--out", out, *words)


def done(result: Result) -> str:
    """The output of a command that must succeed."""
    assert result.exit_code == 0, result.output
    return result.output


def refused(result: Result) -> str:
    """The output of a command that must be refused in words."""
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    return result.output


def read_rows(text: str | Path) -> list[dict[str, str]]:
    lines = text.splitlines() if isinstance(text, str) else text.open(encoding="utf-8", newline="")
    return list(csv.DictReader(lines))


def read_parts(out: Path) -> Any:
    """The rows of a folder of classified images, a pyarrow.Table, with every file's hash verified."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pa.concat_tables([pq.read_table(out / name) for name in read_manifest(out, "classifications")["parts"]])


def part_bytes(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("part-*"))}


def logged(out: Path) -> list[dict[str, Any]]:
    """The parts that the log of a run names, in the order in which they were written."""
    lines = (out / LOG).read_text().splitlines() if (out / LOG).exists() else []
    return [json.loads(line) for line in lines[1:]]


def assert_encodes(bundle: Path, part: Part, paths: list[Path], atol: float = 1e-6) -> None:
    """Every row is the engine's embedding of its picture."""
    encoder = open_engine(bundle / "engine", threads=1)
    expected = encoder.encode(to_pixels(paths, encoder.geometry))
    np.testing.assert_allclose(part.embeddings.plain, expected.plain, rtol=0, atol=atol)
    np.testing.assert_allclose(part.embeddings.adapted, expected.adapted, rtol=0, atol=atol)
    assert part.errors == [None] * len(paths)


def assert_answers(bundle: Path, table: Any, paths: list[Path], top: int = 5) -> None:
    """Every row of parts is the classifier's answer to its picture."""
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
