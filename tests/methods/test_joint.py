"""Joint prediction: the formulas in float64, folders that are small or one-sided, and refusal where it would harm."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods import compile_method, gaussian_mixture, joint
from iosr_fast.methods.gaussian_mixture import ANCHOR, FLOOR, WEIGHT, Unlabelled, estimate
from iosr_fast.methods.joint import predict_jointly
from iosr_fast.methods.support_set import SupportSet, make_support_set
from iosr_fast.methods.tune import tune
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reference import softmax
from iosr_fast.scoring.score import score

pytestmark = pytest.mark.slow

CLASSES, WIDTH = 12, 24


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def rows_of(labels: np.ndarray, seed: int, spread: float = 1.6) -> np.ndarray:
    """Rows about a centre a class, wider in some directions than in others."""
    centres = np.random.default_rng(99).standard_normal((labels.max(initial=0) + CLASSES, WIDTH))
    noise = np.random.default_rng(seed).standard_normal((len(labels), WIDTH)) * np.linspace(0.2, spread, WIDTH)
    return unit(centres[labels] + noise)


def support_of(shots: int, seed: int = 1, classes: int = CLASSES) -> SupportSet:
    labels = np.repeat(np.arange(classes), shots)
    return make_support_set(Embeddings(rows_of(labels, seed)), labels, None, 100.0, classes)


def folder_of(labels: np.ndarray, seed: int = 2) -> Embeddings:
    return Embeddings(rows_of(labels, seed))


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
        logits = np.array(
            [
                [
                    -0.5 * (row - mean) @ np.linalg.solve(sigma, row - mean) + ANCHOR * max(first, FLOOR)
                    for mean, first in pairs
                ]
                for row, pairs in zip(q, [list(zip(means, firsts, strict=True)) for firsts in start], strict=True)
            ]
        )
        z = softmax(logits)
    return logits - logits.mean(1, keepdims=True)


@pytest.mark.parametrize("rounds", [1, 3])
def test_rounds_are_the_formulas_in_float64(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian_mixture, "MAX_ROUNDS", rounds)
    monkeypatch.setattr(gaussian_mixture, "_SETTLED", -1.0)
    monkeypatch.setattr(gaussian_mixture, "_BLOCK", 7 * 5)  # 7 images of 5 classes a block
    support = support_of(3, classes=5)
    rows, queries = support.embeddings.plain, folder_of(np.arange(30) % 5).plain
    start = np.log(softmax(3 * np.random.default_rng(3).standard_normal((30, 5)))).astype(np.float32)
    parts = [Unlabelled(queries[:10], start[:10]), Unlabelled(queries[10:], start[10:])]
    gaussians, done = estimate(rows, support.class_offsets, parts)
    logits = np.concatenate([gaussians.logits(part, slice(None)) for part in parts])
    expected = estimate_in_float64(rows, support.labels, queries, start, rounds)
    assert done == rounds and start.min() < FLOOR
    np.testing.assert_allclose(logits - logits.mean(1, keepdims=True), expected, rtol=1e-3, atol=2e-3)


def test_a_folder_teaches_the_classes() -> None:
    labels = np.random.default_rng(4).integers(0, CLASSES, 600)
    support, folder = support_of(3), folder_of(labels)
    tuned = tune("gda", support)
    result = predict_jointly(support, tuned.compile, folder)
    alone = score(tuned.compile(support), folder).argmax(1)
    assert not result.refused and 1 <= result.rounds <= 10 and result.left_out == 36
    assert result.probabilities.dtype == np.float32 and result.probabilities.shape == (600, CLASSES)
    np.testing.assert_allclose(result.probabilities.sum(1), 1.0, atol=1e-5)
    assert (result.labels == labels).mean() >= (alone == labels).mean() + 0.02
    assert result.left_out_joint >= result.left_out_alone
    assert result.summary().startswith("600 images are classified together: of 36 left-out support images ")


@pytest.mark.parametrize("classes", [[3], [0, 7]])
def test_a_folder_with_few_of_the_classes_is_not_classified_worse(classes: list[int]) -> None:
    labels = np.repeat(classes, 60)
    support, folder = support_of(4), folder_of(labels)
    tuned = tune("gda", support)
    result = predict_jointly(support, tuned.compile, folder)
    alone = score(tuned.compile(support), folder).argmax(1)
    assert (result.labels == labels).mean() >= (alone == labels).mean()


def test_a_single_image_moves_nothing() -> None:
    support, tuned = support_of(4), tune("gda", support_of(4))
    one = predict_jointly(support, tuned.compile, folder_of(np.array([5])))
    assert one.probabilities.shape == (1, CLASSES) and one.labels.tolist() == [5]


def test_copies_of_an_image_get_one_label() -> None:
    folder = folder_of(np.arange(200) % CLASSES)
    twice = Embeddings(np.repeat(folder.plain, 2, axis=0))
    support = support_of(4)
    result = predict_jointly(support, tune("gda", support).compile, twice)
    np.testing.assert_array_equal(result.labels[::2], result.labels[1::2])


def test_no_image_is_no_error() -> None:
    support = support_of(2)
    result = predict_jointly(support, tune("gda", support).compile, Embeddings(np.zeros((0, WIDTH), np.float32)))
    assert result.probabilities.shape == (0, CLASSES) and result.refused == "there are no images to classify"


def lookalikes(n: int, seed: int) -> tuple[Embeddings, np.ndarray]:
    """Pictures of 4 classes at two opposite places of a circle each: all classes have one mean, and keys tell them
    apart where Gaussians can't."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(4), n)
    side = rng.choice([-1.0, 1.0], len(labels))
    angle = np.pi / 4 * labels + np.pi * (side > 0)
    rows = np.concatenate([np.stack([np.cos(angle), np.sin(angle)], 1), np.ones((len(labels), 1))], 1)
    return Embeddings(unit(rows + 0.15 * rng.standard_normal(rows.shape))), labels


