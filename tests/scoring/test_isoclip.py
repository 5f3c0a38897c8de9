"""The reducer "isoclip" against the paper's formula in float64, on the features before the projection."""

from __future__ import annotations

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.encoders.projections import Projections
from iosr_fast.methods import compile_method
from iosr_fast.methods.support_set import SupportSet, make_support_set
from iosr_fast.scoring.isoclip import SHARES, fit_isoclip
from iosr_fast.scoring.score import score
from tests.conftest import unit_rows

# (D, d_i, d_t), for example those of ViT-B/32 (square for texts), of ViT-L/14 and of the demo
WIDTHS = [(16, 24, 16), (16, 20, 18), (16, 16, 12), (16, 12, 16), (7, 5, 3), (5, 5, 5), (3, 64, 1)]


def projections_of(rng: np.random.Generator, width: int, image: int, text: int) -> Projections:
    return Projections(*(rng.standard_normal((width, each)).astype(np.float32) for each in (image, text)))


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def iso_features(features: np.ndarray, projections: Projections, top: int, bottom: int) -> np.ndarray:
    """Magistri et al., CVPR 2026: features (N, d_i) by the projection of which directions are removed, unit rows."""
    image, text = (part.astype(np.float64) for part in projections)
    values, vectors = np.linalg.eigh(image.T @ text @ text.T @ image)  # U and S^2 of the inter-modal operator
    number = min(image.shape[1], text.shape[1], len(image))
    kept = vectors[:, np.argsort(-values)[top : number - bottom]]
    return unit(features @ (image @ kept @ kept.T).T)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_the_embedding_is_moved_as_the_paper_moves_the_features(
    widths: tuple[int, int, int], rng: np.random.Generator
) -> None:
    projections, number = projections_of(rng, *widths), min(widths)
    features = rng.standard_normal((9, widths[1]))
    embeddings = unit(features @ projections.image.T.astype(np.float64)).astype(np.float32)
    for top, bottom in ((0, 0), (number // 3, 0), (0, number // 3), (number // 3, number // 4)):
        reducer = fit_isoclip(f"isoclip:{top},{bottom}", embeddings, np.arange(9), projections)
        expected = iso_features(features, projections, top, bottom)
        np.testing.assert_allclose(reducer(embeddings), expected, atol=2e-4)


def nearest_mean_accuracy(rows: np.ndarray, labels: np.ndarray) -> float:
    """With one image left out at a time; images that are alone in their class are wrong."""
    right = 0
    for j, label in enumerate(labels):
        kept = np.arange(len(rows)) != j
        means = [rows[kept & (labels == c)].sum(0) for c in range(labels.max() + 1)]
        scores = [-2.0 if not mean.any() else rows[j] @ mean / np.linalg.norm(mean) for mean in means]
        right += int(np.argmax(scores) == label)
    return right / len(rows)


def problem(rng: np.random.Generator, counts: list[int]) -> tuple[Projections, np.ndarray, np.ndarray]:
    """Embeddings whose directions of the largest singular values carry what their classes share."""
    image, text = projections_of(rng, 32, 40, 32)
    left, _, right = np.linalg.svd(image.T @ text, full_matrices=False)
    values = np.geomspace(30, 0.3, 32).astype(np.float32)
    # W_t such that W_i' W_t has these singular values
    text = np.linalg.pinv(image).T @ (left * values) @ right
    labels = np.repeat(np.arange(len(counts)), counts)
    features = (rng.standard_normal((len(counts), 32))[labels] + 0.8 * rng.standard_normal((len(labels), 32))) @ left.T
    features += 20 * rng.standard_normal((len(labels), 4)) @ left[:, :4].T
    return Projections(image, text.astype(np.float32)), unit(features @ image.T).astype(np.float32), labels


@pytest.mark.parametrize("counts", [[4] * 6, [3, 1, 5, 2, 2, 7], [2, 1, 1]], ids=str)
def test_the_number_of_directions_is_chosen_on_images_that_are_left_out(
    counts: list[int], rng: np.random.Generator
) -> None:
    projections, rows, labels = problem(rng, counts)
    chosen = fit_isoclip("isoclip", rows, labels, projections)
    tried = [
        fit_isoclip(f"isoclip:{int(top * 32)},{int(bottom * 32)}", rows, labels, projections) for top, bottom in SHARES
    ]
    accuracies = [nearest_mean_accuracy(each(rows), labels) for each in tried]
    best = tried[int(np.argmax(accuracies))]
    np.testing.assert_array_equal(chosen.projection, best.projection)
    if counts == [4] * 6:
        assert max(accuracies) > accuracies[0]


def test_with_one_image_a_class_it_removes_what_the_papers_vit_b_32_does(rng: np.random.Generator) -> None:
    projections, rows, labels = problem(rng, [1] * 6)
    expected = fit_isoclip("isoclip:9,3", rows, labels, projections)  # 150 / 512 and 50 / 512 of 32
    np.testing.assert_array_equal(fit_isoclip("isoclip", rows, labels, projections).projection, expected.projection)


@pytest.mark.parametrize("method", ["tip-adapter", "tip-adapter++", "gda", "timo", "proker"])
def test_every_executor_computes_the_same(method: str, rng: np.random.Generator) -> None:
    projections, rows, labels = problem(rng, [3] * 8)
    support = make_support_set(Embeddings(rows, rows[::-1].copy()), labels, unit_rows(rng, 8, 32), 50.0)
    support = SupportSet(**{**vars(support), "projections": projections})
    queries = Embeddings(unit_rows(rng, 19, 32), unit_rows(rng, 19, 32))
    plan = compile_method(method, support, reducer="isoclip")
    assert plan.reducer is not None and plan.reducer.shift is None
    expected = score(plan, queries, "reference")
    assert np.abs(expected - score(compile_method(method, support), queries, "reference")).max() > 1e-3
    for impl in ("numpy", "cpp"):
        np.testing.assert_allclose(score(plan, queries, impl), expected, atol=1e-5 * np.abs(expected).max())


def test_bad_requests_are_named(rng: np.random.Generator) -> None:
    projections, rows, labels = problem(rng, [2] * 3)
    with pytest.raises(ValueError, match=r"needs the image and the text projection of the CLIP, got neither.*'centre'"):
        fit_isoclip("isoclip", rows, labels, None)
    with pytest.raises(ValueError, match="needs the image and the text projection"):
        compile_method("gda", make_support_set(Embeddings(rows), labels, None, 1.0, 3), reducer="isoclip")
    with pytest.raises(ValueError, match="fewer than the 32 directions of this CLIP to remove, got 20\\+12"):
        fit_isoclip("isoclip:20,12", rows, labels, projections)
    with pytest.raises(ValueError, match="projections to the embeddings' 8 channels, got 32"):
        fit_isoclip("isoclip", unit_rows(rng, 6, 8), labels, projections)
    for name in ("isoclip:3", "isoclip:", "isoclip:3,", "isoclip:-1,2", "isoclip:1,2,3", "pca:1,2"):
        with pytest.raises(ValueError, match="expected a reducer of none, centre"):
            fit_isoclip(name, rows, labels, projections)
