"""Unknown pictures: the scores in float64, without a fold, the promise on synthetic classes, and small support sets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods import known_scores
from iosr_fast.methods.folds import make_folds
from iosr_fast.methods.known_scores import BETA, GAUSSIAN_SCORES, RIDGE, UNKNOWN_KEY, KnownScores, score_names
from iosr_fast.methods.support_set import SupportSet, class_weights
from iosr_fast.methods.unknown import KEEP, Unknown, check_unknown, check_unknown_images, fit_unknown, without_rejected
from iosr_fast.utils.ranking import auroc
from tests.methods.support_sets import Clusters, unit

CLASSES = 16  # known ones; as many others follow
WORLD = Clusters(2 * CLASSES, noise=np.linspace(0.2, 1.0, 24), adapted=True, seed=5)


def support_of(
    shots: int, classes: int = CLASSES, text: bool = True, adapted: bool = False, seed: int = 1
) -> SupportSet:
    support = WORLD.support([shots] * classes, seed, text=text, tau=20.0)
    return support if adapted else replace(support, embeddings=Embeddings(support.embeddings.plain))


def auroc_of(fitted: Unknown, known: Embeddings, unknown: Embeddings) -> float:
    return auroc(-fitted.score(known), -fitted.score(unknown))


def log_odds_of_softmax(values: np.ndarray) -> float:
    powers, top = np.exp(values - values.max()), int(values.argmax())
    return float(np.log(powers[top] / np.maximum(np.delete(powers, top).sum(), 1e-300)))


class Formulas:
    """Every score of one query, term by term in float64; `background` is the support set of all images, `of_all` the
    weights of its classes."""

    def __init__(self, support: SupportSet, background: SupportSet, which: str) -> None:
        self.keys, self.all = (getattr(one.embeddings, which).astype(np.float64) for one in (support, background))
        self.y, self.classes = support.labels, np.flatnonzero(support.counts)
        self.means = [self.keys[self.y == c].mean(0) for c in self.classes]
        around = np.concatenate([self.keys[self.y == c] - self.keys[self.y == c].mean(0) for c in self.classes])
        self.p, self.p0 = self.precision(around), self.precision(self.all - self.all.mean(0))
        # The noise of means: classes that lost an image have one of a smaller class (models.gaussian).
        counts = support.counts[self.classes]
        noise = np.trace(around @ self.p @ around.T) / max(1, len(around) - len(counts))
        self.excess = noise * (1 / counts - 1 / counts.max())
        ridge = RIDGE / class_weights(background.counts)[self.y]
        kernel = np.exp(-BETA * (1 - self.keys @ self.keys.T)) + np.diag(ridge)
        self.values = np.linalg.solve(kernel, (self.y[:, None] == self.classes[None, :]).astype(float))

    def precision(self, centred: np.ndarray) -> np.ndarray:
        sigma, n = centred.T @ centred / (len(centred) - 1), len(centred)
        return np.linalg.inv(sigma + (np.trace(sigma) / (n - 1) + 1e-15) * np.eye(len(sigma)))

    def __call__(self, query: np.ndarray) -> dict[str, float]:
        x, middle = query.astype(np.float64), self.all.mean(0)
        lengths = np.array([m @ self.p @ m for m in self.means]) - self.excess
        g = np.array([x @ self.p @ m for m in self.means]) - lengths / 2
        distance = float(x @ self.p @ x - 2 * g.max())
        r = np.sort(np.exp(-BETA * (1 - self.keys @ x)) @ self.values)
        return {
            "discriminant": float(g.max()),
            "discriminant softmax": log_odds_of_softmax(g),
            "centred discriminant": float(g.max() - (x @ self.p @ middle - middle @ self.p @ middle / 2)),
            "mahalanobis": -distance,
            "relative mahalanobis": -distance + float((x - middle) @ self.p0 @ (x - middle)),
            "nearest key": float((self.keys @ x).max()),
            "regression": float(r[-1]),
            "regression margin": float(r[-1] - r[-2]),
        }


def expected_scores(support: SupportSet, background: SupportSet, queries: Embeddings, b: int) -> dict[str, float]:
    cosines = 20.0 * support.text @ queries.plain[b].astype(np.float64)
    found = {"text cosine": float(cosines.max()), "text softmax": log_odds_of_softmax(cosines)}
    for which, ending in (("plain", ""), ("adapted", ", adapted")):
        scores = Formulas(support, background, which)(getattr(queries, which)[b])
        found |= {f"{name}{ending}": value for name, value in scores.items()}
    return found


def assert_scores(names: tuple[str, ...], found: np.ndarray, expected: dict[str, float]) -> None:
    for name, value in zip(names, found, strict=True):
        assert value == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(("shots", "empty"), [(3, False), (1, False), (2, True), (3, True)])
def test_scores_are_their_formulas(shots: int, empty: bool) -> None:
    support = support_of(shots, adapted=True)
    support = support.only(support.labels != 4) if empty else support
    queries = WORLD.images(np.arange(0, 2 * CLASSES, 5), 2)
    scorer = KnownScores(support, score_names(support, True))
    gaussian = {name for name in scorer.names if name.removesuffix(", adapted") in GAUSSIAN_SCORES}
    assert len(scorer.names) == 18 - 10 * (shots < 3) and bool(gaussian) == (shots == 3)  # no covariance without a fold
    for b, row in enumerate(scorer(queries)):
        assert_scores(scorer.names, row, expected_scores(support, support, queries, b))


def test_scores_without_a_fold_are_those_of_the_others_and_the_background_of_all() -> None:
    support = WORLD.support([3, 1, 5, 2, 4], views=True, tau=20.0)
    folds, scorer = make_folds(support), KnownScores(support, score_names(support, True))
    scores = scorer.without(folds)
    assert scores.shape == (14, 18)
    for row, j in zip(scores, folds.rows, strict=True):
        others = support.only(folds.fold != folds.fold[j])
        assert_scores(scorer.names, row, expected_scores(others, support, support.as_queries, j))


def test_the_score_of_unknown_pictures_is_minus_the_largest_cosine() -> None:
    support, pictures = support_of(4, adapted=True), WORLD.images(np.arange(CLASSES, CLASSES + 5), 4)
    queries = WORLD.images(np.arange(2 * CLASSES), 2)
    for which, adapted in (("plain", False), ("adapted", True)):
        names = score_names(support, adapted, pictures)
        column = KnownScores(support, names, pictures)(queries)[:, -1]
        rows, keys = (getattr(part, which).astype(np.float64) for part in (queries, pictures))
        assert names[-1] == UNKNOWN_KEY and column == pytest.approx(-(rows @ keys.T).max(1))


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
    assert f"{fitted.auroc:.3f}" in fitted.promise()
    assert fitted.left_out.mean() == pytest.approx(0, abs=1e-9) and fitted.left_out.std() == pytest.approx(1)
    np.testing.assert_allclose(values[3:5], fitted.score(queries[3:5]), rtol=1e-9, atol=1e-9)
    assert fitted.score(queries[:0]).shape == (0,) and len(fitted.left_out) == shots * CLASSES


def test_the_mean_kept_over_many_support_sets_is_the_promise() -> None:
    kept, (queries, _) = [], WORLD.queries(30, seed=7, classes=CLASSES)
    for seed in range(12):
        fitted = fit_unknown(support_of(6, text=False, seed=100 + seed))
        kept.append((fitted.score(queries) <= fitted.threshold(0.9)).mean())
    assert 0.885 < np.mean(kept) < 0.95, kept


def test_unknown_pictures_sharpen_and_are_recognised() -> None:
    """Pictures of a kind that no left-out class shows, between two classes; and classes whose pictures come again."""
    support, rng = support_of(6, text=False), np.random.default_rng(0)

    def between(n: int) -> Embeddings:
        one, other = WORLD.centres[rng.integers(0, CLASSES, (2, n))]
        return Embeddings(unit(one + other + 0.3 * rng.standard_normal((n, 24))))

    alone, (known, _) = fit_unknown(support), WORLD.queries(30, seed=3, classes=CLASSES)
    strange, far, again = np.arange(CLASSES, CLASSES + 3), between(400), WORLD.images(np.arange(90) % 3 + CLASSES, 3)
    assert auroc_of(fit_unknown(support, unknown=between(200)), known, far) > auroc_of(alone, known, far) + 0.01
    taught = fit_unknown(support, unknown=WORLD.images(np.repeat(strange, 8), 4))
    before, after = (auroc_of(fitted, known, again) for fitted in (alone, taught))
    assert after > before + 0.3 * (1.0 - before), (before, after)
    assert abs((taught.score(known) <= taught.threshold(0.9)).mean() - 0.9) < 0.07
    assert taught.names == (*alone.names, UNKNOWN_KEY) and (taught.weights[-2:] > 0).all()
    for few in (between(0), between(1)):  # which change nothing
        assert (fit_unknown(support, unknown=few).weights == alone.weights).all()
    with pytest.raises(IosrFastError, match=r"expected two or more unknown images, .* got one"):
        check_unknown_images(1)


@pytest.mark.parametrize(("shots", "classes"), [(1, CLASSES), (4, 2), (1, 2)])
def test_one_score_stands_alone_where_nothing_can_be_learnt(shots: int, classes: int) -> None:
    fitted = fit_unknown(support_of(shots, classes=classes))
    assert np.flatnonzero(fitted.weights).tolist() == [fitted.names.index("regression")] and np.isnan(fitted.auroc)
    known, others = (WORLD.images(first + np.repeat([0, 1], 40), 3) for first in (0, CLASSES))
    assert auroc_of(fitted, known, others) > 0.8


def test_texts_alone_are_scored_where_fewer_than_two_classes_have_an_image() -> None:
    support, (queries, _) = support_of(3), WORLD.queries(1)
    odds = KnownScores(support, score_names(support, False))(queries)[:, 1]
    for kept in (np.zeros(len(support.labels), bool), support.labels == 0):
        fitted = fit_unknown(support.only(kept))
        assert fitted.names == ("text cosine", "text softmax") and "too few to promise" in fitted.promise()
        assert np.corrcoef(fitted.score(queries), -odds)[0, 1] == pytest.approx(1.0)


def test_too_few_images_for_a_promise_are_told_with_the_number_that_is_needed() -> None:
    fitted = fit_unknown(support_of(4, classes=4))
    with pytest.raises(IosrFastError, match=r"0\.95 of the pictures needs at least 19 .* got 16: give more"):
        fitted.threshold(0.95)
    assert "16 left-out support images are too few" in fitted.promise()
    assert fitted.threshold(0.9) > 0 and "by 16 left-out" in fitted.promise(0.9)
    single = fit_unknown(WORLD.support([1, 1] + [4] * (CLASSES - 2)))
    assert "left-out support images (none of the 2 classes with one image" in single.promise(0.8)
    with pytest.raises(IosrFastError, match="got 0"):
        fit_unknown(support_of(1)).threshold()


def test_odd_support_sets_give_finite_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, queries = np.repeat(np.arange(5), 4), WORLD.queries(1)[0]
    copies = replace(WORLD.support([4] * 5), embeddings=Embeddings(unit(WORLD.centres[labels])))
    assert np.isfinite(fit_unknown(copies).score(queries)).all()
    three = fit_unknown(support_of(8, classes=3))
    assert np.count_nonzero(three.weights) == len(three.names)
    monkeypatch.setattr(known_scores, "MAX_REGRESSION", 50)
    many = fit_unknown(support_of(4))
    assert "regression" not in many.names and "mahalanobis" in many.names and np.isfinite(many.score(queries)).all()


def test_words_for_rejected_pictures() -> None:
    rejected = np.array([True, False])
    assert without_rejected(np.array(["a", "bb"]), rejected, "unknown").tolist() == ["unknown", "bb"]
    assert without_rejected(np.array(["a", "bb"]), rejected, None).tolist() == [None, "bb"]
    assert without_rejected(np.array([4, 7]), rejected, "unknown").tolist() == ["unknown", 7]
    assert check_unknown(None, KEEP) is None and check_unknown("reject", 0.9) == 0.9
    with pytest.raises(IosrFastError, match=r"expected keep only with unknown='reject', got 0\.9 without it"):
        check_unknown(None, 0.9)
    with pytest.raises(IosrFastError, match="expected unknown_label only with unknown='reject'"):
        check_unknown(None, KEEP, "?")
    with pytest.raises(IosrFastError, match="expected unknown to be 'reject' or None, got 'drop'"):
        check_unknown("drop", 0.9)
    for keep in (0, 1.0, float("nan"), "much"):
        with pytest.raises(IosrFastError, match="expected keep above 0 and below 1"):
            check_unknown("reject", keep)  # type: ignore[arg-type]
