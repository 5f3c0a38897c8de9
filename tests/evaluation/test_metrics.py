"""Log-loss and calibration error against scikit-learn and against the definition, written out."""

from __future__ import annotations

import numpy as np
import pytest

from iosr_fast.evaluation import metrics
from iosr_fast.evaluation.metrics import BINS, measure, measure_probabilities


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    shares: np.ndarray = powers / powers.sum(1, keepdims=True)
    return shares


def written_out(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Guo et al. 2017, equations 2, 3 and 5, image by image."""
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for row, label in zip(probabilities, labels, strict=True):
        for m in range(BINS):
            if m / BINS < row.max() <= (m + 1) / BINS:
                bins[m].append((row.max(), row.argmax() == label))
    return sum(
        len(one) / len(labels) * abs(np.mean([right for _, right in one]) - np.mean([sure for sure, _ in one]))
        for one in bins
        if one
    )


@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])
def test_scores_are_those_of_the_definitions(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    logits = (scale * rng.standard_normal((301, 7))).astype(np.float32)
    labels = np.where(rng.random(301) < 0.6, logits.argmax(1), rng.integers(0, 7, 301))
    probabilities = softmax(logits.astype(np.float64))
    scores = measure(logits, labels)
    assert scores.accuracy == (logits.argmax(1) == labels).mean()
    assert scores.log_loss == pytest.approx(-np.log(probabilities[np.arange(301), labels]).mean())
    assert scores.calibration_error == pytest.approx(written_out(probabilities, labels))
    monkeypatch.setattr(metrics, "ROWS", 100)  # the last part is a short one
    assert vars(measure(logits, labels)) == pytest.approx(vars(scores))
    again = measure_probabilities(np.maximum(probabilities, 1e-15), labels)
    assert again.calibration_error == pytest.approx(scores.calibration_error, abs=1e-9)


def test_extremes(rng: np.random.Generator) -> None:
    labels = np.array([0, 1, 1, 0])
    assert vars(measure(1e4 * np.eye(2)[labels], labels)) == {"accuracy": 1, "log_loss": 0, "calibration_error": 0}
    sure_and_wrong = measure(1e4 * np.eye(2)[1 - labels], labels)
    assert sure_and_wrong.log_loss == 1e4 and sure_and_wrong.calibration_error == 1
    undecided = measure(np.zeros((4, 2)), labels)
    assert undecided.accuracy == 0.5 and undecided.log_loss == pytest.approx(np.log(2))
    assert undecided.calibration_error == 0
    one_image = measure(np.log([[0.3, 0.7]]), np.array([0]))
    assert vars(one_image) == pytest.approx({"accuracy": 0, "log_loss": -np.log(0.3), "calibration_error": 0.7})


def test_a_probability_of_zero_counts_as_in_scikit_learn(rng: np.random.Generator) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn comes with the sklearn extra")
    probabilities = rng.integers(0, 3, (40, 4)) + 1e-300
    probabilities /= probabilities.sum(1, keepdims=True)
    labels = np.arange(40) % 4
    expected = metrics.log_loss(labels, probabilities)
    assert measure_probabilities(probabilities, labels).log_loss == pytest.approx(expected) and expected > 1
