"""A classifier from the installed wheel: fit, predict, save, load, predict again. `make check-wheel` runs it.

It imports nothing of the repository, and it runs in an environment without a compiler.
"""

from __future__ import annotations

import platform
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np

import iosr_fast
from iosr_fast.backbones.demo.pictures import load_pictures
from iosr_fast.info import simd_paths

STEP, SHOTS = 30, 3  # neighbours among the concepts look alike


def main() -> None:
    home = Path(iosr_fast.__file__).resolve()
    assert home.is_relative_to(sys.prefix), f"expected iosr_fast from the wheel in {sys.prefix}, got {home}"
    tops = {file.parts[0] for file in metadata.files("iosr_fast") or []}
    assert "iosr_fast" in tops and not tops & {"tools", "tests", "kernels"}, f"expected the package alone, got {tops}"
    assert (home.parent / "py.typed").exists(), "expected py.typed in the package"
    kernels = {"scalar", "avx2", "avx512"} if platform.machine() in ("x86_64", "AMD64") else {"scalar"}
    assert kernels <= set(simd_paths()), f"expected the kernels {sorted(kernels)}, got {list(simd_paths())}"
    pictures = load_pictures("held-out")
    rows = [np.flatnonzero(pictures.concepts == concept) for concept in range(0, len(pictures.names), STEP)]
    support = np.concatenate([row[:SHOTS] for row in rows])
    queries = np.concatenate([row[SHOTS:] for row in rows])
    names = np.array(pictures.names, object)[pictures.concepts]

    classifier = iosr_fast.Classifier("demo").fit(pictures.images[support], names[support])
    probabilities = classifier.predict_proba(pictures.images[queries])
    accuracy = classifier.score(pictures.images[queries], names[queries])
    assert accuracy > 0.5, f"expected far more than {1 / len(rows):.0%}, got {accuracy:.0%}"
    assert iosr_fast.Classifier("photographs").encoder.width == 1280, "expected its weights with the extra cpu"
    with tempfile.TemporaryDirectory() as folder:
        classifier.save(Path(folder) / "saved")
        loaded = iosr_fast.Classifier.load(Path(folder) / "saved")
        np.testing.assert_array_equal(loaded.predict_proba(pictures.images[queries]), probabilities)
    print(
        f"iosr_fast {iosr_fast.__version__} from {home.parent.parent.name}: {len(queries)} pictures of {len(rows)} "
        f"classes, {accuracy:.0%} right; the saved classifier gives the same probabilities"
    )


if __name__ == "__main__":
    main()
