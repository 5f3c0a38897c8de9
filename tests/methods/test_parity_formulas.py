"""Compiled plans against float64 transcriptions of the papers' formulas, written as loops over images and classes.

The transcriptions share nothing with the methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods import METHODS, compile_method
from iosr_fast.methods.models import keys as key_models
from iosr_fast.methods.models.keys import choose_channels
from iosr_fast.methods.support_set import SupportSet, make_support_set
from iosr_fast.scoring.score import score
from tests.conftest import random_embeddings, unit_rows

N_QUERIES, WIDTH = 23, 24
# Parameters at which each term counts.
STACK = {"text": 0.7, "discriminant": 0.4, "regression": 3.0, "text_regression": 8.0, "beta": 1.7, "ridge": 0.2}
PARAMETERS: dict[str, dict[str, float]] = {
    "zero-shot": {},
    "tip-adapter": {"alpha": 2.5, "beta": 7.0},
    "tip-x": {"alpha": 2.0, "beta": 5.5, "gamma": 1.5},
    "ape": {"alpha": 3.0, "beta": 4.0, "gamma": 0.4},
    "timo": {"alpha": 0.05, "gamma": 2.5},
    "gda": {"alpha": 0.05},
    "proker": {"alpha": 0.7, "beta": 1.3, "ridge": 0.2},
    "stack": {**STACK, "text_images": 2.5},
    "stack++": {**STACK, "text_images": 1.5, "discriminant_adapted": 0.9, "adapted_keys": 1.0},
}
COUNTS = {"balanced": [4] * 5, "ragged": [3, 1, 5, 2, 2, 7], "one-shot": [1] * 6}
Rows = np.ndarray
Values = Mapping[str, float]


def unit(rows: Rows) -> Rows:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def problem(rng: np.random.Generator, counts: list[int], text: bool = True) -> tuple[SupportSet, Embeddings]:
    """Embeddings like a CLIP's: classes lie close together, images all far from texts."""
    classes, labels = len(counts), np.repeat(np.arange(len(counts)), counts)
    labels = np.append(labels, rng.integers(0, classes, N_QUERIES))
    centres, image_gap, text_gap = rng.standard_normal((classes, WIDTH)), *(2 * rng.standard_normal((2, WIDTH)))
    plain, adapted = (unit(image_gap + centres[labels] + rng.standard_normal((len(labels), WIDTH))) for _ in range(2))
    images = Embeddings(plain.astype(np.float32), adapted.astype(np.float32))
    texts = unit(text_gap + centres + 0.5 * rng.standard_normal((classes, WIDTH))) if text else None
    n = sum(counts)
    return make_support_set(images[:n], labels[:n], texts, 100.0, classes), images[n:]


def reduction(reducer: str, keys: Rows) -> Callable[[Rows], Rows]:
    """The reducer's formula, fitted on keys (float64)."""
    if reducer == "none":
        return lambda rows: rows
    mean, projection = keys.mean(0), np.eye(keys.shape[1])
    if reducer == "pca":
        rank = max(1, round(0.5 * min(keys.shape)))
        values, vectors = np.linalg.eigh((keys - mean).T @ (keys - mean))
        projection = vectors[:, np.argsort(-values)[:rank]] @ vectors[:, np.argsort(-values)[:rank]].T
    return lambda rows: unit((rows - mean) @ projection.T)


