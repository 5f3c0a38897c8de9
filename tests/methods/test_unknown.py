"""Unknown pictures: the scores in float64, the promise on synthetic clusters, and support sets that are too small."""

from __future__ import annotations

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods import known_scores
from iosr_fast.methods.conformal import images_needed, leave_out, threshold
from iosr_fast.methods.known_scores import BETA, GAUSSIAN_SCORES, RIDGE, KnownScores, score_names
from iosr_fast.methods.support_set import SupportSet, make_support_set
from iosr_fast.methods.unknown import KEEP, check_unknown, fit_unknown, without_rejected
from iosr_fast.utils.ranking import auroc

CLASSES, WIDTH = 16, 24
CENTRES = np.random.default_rng(5).standard_normal((2 * CLASSES, WIDTH))


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def images_of(labels: np.ndarray, seed: int, adapted: bool = False, spread: float = 1.0) -> Embeddings:
    """Images about a centre a class, those of CLASSES to 2 CLASSES - 1 for unknown ones."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((2, len(labels), WIDTH)) * np.linspace(0.2, spread, WIDTH)
    rows = [unit(CENTRES[labels] + part) for part in noise]
    return Embeddings(rows[0], rows[1] if adapted else None)


def support_of(shots: int, classes: int = CLASSES, text: bool = True, adapted: bool = False) -> SupportSet:
    labels = np.repeat(np.arange(classes), shots)
    texts = unit(CENTRES[:classes] + 0.3) if text else None
    return make_support_set(images_of(labels, 1, adapted), labels, texts, 20.0, classes)


def log_odds_of_softmax(values: list[float]) -> float:
    powers = np.exp(np.array(values) - max(values))
    top = int(np.argmax(values))
    return float(np.log(powers[top] / np.delete(powers, top).sum()))


def scores_in_float64(support: SupportSet, x: np.ndarray, which: str) -> dict[str, float]:
    """Of one query x (D,), term by term."""
    keys = getattr(support.embeddings, which).astype(np.float64)
    y, n, x = support.labels, len(keys), x.astype(np.float64)
    classes = [c for c in range(support.n_classes) if (y == c).any()]
    means = {c: keys[y == c].mean(0) for c in classes}
    middle = keys.mean(0)

    def inverse(centred: np.ndarray) -> np.ndarray:
        sigma = sum(np.outer(row, row) for row in centred) / (n - 1)
        if np.trace(sigma) < 1e-9:
            return np.eye(len(x))
        return np.linalg.inv(sigma + np.trace(sigma) / (n - 1) * np.eye(len(x)))

    p = inverse(np.array([keys[j] - means[y[j]] for j in range(n)]))
    p0 = inverse(keys - middle)
    g = [float(x @ p @ means[c] - means[c] @ p @ means[c] / 2) for c in classes]
    distance = min(float((x - means[c]) @ p @ (x - means[c])) for c in classes)
    kernel = np.array([[np.exp(-BETA * (1 - a @ b)) for b in keys] for a in keys])
    values = np.linalg.inv(kernel + RIDGE * np.eye(n)) @ (y[:, None] == np.array(classes)[None, :])
    r = sorted(np.array([np.exp(-BETA * (1 - x @ b)) for b in keys]) @ values)
    return {
        "discriminant": max(g),
        "discriminant softmax": log_odds_of_softmax(g),
        "centred discriminant": max(g) - float(x @ p @ middle - middle @ p @ middle / 2),
        "mahalanobis": -distance,
        "relative mahalanobis": -distance + float((x - middle) @ p0 @ (x - middle)),
        "nearest key": max(float(x @ b) for b in keys),
        "regression": r[-1],
        "regression margin": r[-1] - r[-2],
    }


def is_gaussian(name: str) -> bool:
    return name.removesuffix(", adapted") in GAUSSIAN_SCORES


@pytest.mark.parametrize(("shots", "empty"), [(3, False), (1, False), (2, True), (3, True)])
def test_scores_are_their_formulas(shots: int, empty: bool) -> None:
    support = support_of(shots, adapted=True)
    if empty:
        support = support.only(support.labels != 4)
    queries = images_of(np.arange(0, 2 * CLASSES, 5), 2, adapted=True)
    scores = KnownScores(support, score_names(support, True))
    columns = dict(zip(scores.names, scores(queries).T, strict=True))
    for b in range(len(queries)):
        cosines = queries.plain[b].astype(np.float64) @ support.text.T
        expected = {"text cosine": 20.0 * cosines.max(), "text softmax": log_odds_of_softmax((20.0 * cosines).tolist())}
        expected |= scores_in_float64(support, queries.plain[b], "plain")
        adapted = scores_in_float64(support, queries.adapted[b], "adapted")
        expected |= {f"{name}, adapted": value for name, value in adapted.items()}
        if shots < 3:  # no covariance without a fold
            expected = {name: value for name, value in expected.items() if not is_gaussian(name)}
        assert expected.keys() == columns.keys()
        for name, value in expected.items():
            assert columns[name][b] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(
    ("text", "adapted", "shots"), [(True, False, 4), (False, True, 8), (False, False, 5), (True, True, 2)]
)
def test_unknown_classes_are_told_apart_and_the_promise_holds(text: bool, adapted: bool, shots: int) -> None:
    support = support_of(shots, text=text, adapted=adapted)
    fitted = fit_unknown(support, adapted)
    labels = np.repeat(np.arange(2 * CLASSES), 60)
    values = fitted.score(images_of(labels, 3, adapted))
    known = labels < CLASSES
    combined = auroc(-values[known], -values[~known])
    assert combined > 0.9 and abs(fitted.auroc - combined) < 0.06
    singles = fitted.scorer(images_of(labels, 3, adapted)).T
    assert combined >= max(auroc(one[known], one[~known]) for one in singles) - 0.01
    assert (values[known] <= fitted.threshold(0.9)).mean() > 0.82
    assert (fitted.rejects(images_of(labels, 3, adapted), 0.9) == (values > fitted.threshold(0.9))).all()
    assert f"{fitted.auroc:.3f}" in fitted.promise()


def test_the_mean_kept_over_many_support_sets_is_the_promise() -> None:
    """Exchangeable images: a single support set scatters about the promise, many together don't."""
    kept = []
    for seed in range(16):
        labels = np.repeat(np.arange(CLASSES), 6)
        support = make_support_set(images_of(labels, 100 + seed), labels, None, 20.0, CLASSES)
        fitted = fit_unknown(support)
        kept.append((fitted.score(images_of(np.repeat(np.arange(CLASSES), 30), 7)) <= fitted.threshold(0.9)).mean())
    assert 0.885 < np.mean(kept) < 0.935, kept