def test_refused_where_left_out_images_are_classified_worse() -> None:
    support = make_support_set(*lookalikes(16, 0), text=None, tau=100.0, n_classes=4)
    folder, labels = lookalikes(100, 1)

    def compile(part: SupportSet) -> ScoringPlan:
        return compile_method("tip-adapter", part, alpha=0.3, beta=30.0)

    result = predict_jointly(support, compile, folder)
    plan = compile(support)
    logits = score(plan, folder)
    first = np.log(softmax(logits.astype(np.float64))).astype(np.float32)
    images = Unlabelled(folder.plain, first)
    gaussians, _ = estimate(support.embeddings.plain, support.class_offsets, [images])
    together = gaussians.logits(images, slice(None)).argmax(1)
    assert (together == labels).mean() < (logits.argmax(1) == labels).mean() - 0.1  # it would harm
    assert result.left_out == 64 and result.left_out_joint < result.left_out_alone
    assert result.refused.startswith("of 64 left-out support images hidden among the 400 images, ")
    assert result.summary().startswith("each image is classified alone: of 64 left-out")
    np.testing.assert_allclose(result.probabilities, softmax(logits), atol=1e-6)


def test_refused_where_nothing_can_be_left_out() -> None:
    support, folder = support_of(1), folder_of(np.arange(40) % CLASSES)
    tuned = tune("gda", support)
    result = predict_jointly(support, tuned.compile, folder)
    assert result.refused == "each class has one support image, so none can be left out to check that the folder helps"
    assert result.left_out == result.rounds == 0 and np.isnan(result.left_out_joint)
    np.testing.assert_allclose(result.probabilities, softmax(score(tuned.compile(support), folder)), atol=1e-6)


def test_refused_where_a_class_has_no_image() -> None:
    labels = np.repeat([0, 2], 3)
    support = make_support_set(folder_of(labels), labels, np.eye(3, WIDTH), 100.0)
    result = predict_jointly(support, lambda part: compile_method("tip-adapter", part), folder_of(labels, 5))
    assert result.refused == "1 of 3 classes have no support image to estimate their mean from"


