"""Joint prediction: the formulas in float64, folders that are small or one-sided, and refusal where it would harm."""

from __future__ import annotations

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods import METHODS, compile_method, joint
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
    plan = compile_method(method, support, **parameters)
    alone = out_of_fold(METHODS[method], support, None, parameters)
    return predict_jointly(support, plan, alone, folder), score(plan, folder)


def support_of(shots: int) -> SupportSet:
    return WORLD.support([shots] * CLASSES, text=False, tau=100.0)


def estimate_in_float64(x: np.ndarray, y: np.ndarray, q: np.ndarray, start: np.ndarray, rounds: int) -> np.ndarray:
    """The updates as they are written down, image by image: (B, C), rows shifted to a mean of 0."""
    x, q, start = (array.astype(np.float64) for array in (x, q, start))
    (n, width), classes = x.shape, start.shape[1]
    z = np.exp(start)
    for _ in range(rounds):
        mass = np.array([(y == c).sum() + WEIGHT * z[:, c].sum() for c in range(classes)])
        means = np.array(
            [(x[y == c].sum(0) + WEIGHT * sum(z[i, c] * q[i] for i in range(len(q)))) / mass[c] for c in range(classes)]
        )
        scatter = sum(np.outer(x[j] - means[y[j]], x[j] - means[y[j]]) for j in range(n))
        for i in range(len(q)):
            for c in range(classes):
                scatter = scatter + WEIGHT * z[i, c] * np.outer(q[i] - means[c], q[i] - means[c])
        sigma = scatter / (mass.sum() - 1)
        sigma += np.trace(sigma) / (mass.sum() - 1) * np.eye(width)
        logits = ANCHOR * np.maximum(start, FLOOR)
        for i, row in enumerate(q):
            for c, mean in enumerate(means):
                logits[i, c] -= 0.5 * (row - mean) @ np.linalg.solve(sigma, row - mean)
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
    logits = np.concatenate([part.logits(gaussians, slice(None)) for part in parts])
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


@pytest.mark.parametrize("classes", [[3], [0, 7]])
def test_a_folder_with_few_of_the_classes_is_not_classified_worse(classes: list[int]) -> None:
    labels = np.repeat(classes, 60)
    result, alone = together(support_of(4), WORLD.images(labels, 2))
    assert (result.labels == labels).mean() >= (alone.argmax(1) == labels).mean()


def test_copies_of_an_image_get_one_label_and_a_single_image_its_own() -> None:
    folder = WORLD.images(np.arange(200) % CLASSES, 2)
    labels = together(support_of(4), Embeddings(np.repeat(folder.plain, 2, axis=0)))[0].labels
    np.testing.assert_array_equal(labels[::2], labels[1::2])
    assert together(support_of(4), WORLD.images(np.array([5]), 2))[0].labels.tolist() == [5]


def lookalikes(n: int, seed: int) -> tuple[Embeddings, np.ndarray]:
    """Pictures of 4 classes at two opposite places of a circle each: all classes have one mean, and keys tell them
    apart where Gaussians can't."""
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


def test_refused_where_only_the_log_loss_rises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gaussians that are right but far from sure."""
    labels = np.repeat(np.arange(3), 8)
    support = WORLD.support([8] * 3, text=False)
    sure = np.where(np.eye(3, dtype=bool)[labels], 5.0, 0.0).astype(np.float32)
    sure[0] = (0.0, 5.0, 0.0)  # wrong in both, so that no factor is too large
    unsure = sure.copy()
    unsure[1:12] *= np.float32(0.1)
    plan, alone = compile_method("gda", support), out_of_fold(METHODS["gda"], support, None, {"alpha": 0.1})
    for first, second, refused in ((sure, unsure, "no more than noise, and their log-loss is"), (unsure, sure, "")):
        known = type(alone)(alone.folds, alone.labels, first[alone.folds.rows])
        place = iter([second[rows] for rows, _ in alone.folds.splits])
        with monkeypatch.context() as patch:
            patch.setattr(Unlabelled, "logits", lambda part, *_: next(place, second[: len(part.rows)]))  # noqa: B023
            patch.setattr(joint, "estimate", lambda *_: (None, 1))
            result = predict_jointly(support, plan, known, WORLD.images(labels, 3))
        assert refused in result.refused and bool(refused) == bool(result.refused)


def test_the_same_again_and_in_any_order() -> None:
    support, folder = support_of(3), WORLD.images(np.arange(300) % CLASSES, 2)
    first, again = (together(support, folder)[0] for _ in range(2))
    np.testing.assert_array_equal(first.probabilities, again.probabilities)
    order = np.random.default_rng(6).permutation(300)
    other = together(support, folder[order])[0]
    np.testing.assert_allclose(other.probabilities, first.probabilities[order], atol=1e-4)


def test_gaussians_describe_the_embeddings_that_the_method_compares() -> None:
    support, labels = support_of(3), np.arange(240) % CLASSES
    folder = WORLD.images(labels, 2)
    plan, alone = compile_method("gda++", support), out_of_fold(METHODS["gda++"], support, None, {"alpha": 0.1})
    plain, adapted = (predict_jointly(support, plan, alone, folder, which) for which in ("plain", "adapted"))
    only = Embeddings(support.embeddings.adapted), Embeddings(folder.adapted)
    same, _ = together(make_support_set(only[0], support.labels, None, 100.0, CLASSES), only[1])
    np.testing.assert_allclose(adapted.probabilities, same.probabilities, atol=1e-4)
    assert np.abs(plain.probabilities - adapted.probabilities).max() > 0.1


def test_queries_are_checked_and_large_checks_leave_fewer_images_out(monkeypatch: pytest.MonkeyPatch) -> None:
    support = support_of(4)
    with pytest.raises(IosrFastError, match=r"expected plain embeddings of shape \(3, 24\), got \(3, 5\)"):
        together(support, Embeddings(np.eye(3, 5, dtype=np.float32)))
    with pytest.raises(IosrFastError, match="unit"):
        together(support, Embeddings(2 * np.eye(3, WIDTH, dtype=np.float32)))
    folder = WORLD.images(np.arange(50) % CLASSES, 2)
    assert together(support, folder)[0].left_out == 4 * CLASSES
    monkeypatch.setattr(joint, "_LEFT_OUT", 20)
    assert together(support, folder)[0].left_out == 2 * CLASSES
