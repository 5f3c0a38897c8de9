"""The stack: its formula, its parts on left-out images, its weights, and the choice of "auto"."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods import METHODS, compile_method
from iosr_fast.methods.kernel_ridge import KernelRidge
from iosr_fast.methods.log_loss import fit_weights
from iosr_fast.methods.stack import linear_discriminant
from iosr_fast.methods.stack_weights import Choice, _with_more_regression, affordable, better_alone, fit_stack
from iosr_fast.methods.support_set import SupportSet, make_support_set
from iosr_fast.methods.tune import tune
from iosr_fast.methods.tuning import stack_weights
from iosr_fast.methods.tuning.held_out import HeldOutSet
from iosr_fast.methods.tuning.stack_parts import HeldOutParts, Part, spread_of_others
from iosr_fast.scoring.score import score, score_with_path
from tests.conftest import random_embeddings, unit_rows

WEIGHTS = {
    "text": 0.7,
    "discriminant": 0.4,
    "regression": 3.0,
    "text_regression": 8.0,
    "beta": 1.7,
    "ridge": 0.2,
    "text_images": 2.5,
}
ADAPTED = {**WEIGHTS, "discriminant_adapted": 0.9, "adapted_keys": 1.0}


def clustered(
    rng: np.random.Generator, counts: list[int], width: int = 12, noise: float = 0.6, text: bool = True
) -> tuple[SupportSet, Embeddings, np.ndarray]:
    """Images around class centres, an adapted embedding with half of the noise, texts near the centres; and queries."""
    centres = rng.standard_normal((len(counts), width))

    def images(labels: np.ndarray) -> Embeddings:
        parts = (centres[labels] + scale * rng.standard_normal((len(labels), width)) for scale in (noise, noise / 2))
        return Embeddings(*(unit(rows) for rows in parts))

    labels, asked = np.repeat(np.arange(len(counts)), counts), rng.integers(0, len(counts), 60)
    texts = unit(centres + rng.standard_normal(centres.shape)) if text else None
    return make_support_set(images(labels), labels, texts, 30.0, len(counts)), images(asked), asked


def unit(rows: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return scaled.astype(np.float32)


def papers_discriminant(
    rows: np.ndarray, labels: np.ndarray, texts: np.ndarray, copies: float, queries: np.ndarray
) -> np.ndarray:
    """GDA (Wang et al., 2024) with the precision of one image: image by image, class by class; weighted texts are
    further images (TIMO). Without the noise of means that classes have beyond a largest one."""
    all_rows, all_labels, weights = rows, labels, np.ones(len(rows))
    if texts.any():
        means = np.array([rows[labels == c].mean(0) for c in range(len(texts))])
        directions = means / np.linalg.norm(means, axis=1, keepdims=True)
        instances = (directions * texts).sum(1, keepdims=True) * texts
        all_rows, all_labels = np.concatenate([rows, instances]), np.append(labels, np.arange(len(texts)))
        weights = np.append(weights, np.full(len(texts), copies))
    means = np.array(
        [np.average(all_rows[all_labels == c], axis=0, weights=weights[all_labels == c]) for c in range(len(texts))]
    )
    n, width, covariance = weights.sum(), rows.shape[1], np.zeros((rows.shape[1],) * 2)
    for row, label, weight in zip(all_rows, all_labels, weights, strict=True):
        covariance += weight * np.outer(row - means[label], row - means[label]) / (n - 1)
    precision = np.linalg.inv(covariance + np.trace(covariance) / (n - 1) * np.eye(width))
    counts = np.bincount(labels)
    around = rows - np.array([rows[labels == c].mean(0) for c in range(len(texts))])[labels]
    noise = np.einsum("nd,de,ne->", around, precision, around) / (len(rows) - len(texts))
    shares = counts / (counts + copies * texts.any()) ** 2
    excess = noise * (shares - shares[counts.argmax()])
    return np.array(
        [[q @ precision @ m - (m @ precision @ m - e) / 2 for m, e in zip(means, excess, strict=True)] for q in queries]
    )


def written_out(support: SupportSet, queries: Embeddings, p: dict[str, float]) -> np.ndarray:
    """The formula of methods.stack in float64."""
    plain, adapted, query, other = (
        part.astype(np.float64)
        for part in (support.embeddings.plain, support.embeddings.adapted, queries.plain, queries.adapted)
    )
    keys, asked = (adapted, other) if p.get("adapted_keys") else (plain, query)
    text = np.zeros((support.n_classes, plain.shape[1])) if support.text is None else support.text.astype(np.float64)
    kernel, across = (np.exp(-p["beta"] * (1 - rows @ keys.T)) for rows in (keys, asked))
    target = p["regression"] * np.eye(support.n_classes)[support.labels] - p["text_regression"] * plain @ text.T
    logits = p["text"] * support.tau * query @ text.T
    ridge = p["ridge"] * support.counts[support.labels] / support.counts[support.counts > 0].mean()
    logits += across @ np.linalg.inv(kernel + np.diag(ridge)) @ target
    logits += p["discriminant"] * papers_discriminant(plain, support.labels, text, p["text_images"], query)
    if p.get("discriminant_adapted"):
        logits += p["discriminant_adapted"] * papers_discriminant(
            adapted, support.labels, text, p["text_images"], other
        )
    return logits


@pytest.mark.parametrize("impl", ["reference", "numpy", "cpp"])
@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize(("method", "parameters"), [("stack", WEIGHTS), ("stack++", ADAPTED)])
def test_the_plan_is_the_formula(
    rng: np.random.Generator, method: str, parameters: dict[str, float], text: bool, impl: str
) -> None:
    support, queries, _ = clustered(rng, [3, 1, 5, 2, 2], width=7, text=text)
    logits, path = score_with_path(compile_method(method, support, **parameters), queries, impl)
    expected = written_out(support, queries, parameters)
    np.testing.assert_allclose(logits, expected, atol=2e-4 * np.abs(expected).max())
    assert path.startswith(impl)


def test_a_part_without_weight_is_not_in_the_plan(rng: np.random.Generator) -> None:
    support, _, _ = clustered(rng, [3, 3, 3])
    nothing = dict.fromkeys(("text", "discriminant", "discriminant_adapted", "regression", "text_regression"), 0.0)

    def terms(**weights: float) -> tuple[bool, bool, bool, bool]:
        plan = compile_method("stack++", support, **{**nothing, **weights})
        return plan.text is not None, plan.keys is not None, plan.linear is not None, plan.needs_adapted

    assert terms(text=1.0) == (True, False, False, False)
    assert terms(discriminant=1.0) == (False, False, True, False)
    assert terms(discriminant_adapted=1.0) == (False, False, True, True)
    assert terms(regression=1.0) == (False, True, False, True)
    assert terms(regression=1.0, adapted_keys=0.0, text=1.0) == (True, True, False, False)
    with pytest.raises(ValueError, match="at least one weight of the stack above 0"):
        compile_method("stack++", support, **nothing)
    assert (
        compile_method("stack++", support, **{**nothing, "discriminant": 1.0, "discriminant_adapted": 2.0}).feature
        == "both"
    )


def test_a_class_without_images_is_neutral(rng: np.random.Generator) -> None:
    support, queries, _ = clustered(rng, [3, 4, 2, 3])
    without = support.only(support.labels != 2)
    linear, bias = linear_discriminant(without.embeddings.plain, without)
    np.testing.assert_allclose(linear[2], linear[[0, 1, 3]].mean(0))
    assert bias[2] == pytest.approx(bias[[0, 1, 3]].mean())
    assert np.isfinite(score(compile_method("stack", without), queries)).all()


def test_more_images_than_the_regression_can_solve_are_refused(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    support, _, _ = clustered(rng, [3, 3, 3])
    monkeypatch.setattr("iosr_fast.methods.stack.MAX_KEYS", 8)
    with pytest.raises(ValueError, match="at most 8 support images, got 9; tune the classifier again"):
        compile_method("stack", support)
    assert compile_method("stack", support, regression=0.0, text_regression=0.0).keys is None


def test_regression_without_one_image_is_a_fit_without_it(rng: np.random.Generator) -> None:
    rows = unit_rows(rng, 17, 6).astype(np.float64)
    kernel, target = np.exp(rows @ rows.T - 1), rng.standard_normal((17, 3))
    model = KernelRidge(kernel, target, 0.1)
    np.testing.assert_allclose(model.without_one(), model.without_folds(np.arange(17)), atol=1e-9)


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("counts", [[4, 4, 4, 4], [7, 3, 1, 5]])
def test_parts_are_those_of_plans_without_the_fold(rng: np.random.Generator, counts: list[int], views: bool) -> None:
    support, _, _ = clustered(rng, counts)
    if views:
        support = replace(support, queries=random_embeddings(rng, sum(counts), 12))
    held_out = HeldOutSet.leave_one_out(METHODS["stack++"], None, support)
    parts, setting = HeldOutParts(held_out), {"beta": 1.3, "ridge": 0.2, "text_images": 1.5}
    labels, texts = parts.regressions("adapted", setting)
    found = {
        "text": parts.text,
        "discriminant": parts.discriminant("plain", 1.5),
        "discriminant_adapted": parts.discriminant("adapted", 1.5),
    }
    found |= {"regression": labels, "text_regression": texts}
    assert sum(counts) - len(parts.labels) == sum(count == 1 for count in counts)
    for name, part in found.items():
        weights = dict.fromkeys(found, 0.0) | {name: 1.0, **setting, "adapted_keys": 1.0}
        for rows, plan in held_out.plans(weights):
            place = [list(held_out.rows).index(row) for row in rows]
            expected = score(plan, held_out.queries[rows], "reference")
            np.testing.assert_allclose(part.logits[place], expected, atol=1e-3 * np.abs(expected).max(), err_msg=name)


def test_the_spread_ignores_the_own_class() -> None:
    logits = np.array([[50.0, 1.0, 3.0, 5.0], [2.0, -90.0, 2.0, 2.0]])
    assert spread_of_others(logits, np.array([0, 1])) == pytest.approx(np.std([1.0, 3.0, 5.0]) / 2)
    assert spread_of_others(np.ones((2, 3)), np.array([0, 1])) == 1.0
    assert spread_of_others(np.array([[1.0, 3.0]]), np.array([0])) == pytest.approx(1.0)


@pytest.mark.parametrize("prior", [None, np.array([0.5, 0.0, 2.0, 1.0])])
def test_weights_are_the_minimum_of_the_log_loss(rng: np.random.Generator, prior: np.ndarray | None) -> None:
    """The conditions of Karush, Kuhn and Tucker: no slope where a weight is above 0, an upward one where it is 0."""
    labels = rng.integers(0, 5, 300)
    parts = [rng.standard_normal((300, 5)) + k * np.eye(5)[labels] for k in (1.0, -1.0, 0.5, 2.0)]
    strength = 0.01 if prior is None else 5.0
    weights, loss = fit_weights(parts, labels, prior, strength)

    def slope(w: np.ndarray) -> np.ndarray:
        logits = sum(a * part for a, part in zip(w, parts, strict=True))
        shares = np.exp(logits - logits.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        shares[np.arange(300), labels] -= 1
        sums = np.array([(shares * part).sum() for part in parts]) / 300
        return sums + strength / 300 * (w - (0 if prior is None else prior))

    assert weights[1] == 0 and (weights[[0, 2, 3]] > 0).all()
    np.testing.assert_allclose(slope(weights)[weights > 0], 0, atol=1e-3)
    assert slope(weights)[1] > 0
    logits = sum(a * part for a, part in zip(weights, parts, strict=True))
    assert loss == pytest.approx(
        float((np.log(np.exp(logits).sum(1)) - logits[np.arange(300), labels]).mean()), rel=1e-4
    )


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("shots", [1, 2, 3, 6])
@pytest.mark.parametrize("method", ["stack", "stack++", "auto"])
def test_a_search_is_better_than_chance_at_every_number_of_shots(
    rng: np.random.Generator, method: str, shots: int, text: bool
) -> None:
    support, queries, labels = clustered(rng, [shots] * 8, text=text)
    tuned = tune(method, support)
    logits = score(tuned.compile(support), queries)
    assert (logits.argmax(1) == labels).mean() > 0.5
    assert tuned.protocol == ("one-shot" if shots == 1 else "loo") and tuned.scored == (0 if shots == 1 else 8 * shots)
    assert sum(tuned.shares.values()) == pytest.approx(1.0) and (tuned.shares["text"] == 0) == (not text)
    assert tuned.parameters == tune(method, support).parameters


@pytest.mark.parametrize("counts", [[1, 1], [2, 2], [5, 5], [9, 1], [1, 2], [3, 1, 1, 1]])
def test_few_classes_and_unequal_ones(rng: np.random.Generator, counts: list[int]) -> None:
    support, queries, labels = clustered(rng, counts)
    logits = score(tune("auto", support).compile(support), queries)
    assert np.isfinite(logits).all() and (logits.argmax(1) == labels).mean() > 0.5


def test_images_that_are_all_alike(rng: np.random.Generator) -> None:
    rows = np.repeat(unit_rows(rng, 1, 6), 12, axis=0)
    support = make_support_set(Embeddings(rows, rows), np.repeat([0, 1, 2], 4), unit_rows(rng, 3, 6), 30.0)
    for shots in (1, 2, 4):
        few = support.only(np.arange(12) % 4 < shots)
        assert np.isfinite(score(tune("auto", few).compile(few), few.embeddings)).all()


def test_adapted_embeddings_that_add_nothing_leave_the_plain_engine(rng: np.random.Generator) -> None:
    support, _, _ = clustered(rng, [6] * 6)
    useless = np.repeat(unit_rows(rng, 1, 12), 36, axis=0)
    support = replace(support, embeddings=Embeddings(support.embeddings.plain, useless))
    tuned = tune("auto", support)
    assert tuned.method == "stack" and "the plain engine does" in tuned.note and tuned.shares["adapter"] == 0
    assert not tuned.compile(support).needs_adapted


def test_a_validation_set_chooses_the_weights(rng: np.random.Generator) -> None:
    support, queries, labels = clustered(rng, [1] * 8)
    tuned = tune("stack++", support, queries, labels)
    assert tuned.protocol == "validation" and tuned.scored == 60
    right = score(tuned.compile(support), queries).argmax(1) == labels
    assert abs(right.mean() - tuned.accuracy) < 0.2


def test_the_regression_gets_more_weight_where_it_makes_more_images_right(rng: np.random.Generator) -> None:
    labels = rng.integers(0, 6, 400)
    noise = rng.standard_normal((3, 400, 6))
    right = Part(np.eye(6)[labels] + 0.3 * noise[0], 1.0, 1.0)
    parts = {"text": Part(0.5 * np.eye(6)[labels] + noise[1], 1.0, 1.0), "regression": right}
    everywhere = np.ones(400, bool)
    weak = Choice(parts, {"text": 1.0, "regression": 0.5}, {}, "plain", 2.0)
    better = _with_more_regression(weak, labels, everywhere)
    ratio = better.weights["regression"] / better.weights["text"]
    assert ratio == pytest.approx(0.625)
    assert (better.logits.argmax(1) == labels).sum() > (weak.logits.argmax(1) == labels).sum()
    assert better.losses(labels).mean() == pytest.approx(better.loss, rel=1e-3)
    fair = Choice(parts, {"text": 1.0, "regression": 50.0}, {}, "plain", 2.0)
    assert _with_more_regression(fair, labels, everywhere) is fair
    only = Choice({"text": parts["text"]}, {"text": 1.0}, {}, "plain", 2.0)
    assert _with_more_regression(only, labels, everywhere) is only


def test_the_budget_counts_operations_and_no_seconds(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    support, _, _ = clustered(rng, [5] * 6)
    assert len(affordable(support, 1, 20.0)) == len(stack_weights.SETTINGS)
    assert len(affordable(support, 1, 0.0)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(stack_weights, "MAX_KEYS", 29)
        assert len(affordable(support, 1, 1e6)) == 0
    enough = 2.0 * 30**3 + 12.0 * 30**2 * 6
    assert len(affordable(support, 1, 2.5 * enough / 1e10)) == 2
    tuned = tune("stack", support, seconds=0.0)
    assert tuned.parameters["regression"] == 0 and tuned.compile(support).keys is None and tuned.accuracy > 0.5
    one_shot = support.only(np.arange(30) % 5 == 0)
    assert tune("stack", one_shot, seconds=0.0).compile(one_shot).keys is None


def test_auto_takes_a_single_method_only_beyond_noise(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    support, _, _ = clustered(rng, [6] * 8)
    held_out = HeldOutSet.leave_one_out(METHODS["stack"], None, support)
    fit, labels = fit_stack(held_out, 20.0), held_out.labels[held_out.rows]
    assert better_alone(fit, labels) == []
    worse = replace(fit, right=np.zeros_like(fit.right))
    assert set(better_alone(worse, labels)) == {"gda", "proker"}
    monkeypatch.setattr("iosr_fast.methods.tune.fit_stack", lambda *_: worse)
    assert tune("auto", support).method in ("gda", "proker")


def test_a_stack_takes_no_reducer(rng: np.random.Generator) -> None:
    from iosr_fast.methods.tune import check_choice

    with pytest.raises(ValueError, match="stack takes no reducer, got 'centre'"):
        check_choice("stack", "centre", None)
