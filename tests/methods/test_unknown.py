"""Unknown pictures: the scores in float64, without a fold, the promise on synthetic classes, and small support sets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods import ood_scores
from iosr_fast.methods.folds import make_folds
from iosr_fast.methods.ood_scores import BETA, GAUSSIAN_SCORES, RIDGE, UNKNOWN_KEY, OodScores, score_names
from iosr_fast.methods.support_set import SupportSet, class_weights
from iosr_fast.methods.unknown import Unknown, check_unknown_images, fit_unknown
from iosr_fast.utils.ranking import auroc
from tests.methods.support_sets import Clusters, unit

CLASSES = 16  # known ones; as many others follow
WORLD = Clusters(2 * CLASSES, noise=np.linspace(0.2, 1.0, 24), adapted=True, seed=5)


def support_of(shots: int, classes: int = CLASSES, text: bool = True, adapted: bool = False) -> SupportSet:
    support = WORLD.support([shots] * classes, text=text, tau=20.0)
    return support if adapted else replace(support, embeddings=Embeddings(support.embeddings.plain))


def auroc_of(fitted: Unknown, known: Embeddings, unknown: Embeddings) -> float:
    return auroc(-fitted.score(known), -fitted.score(unknown))


def log_odds_of_softmax(values: np.ndarray) -> float:
    powers, top = np.exp(values - values.max()), int(values.argmax())
    return float(np.log(powers[top] / np.maximum(np.delete(powers, top).sum(), 1e-300)))


def precision_of(centred: np.ndarray) -> np.ndarray:
    sigma, n = centred.T @ centred / (len(centred) - 1), len(centred)
    return np.linalg.inv(sigma + (np.trace(sigma) / (n - 1) + 1e-15) * np.eye(len(sigma)))


def image_scores(support: SupportSet, background: SupportSet, which: str, query: np.ndarray) -> dict[str, float]:
    """Of one query in float64; `background` is the support set of all images, of which no fold is left out."""
    keys, everything = (getattr(one.embeddings, which).astype(np.float64) for one in (support, background))
    y, x, middle, counts = support.labels, query.astype(np.float64), everything.mean(0), support.counts
    present = np.flatnonzero(counts)
    means = np.array([keys[y == c].mean(0) for c in present])
    around = keys - means[np.searchsorted(present, y)]
    p, p0 = precision_of(around), precision_of(everything - middle)
    noise = np.trace(around @ p @ around.T) / max(1, len(keys) - len(present))  # of means (models.gaussian)
    lengths = np.diag(means @ p @ means.T) - noise * (1 / counts[present] - 1 / counts.max())
    g = means @ p @ x - lengths / 2
    density = g.max() - x @ p @ x / 2
    kernel, ridge = np.exp(-BETA * (1 - keys @ keys.T)), RIDGE / class_weights(background.counts)[y]
    values = np.linalg.solve(kernel + np.diag(ridge), np.eye(support.n_classes)[y][:, present])
    return {
        "discriminant softmax": log_odds_of_softmax(g),
        "mahalanobis": density,
        "relative mahalanobis": density + (x - middle) @ p0 @ (x - middle) / 2,
        "nearest key": (keys @ x).max(),
        "regression": (np.exp(-BETA * (1 - keys @ x)) @ values).max(),
    }


def expected_scores(support: SupportSet, background: SupportSet, queries: Embeddings, b: int) -> dict[str, float]:
    cosines = 20.0 * support.text @ queries.plain[b].astype(np.float64)
    found = {"text cosine": float(cosines.max()), "text softmax": log_odds_of_softmax(cosines)}
    for which, ending in (("plain", ""), ("adapted", ", adapted")):
        scores = image_scores(support, background, which, getattr(queries, which)[b])
        found |= {f"{name}{ending}": value for name, value in scores.items()}
    return found


@pytest.mark.parametrize("shots", [1, 2, 3])
def test_scores_are_their_formulas(shots: int) -> None:
    support, queries = support_of(shots, adapted=True), WORLD.images(np.arange(0, 2 * CLASSES, 5), 2)
    support = support.only(support.labels != 4)  # a class without images
    scorer = OodScores(support, score_names(support, True))
    gaussian = {name for name in scorer.names if name.removesuffix(", adapted") in GAUSSIAN_SCORES}
    assert len(scorer.names) == 12 - 6 * (shots < 3) and bool(gaussian) == (shots == 3)  # no covariance without a fold
    for b, row in enumerate(scorer(queries)):
        expected = expected_scores(support, support, queries, b)
        assert row == pytest.approx([expected[name] for name in scorer.names], rel=1e-5, abs=1e-6)


def test_scores_without_a_fold_are_those_of_the_others_and_the_background_of_all() -> None:
    support = WORLD.support([3, 1, 5, 2, 4], views=True, tau=20.0)
    folds, scorer = make_folds(support), OodScores(support, score_names(support, True))
    scores = scorer.without(folds)
    assert scores.shape == (14, 12)
    for row, j in zip(scores, folds.rows, strict=True):
        others = support.only(folds.fold != folds.fold[j])
        expected = expected_scores(others, support, support.as_queries, j)
        assert row == pytest.approx([expected[name] for name in scorer.names], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("text", "adapted", "shots"), [(True, False, 4), (False, False, 5), (True, True, 2)])
def test_unknown_classes_are_told_apart_and_the_promise_holds(text: bool, adapted: bool, shots: int) -> None:
    fitted = fit_unknown(support_of(shots, text=text, adapted=adapted), adapted)
    (queries, labels) = WORLD.queries(60, seed=3)
    known, values = labels < CLASSES, fitted.score(queries)
    combined = auroc(-values[known], -values[~known])
    assert combined > 0.9 and abs(fitted.auroc - combined) < 0.06
    singles = fitted.scorer(queries).T
    assert combined >= max(auroc(one[known], one[~known]) for one in singles) - 0.01
    assert (values[known] <= fitted.threshold(0.9)).mean() > 0.82
    np.testing.assert_array_equal(fitted.rejects(queries, 0.9), values > fitted.threshold(0.9))
    assert f"{fitted.auroc:.3f}" in fitted.summary()
    assert fitted.left_out.mean() == pytest.approx(0, abs=1e-9) and fitted.left_out.std() == pytest.approx(1)
    assert fitted.score(queries[:0]).shape == (0,) and len(fitted.left_out) == shots * CLASSES


def test_the_mean_kept_over_many_support_sets_is_the_promise() -> None:
    kept, (queries, _) = [], WORLD.queries(30, seed=7, classes=CLASSES)
    for seed in range(12):
        fitted = fit_unknown(WORLD.support([6] * CLASSES, 100 + seed, text=False))
        kept.append((fitted.score(queries) <= fitted.threshold(0.9)).mean())
    assert 0.885 < np.mean(kept) < 0.95, kept


def test_small_and_odd_support_sets_give_finite_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    support, queries = support_of(4), WORLD.queries(1)[0]
    for classes in (0, 1):  # texts alone
        fitted = fit_unknown(support.only(support.labels < classes))
        assert fitted.names == ("text cosine", "text softmax") and np.isfinite(fitted.score(queries)).all()
    for shots, classes in ((1, CLASSES), (4, 2), (1, 2)):  # one score stands alone where no weight can be learnt
        fitted = fit_unknown(support_of(shots, classes=classes))
        assert np.flatnonzero(fitted.weights).tolist() == [fitted.names.index("regression")] and np.isnan(fitted.auroc)
        known, others = (WORLD.images(first + np.repeat([0, 1], 40), 3) for first in (0, CLASSES))
        assert auroc_of(fitted, known, others) > 0.8
    copies = replace(support, embeddings=Embeddings(unit(WORLD.centres[support.labels])))
    assert np.isfinite(fit_unknown(copies).score(queries)).all()
    assert np.count_nonzero(fit_unknown(support_of(8, classes=3)).weights) == 7  # three classes are enough
    monkeypatch.setattr(ood_scores, "MAX_REGRESSION", 50)
    many = fit_unknown(support)
    assert "regression" not in many.names and "mahalanobis" in many.names and np.isfinite(many.score(queries)).all()


def test_too_few_images_for_a_promise_are_told_with_the_number_that_is_needed() -> None:
    fitted = fit_unknown(support_of(4, classes=4))
    with pytest.raises(IosrFastError, match=r"0\.95 of the pictures needs at least 19 .* got 16: give more"):
        fitted.threshold(0.95)
    assert "16 left-out support images are too few" in fitted.summary()
    assert fitted.threshold(0.9) > 0 and "by 16 left-out" in fitted.summary(0.9)
    single = fit_unknown(WORLD.support([1, 1] + [4] * (CLASSES - 2)))
    assert "left-out support images (none of the 2 classes with one image" in single.summary(0.8)
    with pytest.raises(IosrFastError, match="got 0"):
        fit_unknown(support_of(1)).threshold()


def test_unknown_pictures_that_come_again_are_recognised() -> None:
    support, (known, _) = support_of(6, text=False), WORLD.queries(30, seed=3, classes=CLASSES)
    pictures, again = (WORLD.images(np.arange(n) % 3 + CLASSES, seed) for n, seed in ((24, 4), (90, 3)))
    alone, taught = fit_unknown(support), fit_unknown(support, unknown=pictures)
    before, after = (auroc_of(fitted, known, again) for fitted in (alone, taught))
    assert after > before + 0.3 * (1.0 - before), (before, after)
    assert abs((taught.score(known) <= taught.threshold(0.9)).mean() - 0.9) < 0.07
    assert taught.names == (*alone.names, UNKNOWN_KEY) and (taught.weights[-2:] > 0).all()
    cosines = known.plain.astype(np.float64) @ pictures.plain.T
    assert taught.scorer(known)[:, -1] == pytest.approx(-cosines.max(1))
    assert (fit_unknown(support, unknown=pictures[:1]).weights == alone.weights).all()  # one changes nothing
    with pytest.raises(IosrFastError, match=r"expected two or more unknown images, .* got one"):
        check_unknown_images(1)
