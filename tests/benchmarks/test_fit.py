"""The fit benchmark: its rows, and the check of embeddings."""

from __future__ import annotations

import os

import numpy as np
import pytest

pytest.importorskip("open_clip", reason="open_clip comes with the cpu extra")
pytest.importorskip("sklearn", reason="scikit-learn comes with the cpu extra")

from iosr_fast.benchmarks import fit as bench


@pytest.mark.slow
def test_each_part_has_a_row(exports_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOSR_FAST_CACHE", os.environ.get("IOSR_FAST_CACHE", ""))  # the benchmark sets it
    rows = {row["impl"]: row for row in bench.run("demo", pictures=12, classes=3)}
    assert set(rows) == {"encode-once", "fit", "public-way", "tuning", "texts"}
    assert rows["fit"]["runtime_ms"] > rows["tuning"]["runtime_ms"] > 0
    assert rows["fit"]["first_build_ms"] > 0 and rows["fit"]["first_save_ms"] > 0


def test_embeddings_of_other_pictures_are_refused() -> None:
    rows = np.eye(3, dtype=np.float32)
    bench.check("the fit", rows, rows)
    with pytest.raises(RuntimeError, match=r"cosines of at least 0\.999, got 0\.0000"):
        bench.check("the fit", rows, rows[::-1])
