"""Unknown pictures: the scores in float64, without a fold, the promise on synthetic classes, and small support sets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods import ood_scores
from iosr_fast.methods.folds import make_folds
from iosr_fast.methods.models.gaussian import GaussianModel, shrunk_precision
from iosr_fast.methods.models.ridge import RidgeModel
from iosr_fast.methods.ood_scores import BETA, RIDGE, UNKNOWN_KEY, OodScores, score_names
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.methods.unknown import Unknown, check_unknown_images, fit_unknown
from iosr_fast.utils.ranking import auroc
from tests.methods.support_sets import Clusters, unit

CLASSES = 16  # known ones; as many others follow
WORLD = Clusters(2 * CLASSES, noise=np.linspace(0.2, 1.0, 24), adapted=True, seed=5)


def support_of(shots: int, classes: int = CLASSES, text: bool = True, adapted: bool = False) -> SupportSet:
    support = WORLD.support([shots] * classes, text=text, tau=20.0)
    return support if adapted else replace(support, embeddings=Embeddings(support.embeddings.plain))


def fit(support: SupportSet, adapted: bool = False, unknown: Embeddings | None = None) -> Unknown:
    return fit_unknown(support, make_folds(support), adapted, unknown)


def auroc_of(fitted: Unknown, known: Embeddings, unknown: Embeddings) -> float:
    return auroc(-fitted.score(known), -fitted.score(unknown))


def log_odds(logits: np.ndarray) -> np.ndarray:
    """Of the largest probability."""
    *others, largest = np.sort(logits.astype(np.longdouble)).T
    return (largest - np.log(np.exp(others).sum(0))).astype(np.float64)


@pytest.mark.parametrize("shots", [1, 2, 3])
def test_scores_are_their_formulas(shots: int) -> None:
    support, queries = support_of(shots, adapted=True), WORLD.images(np.arange(0, 2 * CLASSES, 5), 2)
    support = support.only(support.labels != 4)  # a class without images
    scorer = OodScores(support, score_names(support, True))
    cosines = support.tau * queries.plain @ support.text.T
    expected = {"text cosine": cosines.max(1), "text softmax": log_odds(cosines)}
    there = support.of_classes(support.counts > 0)
    for which, ending in (("plain", ""), ("adapted", ", adapted")):
        keys, rows = (getattr(one, which).astype(np.float64) for one in (support.embeddings, queries))
        if shots == 3:  # with fewer there is no covariance without a fold
            model, around = GaussianModel(there, which), rows - keys.mean(0)
            near = model.scores(queries).max(1) - np.diag(rows @ model.fitted.precision @ rows.T) / 2
            joined = shrunk_precision((keys - keys.mean(0)).T @ (keys - keys.mean(0)), len(keys))
            expected[f"discriminant softmax{ending}"] = log_odds(model.scores(queries))
            expected[f"mahalanobis{ending}"] = near
            expected[f"relative mahalanobis{ending}"] = near + np.diag(around @ joined @ around.T) / 2
        expected[f"nearest key{ending}"] = (rows @ keys.T).max(1)
        regression = RidgeModel(there, which, None, BETA, RIDGE, label_weight=1.0, text_weight=0.0)
        expected[f"regression{ending}"] = regression.scores(queries).max(1)
    assert scorer.names == (*expected,) and len(expected) == (12 if shots == 3 else 6)
    np.testing.assert_allclose(scorer(queries), np.stack([*expected.values()], 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("text", "adapted", "shots"), [(True, False, 4), (False, False, 5), (True, True, 2)])
def test_unknown_classes_are_told_apart_and_the_promise_holds(text: bool, adapted: bool, shots: int) -> None:
    fitted = fit(support_of(shots, text=text, adapted=adapted), adapted)
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
        fitted = fit(WORLD.support([6] * CLASSES, 100 + seed, text=False))
        kept.append((fitted.score(queries) <= fitted.threshold(0.9)).mean())
    assert 0.885 < np.mean(kept) < 0.95, kept


def test_small_and_odd_support_sets_give_finite_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    support, queries = support_of(4), WORLD.queries(1)[0]
    for classes in (0, 1):  # texts alone
        fitted = fit(support.only(support.labels < classes))
        assert fitted.names == ("text cosine", "text softmax") and np.isfinite(fitted.score(queries)).all()
    for shots, classes in ((1, CLASSES), (4, 2), (1, 2)):  # one score stands alone where no weight can be learnt
        fitted = fit(support_of(shots, classes=classes))
        assert np.flatnonzero(fitted.weights).tolist() == [fitted.names.index("regression")] and np.isnan(fitted.auroc)
        known, others = (WORLD.images(first + np.repeat([0, 1], 40), 3) for first in (0, CLASSES))
        assert auroc_of(fitted, known, others) > 0.8
    copies = replace(support, embeddings=Embeddings(unit(WORLD.centres[support.labels])))
    assert np.isfinite(fit(copies).score(queries)).all()
    assert np.count_nonzero(fit(support_of(8, classes=3)).weights) == 7  # three classes are enough
    monkeypatch.setattr(ood_scores, "MAX_REGRESSION", 50)
    many = fit(support)
    assert "regression" not in many.names and "mahalanobis" in many.names and np.isfinite(many.score(queries)).all()


def test_too_few_images_for_a_promise_are_told_with_the_number_that_is_needed() -> None:
    fitted = fit(support_of(4, classes=4))
    with pytest.raises(IosrFastError, match=r"0\.95 of the pictures needs at least 19 .* got 16: give more"):
        fitted.threshold(0.95)
    assert "16 left-out support images are too few" in fitted.summary()
    assert fitted.threshold(0.9) > 0 and "by 16 left-out" in fitted.summary(0.9)
    support = WORLD.support([1, 1] + [4] * (CLASSES - 2))
    support.embeddings.plain[2:6] = support.embeddings.plain[2]  # near duplicates: none is left out
    assert "left-out support images (none of 3 classes, whose pictures" in fit(support).summary(0.8)
    with pytest.raises(IosrFastError, match="got 0"):
        fit(support_of(1)).threshold()


def test_unknown_pictures_that_come_again_are_recognised() -> None:
    support, (known, _) = support_of(6, text=False), WORLD.queries(30, seed=3, classes=CLASSES)
    pictures, again = (WORLD.images(np.arange(n) % 3 + CLASSES, seed) for n, seed in ((24, 4), (90, 3)))
    alone, taught = fit(support), fit(support, unknown=pictures)
    before, after = (auroc_of(fitted, known, again) for fitted in (alone, taught))
    assert after > before + 0.3 * (1.0 - before), (before, after)
    assert abs((taught.score(known) <= taught.threshold(0.9)).mean() - 0.9) < 0.07
    assert taught.names == (*alone.names, UNKNOWN_KEY) and (taught.weights[-2:] > 0).all()
    cosines = known.plain.astype(np.float64) @ pictures.plain.T
    assert taught.scorer(known)[:, -1] == pytest.approx(-cosines.max(1))
    assert (fit(support, unknown=pictures[:1]).weights == alone.weights).all()  # one changes nothing
    with pytest.raises(IosrFastError, match=r"expected two or more unknown images, .* got one"):
        check_unknown_images(1)