def test_the_same_again_and_in_any_order() -> None:
    labels = np.arange(300) % CLASSES
    support, folder = support_of(3), folder_of(labels)
    tuned = tune("gda", support)
    first, again = (predict_jointly(support, tuned.compile, folder) for _ in range(2))
    np.testing.assert_array_equal(first.probabilities, again.probabilities)
    order = np.random.default_rng(6).permutation(300)
    other = predict_jointly(support, tuned.compile, folder[order])
    np.testing.assert_allclose(other.probabilities, first.probabilities[order], atol=1e-4)


@pytest.mark.parametrize("better", ["plain", "adapted"])
def test_gaussians_describe_the_better_embeddings(better: str) -> None:
    labels = np.repeat(np.arange(CLASSES), 4)
    noise = unit(np.random.default_rng(8).standard_normal((len(labels), WIDTH)))
    parts: dict[str, Any] = {"plain": noise, "adapted": noise} | {better: rows_of(labels, 1)}
    support = make_support_set(Embeddings(**parts), labels, None, 100.0, CLASSES)
    queries = Embeddings(rows_of(labels, 2), rows_of(labels, 2))
    assert predict_jointly(support, tune("tip-adapter", support).compile, queries).which == better
    plain = Embeddings(queries.plain)  # queries of an encoder that gives no adapted embeddings
    assert predict_jointly(support, tune("tip-adapter", support).compile, plain).which == "plain"


def test_queries_are_checked() -> None:
    support = support_of(2)
    compile = tune("gda", support).compile
    with pytest.raises(IosrFastError, match=r"expected plain embeddings of shape \(3, 24\), got \(3, 5\)"):
        predict_jointly(support, compile, Embeddings(np.eye(3, 5, dtype=np.float32)))
    with pytest.raises(IosrFastError, match="unit"):
        predict_jointly(support, compile, Embeddings(2 * np.eye(3, WIDTH, dtype=np.float32)))


def test_large_checks_leave_fewer_images_out(monkeypatch: pytest.MonkeyPatch) -> None:
    support, folder = support_of(4), folder_of(np.arange(50) % CLASSES)
    compile = tune("gda", support).compile
    assert predict_jointly(support, compile, folder).left_out == 4 * CLASSES
    monkeypatch.setattr(joint, "_LEFT_OUT", 20)
    assert predict_jointly(support, compile, folder).left_out == 2 * CLASSES
    monkeypatch.setattr(joint, "_CHECK_LOGITS", 50 * CLASSES)
    assert predict_jointly(support, compile, folder).left_out == CLASSES


def test_memory_is_the_result_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian_mixture, "_BLOCK", 1 << 14)
    classes = 200
    support = support_of(2, classes=classes)
    folder = folder_of(np.arange(20_000) % classes)
    tuned = tune("gda", support)
    tracemalloc.start()
    result = predict_jointly(support, tuned.compile, folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not result.refused and peak < 1.25 * result.probabilities.nbytes


def test_refused_where_only_the_log_loss_rises(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.repeat(np.arange(3), 8)
    alone = np.where(np.eye(3, dtype=bool)[labels], 5.0, 0.0).astype(np.float32)
    together = alone.copy()
    alone[0], together[0] = (0.1, 0.0, 0.0), (5.0, 4.9, 0.0)  # right in both
    together[1:9] *= np.float32(0.1)
    monkeypatch.setattr(joint, "_folds", lambda *_: iter([(np.arange(24), support_of(2))]))
    support = make_support_set(folder_of(labels), labels, None, 100.0, 3)
    folder = folder_of(labels, 3)

    def check(logits: tuple[np.ndarray, np.ndarray]) -> str:
        monkeypatch.setattr(joint, "_fold", lambda *_: logits)
        return predict_jointly(support, lambda part: compile_method("gda", part), folder).refused

    assert check((alone, together)).startswith(
        "of 24 left-out support images hidden among the 24 images, 100.0% are right together, 100.0% alone, no more "
        "than noise, and their log-loss is "
    )
    assert check((together, alone)) == ""