class Formulas:
    """The formula of each method; `keys` and `query` are compared, float64, moved by the reducer."""

    def __init__(self, support: SupportSet, queries: Embeddings, which: str, reducer: str = "none") -> None:
        self.support, self.queries, self.labels, self.classes = support, queries, support.labels, support.n_classes
        self.plain, self.asked = (e.plain.astype(np.float64) for e in (support.embeddings, queries))
        keys, query = (getattr(e, which).astype(np.float64) for e in (support.embeddings, queries))
        move = reduction(reducer, keys)
        self.keys, self.query = move(keys), move(query)
        self.text = np.zeros((self.classes, WIDTH)) if support.text is None else support.text.astype(np.float64)
        self.moved_text = move(self.text) if support.text is not None else self.text

    def zero_shot(self) -> Rows:
        return self.support.tau * self.asked @ self.text.T

    def weight(self, c: int) -> float:
        """1 for classes of one size, as in the papers; otherwise a class counts as one of mean size."""
        sizes = np.bincount(self.labels, minlength=self.classes)
        return float(sizes[sizes > 0].mean() / sizes[c])

    def tip_adapter(self, p: Values) -> Rows:
        """Zhang et al., ECCV 2022, equations 4 to 6."""
        logits = self.zero_shot()
        for b, x in enumerate(self.query):
            for key, c in zip(self.keys, self.labels, strict=True):
                logits[b, c] += self.weight(c) * p["alpha"] * np.exp(-p["beta"] * (1 - x @ key))
        return logits

    def tip_x(self, p: Values) -> Rows:
        """Udandarao et al., ICCV 2023, equations 5 to 7: every divergence one by one, scaled to the range of cosines;
        both ranges are those over pairs of support images."""
        own, asked = self.shares(self.plain), self.shares(self.asked)
        (least, most), (low, high) = pairs_of(own, divergence), pairs_of(self.keys, lambda a, b: float(a @ b))
        logits = self.tip_adapter(p)
        for b, s in enumerate(asked):
            for other, c in zip(own, self.labels, strict=True):
                scaled = (divergence(s, other) - least) / (most - least) * (high - low) + low
                logits[b, c] -= self.weight(c) * p["gamma"] * scaled
        return logits

    def shares(self, plain: Rows) -> Rows:
        powers = np.exp(plain @ self.text.T / 0.5)
        return powers / powers.sum(1, keepdims=True)

    def ape(self, p: Values) -> Rows:
        """Zhu et al., ICCV 2023, equations 6 to 12, with the public code's 1e-6 and binary logarithm."""
        chosen = public_channels(self.support, self.keys, 0.7, round(0.75 * WIDTH))
        near, asked, text, plain = (unit(rows[:, chosen]) for rows in (self.keys, self.query, self.text, self.plain))
        powers = np.exp(plain @ text.T)
        logits = self.zero_shot()
        for b, x in enumerate(asked):
            for j, c in enumerate(self.labels):
                guess = powers[j] / powers[j].sum()
                kl = sum(
                    y * np.log2((y + 1e-6) / (q + 1e-6)) for y, q in zip(np.eye(self.classes)[c], guess, strict=True)
                )
                affinity = np.exp(-p["beta"] * (1 - x @ near[j]))
                logits[b, c] += self.weight(c) * p["alpha"] * np.exp(p["gamma"] * kl) * affinity
        return logits

    def gda(self, p: Values) -> Rows:
        return self.zero_shot() + p["alpha"] * self.discriminant(self.keys, self.query, self.moved_text, 0.0)

    def timo(self, p: Values) -> Rows:
        """Li et al., AAAI 2025, with one text a class, `gamma` times among its images."""
        return self.zero_shot() + p["alpha"] * self.discriminant(self.keys, self.query, self.moved_text, p["gamma"])

    def discriminant(self, keys: Rows, query: Rows, text: Rows, copies: float, paper: bool = True) -> Rows:
        """Wang et al., ICLR 2024, equations 4 to 8, with `copies` of the matched text among a class's images, and
        without the noise that means of few images have beyond that of a largest class. The paper's precision is
        D / (n - 1) times inv(Sigma + tr(Sigma) / (n - 1) I)."""
        classes, own = range(self.classes), [keys[self.labels == c] for c in range(self.classes)]
        matched = [text[c] * (unit(own[c].sum(0)) @ text[c]) for c in classes]
        sizes = np.array([len(rows) + copies for rows in own])
        means = [(own[c].sum(0) + copies * matched[c]) / sizes[c] for c in classes]
        n, width, covariance = sizes.sum(), keys.shape[1], np.zeros((keys.shape[1],) * 2)
        for c in classes:
            for weight, row in [(copies, matched[c]), *((1.0, row) for row in own[c])]:
                covariance += weight * np.outer(row - means[c], row - means[c]) / (n - 1)
        precision = np.eye(width)
        if np.trace(covariance) > 1e-9:
            scale = width / (n - 1) if paper else 1.0
            precision = scale * np.linalg.inv(covariance + np.trace(covariance) / (n - 1) * np.eye(width))
        noise = sum((x - rows.mean(0)) @ precision @ (x - rows.mean(0)) for rows in own for x in rows)
        noise /= max(1, len(keys) - self.classes)
        largest = max(map(len, own))
        lengths = [
            m @ precision @ m - noise * (len(rows) / size**2 - largest / (largest + copies) ** 2)
            for m, rows, size in zip(means, own, sizes, strict=True)
        ]
        return np.array([[x @ precision @ m - s / 2 for m, s in zip(means, lengths, strict=True)] for x in query])

    def proker(self, p: Values) -> Rows:
        """Bendou et al., CVPR 2025, section 4."""
        target = np.eye(self.classes)[self.labels] - self.plain @ self.text.T
        return self.zero_shot() + p["alpha"] * self.support.tau * self.regression(target, p)

    def regression(self, target: Rows, p: Values) -> Rows:
        """Kernel ridge regression; an image of a larger class has a larger ridge."""
        kernel = np.array([[np.exp(-p["beta"] * (1 - a @ b)) for b in self.keys] for a in self.keys])
        ridge = [p["ridge"] / self.weight(c) for c in self.labels]
        values = np.linalg.solve(kernel + np.diag(ridge), target)
        return np.array([[np.exp(-p["beta"] * (1 - x @ key)) for key in self.keys] for x in self.query]) @ values

    def stack(self, p: Values) -> Rows:
        """The formula of methods.stack; the keys are the adapted embeddings of "stack++"."""
        target = p["regression"] * np.eye(self.classes)[self.labels] - p["text_regression"] * self.plain @ self.text.T
        copies = p["text_images"] if self.support.text is not None else 0.0
        logits = p["text"] * self.zero_shot() + self.regression(target, p)
        for name, which in (("discriminant", "plain"), ("discriminant_adapted", "adapted")):
            keys, query = (getattr(e, which).astype(np.float64) for e in (self.support.embeddings, self.queries))
            logits += p.get(name, 0.0) * self.discriminant(keys, query, self.text, copies, paper=False)
        return logits


