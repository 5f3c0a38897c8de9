"""Joint prediction: the formulas in float64, folders that are small or one-sided, and refusal where it would harm."""

from __future__ import annotations

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods import METHODS, joint
from iosr_fast.methods.config import Config
from iosr_fast.methods.folds import make_folds
from iosr_fast.methods.joint import ANCHOR, FLOOR, WEIGHT, JointPrediction, Unlabelled, estimate, predict_jointly
from iosr_fast.methods.models.gaussian import Moments
from iosr_fast.methods.out_of_fold import out_of_fold
from iosr_fast.methods.support_set import SupportSet, make_support_set
from iosr_fast.scoring.reference import softmax
from iosr_fast.scoring.score import score
from tests.methods.support_sets import Clusters, unit

CLASSES, WIDTH = 12, 24
WORLD = Clusters(CLASSES, noise=np.linspace(0.2, 1.6, WIDTH), adapted=True)


def together(
    support: SupportSet, folder: Embeddings, method: str = "gda", **parameters: float
) -> tuple[JointPrediction, np.ndarray]:
    """The joint prediction and the logits of the method alone."""
    parameters = {**METHODS[method].parameters, **parameters}
    plan = Config(method=method, parameters=parameters).compile(support)
    alone = out_of_fold(METHODS[method], support, make_folds(support), None, parameters)
    return predict_jointly(support, plan, alone, folder), score(plan, folder)


def support_of(shots: int) -> SupportSet:
    return WORLD.support([shots] * CLASSES, text=False, tau=100.0)


def estimate_in_float64(x: np.ndarray, y: np.ndarray, q: np.ndarray, start: np.ndarray, rounds: int) -> np.ndarray:
    """The updates as they are written down, image by image: (B, C), rows shifted to a mean of 0."""
    x, q, start, y = *(array.astype(np.float64) for array in (x, q, start)), np.eye(start.shape[1])[y]
    rows, z = np.vstack([x, q]), np.exp(start)
    for _ in range(rounds):
        shares = np.vstack([y, WEIGHT * z])
        means = (shares.T @ rows) / shares.sum(0)[:, None]
        around, to_means = rows[:, None] - means, q[:, None] - means
        sigma = np.einsum("nc,ncd,nce->de", shares, around, around) / (shares.sum() - 1)
        sigma += np.trace(sigma) / (shares.sum() - 1) * np.eye(len(sigma))
        distances = np.einsum("bcd,de,bce->bc", to_means, np.linalg.inv(sigma), to_means)
        logits = ANCHOR * np.maximum(start, FLOOR) - distances / 2
        z = softmax(logits)
    return logits - logits.mean(1, keepdims=True)


@pytest.mark.parametrize("rounds", [1, 3])
def test_rounds_are_the_formulas_in_float64(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "MAX_ROUNDS", rounds)
    monkeypatch.setattr(joint, "_SETTLED", -1.0)
    monkeypatch.setattr(joint, "_BLOCK", 7 * 5)  # 7 images of 5 classes a block
    support = WORLD.support([3] * 5, text=False)
    rows, queries = support.embeddings.plain, WORLD.images(np.arange(30) % 5, 2).plain
    start = np.log(softmax(3 * np.random.default_rng(3).standard_normal((30, 5)))).astype(np.float32)
    parts = [Unlabelled(queries[:10], start[:10]), Unlabelled(queries[10:], start[10:])]
    gaussians, done = estimate(Moments.of(rows.astype(np.float64), support.one_hot), parts)
    logits = np.concatenate([part.logits(gaussians) for part in parts])
    expected = estimate_in_float64(rows, support.labels, queries, start, rounds)
    assert done == rounds and start.min() < FLOOR and logits.dtype == np.float32
    np.testing.assert_allclose(logits - logits.mean(1, keepdims=True), expected, rtol=1e-3, atol=2e-3)


def test_a_folder_teaches_the_classes() -> None:
    labels, support = np.random.default_rng(4).integers(0, CLASSES, 600), support_of(3)
    result, alone = together(support, WORLD.images(labels, 2))
    assert not result.refused and 1 <= result.rounds <= 10 and result.left_out == 36
    assert result.probabilities.dtype == np.float32 and result.probabilities.shape == (600, CLASSES)
    np.testing.assert_allclose(result.probabilities.sum(1), 1.0, atol=1e-5)
    assert (result.labels == labels).mean() >= (alone.argmax(1) == labels).mean() + 0.02
    assert result.left_out_joint >= result.left_out_alone
    assert result.summary().startswith("600 images are classified together: of 36 left-out support images ")


def lookalikes(n: int, seed: int) -> tuple[Embeddings, np.ndarray]:
    """Each of 4 classes at two opposite places of a circle: all have one mean, so that only keys tell them apart."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(4), n)
    angle = np.pi / 4 * labels + np.pi * rng.integers(0, 2, 4 * n)
    rows = np.stack([np.cos(angle), np.sin(angle), np.ones(4 * n)], 1)
    return Embeddings(unit(rows + 0.15 * rng.standard_normal(rows.shape))), labels


def test_refused_where_left_out_images_are_classified_worse() -> None:
    support = make_support_set(*lookalikes(16, 0), text=None, tau=100.0, n_classes=4)
    result, alone = together(support, lookalikes(100, 1)[0], "tip-adapter", alpha=0.3, beta=30.0)
    assert result.left_out == 64 and result.left_out_joint < result.left_out_alone
    assert result.refused.startswith("of 64 left-out support images hidden among the 400 images, ")
    assert "noise" not in result.refused
    assert result.summary().startswith("each image is classified alone: of 64 left-out")
    np.testing.assert_allclose(result.probabilities, softmax(alone), atol=1e-6)


def test_refused_where_it_can_not_be_checked() -> None:
    folder = WORLD.images(np.arange(40) % CLASSES, 2)
    lacking = support_of(3).only(support_of(3).labels != 2)
    for support, images, refused, method in (
        (support_of(1), folder, "each class has one support image, so none can be left out to check", "gda"),
        (lacking, folder, "1 of 12 classes have no support image to estimate their mean from", "tip-adapter"),
        (support_of(2), folder[:0], "there are no images to classify", "gda"),
    ):
        result, alone = together(support, images, method)
        assert result.refused.startswith(refused) and result.left_out == result.rounds == 0
        assert np.isnan(result.left_out_joint)
        np.testing.assert_allclose(result.probabilities, softmax(alone), atol=1e-6)


def test_the_same_again_and_in_any_order() -> None:
    support, folder = support_of(3), WORLD.images(np.arange(300) % CLASSES, 2)
    first, again = (together(support, folder)[0] for _ in range(2))
    np.testing.assert_array_equal(first.probabilities, again.probabilities)
    order = np.random.default_rng(6).permutation(300)
    other = together(support, folder[order])[0]
    np.testing.assert_allclose(other.probabilities, first.probabilities[order], atol=1e-4)