def test_the_same_whatever_else_is_scored_and_every_time() -> None:
    support, queries = support_of(4), images_of(np.arange(2 * CLASSES), 3)
    first, second = fit_unknown(support), fit_unknown(support)
    assert (first.weights == second.weights).all() and (first.left_out == second.left_out).all()
    np.testing.assert_allclose(first.score(queries)[3:5], first.score(queries[3:5]), rtol=1e-9, atol=1e-9)
    assert first.score(queries[:0]).shape == (0,)


def test_left_out_images_have_mean_0_and_deviation_1() -> None:
    fitted = fit_unknown(support_of(4))
    assert len(fitted.left_out) == 4 * CLASSES
    assert fitted.left_out.mean() == pytest.approx(0, abs=1e-9) and fitted.left_out.std() == pytest.approx(1)


def test_single_views_are_left_out_where_keys_are_means_of_views() -> None:
    support = support_of(4)
    noisy = make_support_set(
        support.embeddings, support.labels, support.text, 20.0, queries=images_of(support.labels, 9, spread=3.0)
    )
    assert fit_unknown(noisy).threshold(0.95) > 0
    loose, tight = (fit_unknown(one).scorer(images_of(np.arange(8), 3)) for one in (noisy, support))
    np.testing.assert_array_equal(loose, tight)  # models are of the keys
    keys = leave_out(noisy, lambda others, rows: noisy.queries.plain[rows, :1].astype(float)).values
    assert sorted(keys[:, 0]) == sorted(noisy.queries.plain[:, :1].astype(float)[:, 0])


def test_real_unknown_pictures_sharpen() -> None:
    """Unknown pictures of a kind that no left-out class shows: they lie between two classes."""
    support = support_of(6, text=False)
    rng = np.random.default_rng(0)

    def between(n: int) -> Embeddings:
        one, other = rng.integers(0, CLASSES, (2, n))
        return Embeddings(unit(CENTRES[one] + CENTRES[other] + 0.3 * rng.standard_normal((n, WIDTH))))

    known, far = images_of(np.repeat(np.arange(CLASSES), 30), 3), between(400)
    alone, sharpened = (fit_unknown(support, unknown=extra) for extra in (None, between(200)))
    before, after = (auroc(-fitted.score(known), -fitted.score(far)) for fitted in (alone, sharpened))
    assert after > before + 0.01, (before, after)
    assert (fit_unknown(support, unknown=between(0)).weights == alone.weights).all()