def divergence(p: Rows, q: Rows) -> float:
    """KL(p || q)."""
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))


def pairs_of(rows: Rows, value: Callable[[Rows, Rows], float]) -> tuple[float, float]:
    """Least and largest value of two different images."""
    found = [value(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
    return min(found), max(found)


def public_channels(support: SupportSet, rows: Rows, weight: float, number: int) -> np.ndarray:
    """APE's channels by the public code's loops over all classes and their samples."""
    assert support.text is not None
    text = support.text.astype(np.float64)
    samples = [[text[c], *rows[support.labels == c].astype(np.float64)] for c in range(len(text))]
    products = [
        one * other
        for i, ours in enumerate(samples)
        for j, theirs in enumerate(samples)
        for one in ours
        for other in theirs
        if i != j
    ]
    criterion = -weight * np.mean(products, axis=0) + (1 - weight) * text.var(0, ddof=1)
    return np.sort(np.argsort(-criterion)[:number])


def assert_parity(name: str, support: SupportSet, queries: Embeddings, reducer: str = "none") -> None:
    base = name.removesuffix("++")
    parameters, formulas = (
        PARAMETERS.get(name, PARAMETERS[base]),
        Formulas(support, queries, METHODS[name].which, reducer),
    )
    expected = formulas.zero_shot()
    if base != "zero-shot":
        expected = getattr(formulas, base.replace("-", "_"))(parameters)
        assert np.abs(expected - formulas.zero_shot()).max() > 1e-2
    plan = compile_method(name, support, reducer=reducer, **parameters)
    for impl in ("reference", None):
        logits = score(plan, queries) if impl is None else score(plan, queries, impl)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=str(impl))
        np.testing.assert_array_equal(logits.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("name", METHODS)
def test_the_plan_is_the_formula(name: str, counts: str, rng: np.random.Generator) -> None:
    assert_parity(name, *problem(rng, COUNTS[counts]))


@pytest.mark.parametrize("reducer", ["centre", "pca"])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.takes_reducer])
def test_the_plan_is_the_formula_after_a_reducer(name: str, reducer: str, rng: np.random.Generator) -> None:
    assert_parity(name, *problem(rng, [3, 1, 4, 2]), reducer)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.needs_text])
def test_the_plan_is_the_formula_without_texts(name: str, rng: np.random.Generator) -> None:
    assert_parity(name, *problem(rng, [3, 1, 4, 2], text=False))


def test_tip_x_of_a_single_image_is_unscaled(rng: np.random.Generator) -> None:
    support = make_support_set(random_embeddings(rng, 1, WIDTH), np.array([1]), unit_rows(rng, 3, WIDTH), 40.0)
    queries = random_embeddings(rng, N_QUERIES, WIDTH)
    formulas = Formulas(support, queries, "plain")
    expected, (own,) = formulas.zero_shot(), formulas.shares(formulas.plain)
    expected[:, 1] -= 2.0 * np.array([divergence(s, own) for s in formulas.shares(formulas.asked)])
    logits = score(compile_method("tip-x", support, alpha=0.0, gamma=2.0), queries)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("weight", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("counts", [[3] * 5, [1] * 9, [2, 0, 4, 1]], ids=str)
def test_ape_chooses_the_channels_of_the_public_loops(
    counts: list[int], weight: float, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    support, _ = problem(rng, counts)
    monkeypatch.setattr(key_models, "SIMILARITY_WEIGHT", weight)
    rows = support.embeddings.adapted
    for number in (1, 7, 18, 24):
        chosen = np.flatnonzero(choose_channels(rows, support.one_hot, support.text, number / WIDTH))
        np.testing.assert_array_equal(chosen, public_channels(support, rows, weight, number))
