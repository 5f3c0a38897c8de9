"""Feature variance and the figure of overlaps; pairs, areas and AUROC are tested in test_methods.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from iosr_fast.training.overlap import feature_variance, plot_overlap
from tests.conftest import unit_rows


def test_feature_variance_is_the_trace_of_the_covariance(rng: np.random.Generator) -> None:
    rows = unit_rows(rng, 40, 9) + np.float32(0.4)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    exact = rows.astype(np.float64)
    assert feature_variance(rows) == pytest.approx(np.trace(np.cov(exact.T)))
    assert feature_variance(rows) == pytest.approx(9 * exact.var(0, ddof=1).mean())
    assert feature_variance(rows) == pytest.approx(40 / 39 * (1 - np.linalg.norm(exact.mean(0)) ** 2), rel=1e-5)
    assert feature_variance(np.repeat(rows[:1], 5, axis=0)) == pytest.approx(0, abs=1e-12)
    assert feature_variance(np.array([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="at least two embeddings, got 1"):
        feature_variance(rows[:1])


@pytest.mark.parametrize("panels", [1, 5])
def test_the_figure_has_a_panel_for_each(rng: np.random.Generator, panels: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    labels = np.repeat(np.arange(4), 5)
    plot_overlap({f"encoder {i}": unit_rows(rng, 20, 6) for i in range(panels)}, labels, tmp_path / "overlap.png")
    assert (tmp_path / "overlap.png").read_bytes().startswith(b"\x89PNG")