def test_unknown_pictures_that_come_again_are_recognised() -> None:
    """A few unknown classes whose pictures come again; a picture alone, and none, change nothing."""
    support = support_of(6, text=False)
    strange = np.arange(CLASSES, CLASSES + 3)
    labels = np.repeat(np.arange(2 * CLASSES), 30)
    values = images_of(labels, 3)
    alone = fit_unknown(support)
    taught = fit_unknown(support, unknown=images_of(np.repeat(strange, 8), 4))
    known, again = labels < CLASSES, np.isin(labels, strange)
    before, after = (auroc(-fitted.score(values)[known], -fitted.score(values)[again]) for fitted in (alone, taught))
    assert after > before + 0.3 * (1.0 - before), (before, after)
    kept = (taught.score(values)[known] <= taught.threshold(0.9)).mean()
    assert abs(kept - 0.9) < 0.07, kept
    assert taught.names == (*alone.names, "nearest unknown key") and (taught.weights[-2:] > 0).all()
    assert (fit_unknown(support, unknown=images_of(strange[:1], 4)).weights == alone.weights).all()


def test_the_score_of_unknown_pictures_in_float64() -> None:
    support, pictures = support_of(4, adapted=True), images_of(np.arange(CLASSES, CLASSES + 5), 4, True)
    queries = images_of(np.arange(2 * CLASSES), 2, True)
    for which, adapted in (("plain", False), ("adapted", True)):
        names = score_names(support, adapted, pictures)
        column = KnownScores(support, names, pictures)(queries)[:, -1]
        rows, keys = (getattr(part, which).astype(np.float64) for part in (queries, pictures))
        expected = [-max(float(x @ key) for key in keys) for x in rows]
        assert names[-1] == "nearest unknown key" and column == pytest.approx(expected)


@pytest.mark.parametrize(("shots", "classes"), [(1, CLASSES), (4, 2), (1, 2)])
def test_one_score_stands_alone_where_nothing_can_be_learnt(shots: int, classes: int) -> None:
    fitted = fit_unknown(support_of(shots, classes=classes))
    assert np.flatnonzero(fitted.weights).tolist() == [fitted.names.index("regression")]
    labels = np.repeat([0, 1, CLASSES, CLASSES + 1], 40)
    values = fitted.score(images_of(labels, 3))
    assert auroc(-values[labels < CLASSES], -values[labels >= CLASSES]) > 0.8
    assert np.isnan(fitted.auroc)


def test_too_few_images_for_a_promise_are_told_with_the_number_that_is_needed() -> None:
    fitted = fit_unknown(support_of(4, classes=4))
    with pytest.raises(IosrFastError, match=r"0\.95 of the pictures needs at least 19 .* got 16: give more"):
        fitted.threshold(0.95)
    assert "16 left-out support images are too few" in fitted.promise()
    assert fitted.threshold(0.9) > 0 and "by 16 left-out" in fitted.promise(0.9)
    support = support_of(4)
    single = fit_unknown(support.only((support.labels > 1) | (np.arange(len(support.labels)) % 4 == 0)))
    assert "left-out support images (none of the 2 classes with one image" in single.promise(0.8)
    with pytest.raises(IosrFastError, match="got 0"):
        fit_unknown(support_of(1)).threshold()


def test_three_classes_are_enough_to_leave_one_out() -> None:
    fitted = fit_unknown(support_of(8, classes=3))
    assert np.count_nonzero(fitted.weights) == len(fitted.names)


def test_many_images_have_no_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_scores, "MAX_REGRESSION", 50)
    fitted = fit_unknown(support_of(4))
    assert "regression" not in fitted.names and "mahalanobis" in fitted.names
    assert fitted.score(images_of(np.arange(3), 3)).shape == (3,)


def test_copies_of_one_picture_give_finite_scores() -> None:
    labels = np.repeat(np.arange(5), 4)
    support = make_support_set(Embeddings(unit(CENTRES[labels])), labels, None, 20.0, 5)
    assert np.isfinite(fit_unknown(support).score(images_of(np.arange(2 * CLASSES), 3))).all()


def test_scores_are_extrapolated_as_if_linear_in_one_over_n() -> None:
    """Scores 10 - 6 / n of n images a class: left out at 3 of 4, they are extrapolated to 4."""
    support = support_of(4)
    left = leave_out(support, lambda others, rows: np.full((len(rows), 1), 10 - 6 / others.counts.mean()))
    assert left.values == pytest.approx(8.0) and left.extrapolated == pytest.approx(8.5)
    few = leave_out(support_of(2), lambda others, rows: np.ones((len(rows), 2)))
    assert few.values.shape == (2 * CLASSES, 2) and (few.drift == 0).all()


def test_one_class_of_near_duplicates_gives_no_drift_by_one_pair_of_images() -> None:
    """At 3 images a class all others have one image left without two folds: the covariance of one pair says nothing."""
    support = support_of(3)
    rows = support.embeddings.plain.copy()
    rows[1] = unit(rows[:1] + 1e-4)[0]
    twice = make_support_set(Embeddings(rows), support.labels, support.text, 20.0, CLASSES)
    known = fit_unknown(twice)
    assert leave_out(twice, lambda others, rows: np.full((len(rows), 1), others.counts.mean())).drift == 0.0
    kept = known.score(images_of(np.repeat(np.arange(CLASSES), 20), 3)) <= known.threshold(0.7)
    assert 0.4 < kept.mean() < 0.9


def test_leave_out_never_takes_the_only_image_of_a_class_and_stops_at_enough() -> None:
    labels = np.array([0, 1, 1, 2, 2, 2])
    support = make_support_set(images_of(labels, 1), labels, None, 20.0, 3)
    seen = []

    def score(others: SupportSet, rows: np.ndarray) -> np.ndarray:
        assert others.counts.all()
        seen.append(len(others.embeddings))
        return np.zeros((len(rows), 1))

    assert sorted(leave_out(support, score).rows) == [1, 2, 3, 4, 5]
    assert len(leave_out(support_of(8), lambda others, rows: np.zeros((len(rows), 1)), most=20).rows) == 2 * CLASSES


@pytest.mark.parametrize("share", [0.5, 0.8, 0.9, 0.95, 0.99])
def test_threshold_is_the_largest_that_keeps_the_share(share: float) -> None:
    n = images_needed(share)
    assert threshold(np.arange(n, 0.0, -1), share) == 1.0
    with pytest.raises(IosrFastError, match=f"at least {n} "):
        threshold(np.arange(n - 1.0), share)
    draws = np.random.default_rng(0).standard_normal((4000, n + 1))
    kept = np.mean([draw[0] >= threshold(draw[1:], share) for draw in draws])
    assert kept == pytest.approx(share, abs=0.025)  # n / (n + 1) is the share itself
    assert threshold(np.arange(5.0), 1e-12) == 4.0


def test_words_for_rejected_pictures() -> None:
    rejected = np.array([True, False])
    assert without_rejected(np.array(["a", "bb"]), rejected, "unknown").tolist() == ["unknown", "bb"]
    assert without_rejected(np.array(["a", "bb"]), rejected, None).tolist() == [None, "bb"]
    assert without_rejected(np.array([4, 7]), rejected, "unknown").tolist() == ["unknown", 7]
    assert check_unknown(None, KEEP) is None and check_unknown("reject", 0.9) == 0.9
    with pytest.raises(IosrFastError, match=r"expected keep only with unknown='reject', got 0\.9 without it"):
        check_unknown(None, 0.9)
    with pytest.raises(IosrFastError, match="expected unknown to be 'reject' or None, got 'drop'"):
        check_unknown("drop", 0.9)
    for keep in (0, 1.0, float("nan"), "much"):
        with pytest.raises(IosrFastError, match="expected keep above 0 and below 1"):
            check_unknown("reject", keep)  # type: ignore[arg-type]


def test_texts_alone_are_scored_where_fewer_than_two_classes_have_an_image() -> None:
    support = support_of(3)
    queries = images_of(np.arange(2 * CLASSES), 2)
    odds = KnownScores(support, score_names(support, False))(queries)[:, 1]
    for kept in (np.zeros(len(support.labels), bool), support.labels == 0):
        fitted = fit_unknown(support.only(kept))
        assert fitted.names == ("text cosine", "text softmax")
        assert np.corrcoef(fitted.score(queries), -odds)[0, 1] == pytest.approx(1.0)
        assert "too few to promise" in fitted.promise()
