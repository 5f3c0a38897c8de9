"""Compiled plans against float64 transcriptions of the papers' formulas, which share nothing with the methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods import METHODS
from iosr_fast.methods.config import Config
from iosr_fast.methods.support_set import SupportSet, make_support_set
from iosr_fast.scoring.score import score

N_QUERIES, WIDTH = 23, 24
# Parameters at which each term counts.
STACK = {"text": 0.7, "discriminant": 0.4, "regression": 3.0, "text_regression": 8.0, "beta": 1.7, "ridge": 0.2}
PARAMETERS: dict[str, dict[str, float]] = {
    "zero-shot": {},
    "tip-adapter": {"alpha": 2.5, "beta": 7.0},
    "tip-x": {"alpha": 2.0, "beta": 5.5, "gamma": 1.5},
    "ape": {"alpha": 3.0, "beta": 4.0, "gamma": 0.4},
    "timo": {"alpha": 0.05, "gamma": 2.5},
    "gda": {"alpha": 0.05, "gamma": 0.0},
    "proker": {"alpha": 0.7, "beta": 1.3, "ridge": 0.2},
    "stack": {**STACK, "text_images": 2.5},
    "stack++": {**STACK, "text_images": 1.5, "discriminant_adapted": 0.9, "adapted_keys": 1.0},
}
COUNTS = {"balanced": [4] * 5, "ragged": [3, 1, 5, 2, 2, 7], "one-shot": [1] * 6, "single": [0, 1, 0]}
Rows = np.ndarray
Values = Mapping[str, float]


def unit(rows: Rows) -> Rows:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def problem(rng: np.random.Generator, counts: list[int], text: bool = True) -> tuple[SupportSet, Embeddings]:
    """Embeddings like a CLIP's: classes lie close together, images all far from texts."""
    n, classes = sum(counts), len(counts)
    labels = np.append(np.repeat(np.arange(classes), counts), rng.integers(0, classes, N_QUERIES))
    centres, image_gap, text_gap = rng.standard_normal((classes, WIDTH)), *(2 * rng.standard_normal((2, WIDTH)))
    plain, adapted = (unit(image_gap + centres[labels] + rng.standard_normal((len(labels), WIDTH))) for _ in range(2))
    images = Embeddings(plain.astype(np.float32), adapted.astype(np.float32))
    texts = unit(text_gap + centres + 0.5 * rng.standard_normal((classes, WIDTH))) if text else None
    return make_support_set(images[:n], labels[:n], texts, 100.0, classes), images[n:]


def pca(keys: Rows) -> Callable[[Rows], Rows]:
    """The reducer's formula, fitted on keys (float64)."""
    mean = keys.mean(0)
    vectors = np.linalg.eigh((keys - mean).T @ (keys - mean))[1][:, -max(1, round(0.5 * min(keys.shape))) :]
    return lambda rows: unit((rows - mean) @ vectors @ vectors.T)


class Formulas:
    """The formula of each method; `keys` and `query` are compared, float64, moved by the reducer."""

    def __init__(self, support: SupportSet, queries: Embeddings, which: str, reducer: str) -> None:
        self.support, self.queries, self.labels, self.classes = support, queries, support.labels, support.n_classes
        self.plain, self.asked = (e.plain.astype(np.float64) for e in (support.embeddings, queries))
        keys, query = (getattr(e, which).astype(np.float64) for e in (support.embeddings, queries))
        move = pca(keys) if reducer == "pca" else np.asarray
        self.keys, self.query = move(keys), move(query)
        self.text = np.zeros((self.classes, WIDTH)) if support.text is None else support.text.astype(np.float64)
        self.moved_text = self.text if support.text is None else move(self.text)
        sizes = np.bincount(self.labels, minlength=self.classes)
        # 1 for classes of one size, as in the papers; otherwise a class counts as one of mean size.
        self.weights = sizes[sizes > 0].mean() / sizes[self.labels]
        self.one_hot = np.eye(self.classes)[self.labels]
        self.values = self.weights[:, None] * self.one_hot
        self.zero_shot = support.tau * self.asked @ self.text.T

    def tip_adapter(self, p: Values) -> Rows:
        """Zhang et al., ECCV 2022, equations 4 to 6."""
        return self.zero_shot + p["alpha"] * np.exp(-p["beta"] * (1 - self.query @ self.keys.T)) @ self.values

    def tip_x(self, p: Values) -> Rows:
        """Udandarao et al., ICCV 2023, equations 5 to 7: every divergence, scaled to the range of cosines; both ranges
        are those over pairs of support images, and a single image is not scaled."""
        own, asked = (shares(plain @ self.text.T / 0.5) for plain in (self.plain, self.asked))
        scaled, pairs = divergences(asked, own), ~np.eye(len(own), dtype=bool)
        if len(own) > 1:
            among, cosines = divergences(own, own)[pairs], (self.keys @ self.keys.T)[pairs]
            scaled = (scaled - among.min()) / np.ptp(among) * np.ptp(cosines) + cosines.min()
        return self.tip_adapter(p) - p["gamma"] * scaled @ self.values

    def ape(self, p: Values) -> Rows:
        """Zhu et al., ICCV 2023, equations 6 to 12, with the public code's 1e-6 and binary logarithm."""
        samples = [[self.text[c], *self.keys[self.labels == c]] for c in range(self.classes)]
        products = [
            one * other
            for i, ours in enumerate(samples)
            for j, theirs in enumerate(samples)
            for one in ours
            for other in theirs
            if i != j
        ]
        criterion = 0.3 * self.text.var(0, ddof=1) - 0.7 * np.mean(products, axis=0)
        chosen = np.argsort(-criterion)[: round(0.75 * WIDTH)]
        near, asked, text, plain = (unit(rows[:, chosen]) for rows in (self.keys, self.query, self.text, self.plain))
        kl = (self.one_hot * np.log2((self.one_hot + 1e-6) / (shares(plain @ text.T) + 1e-6))).sum(1)
        affinity = np.exp(-p["beta"] * (1 - asked @ near.T))
        return self.zero_shot + p["alpha"] * (affinity * np.exp(p["gamma"] * kl)) @ self.values

    def gda(self, p: Values) -> Rows:
        """Wang et al., ICLR 2024; TIMO (Li et al., AAAI 2025) with one text a class, `gamma` times among its images."""
        return self.zero_shot + p["alpha"] * self.discriminant(self.keys, self.query, self.moved_text, p["gamma"])

    timo = gda

    def discriminant(self, keys: Rows, query: Rows, text: Rows, copies: float, paper: bool = True) -> Rows:
        """GDA's equations 4 to 8, with `copies` of the matched text among a class's images, and without the noise that
        means of few images have beyond that of a largest class. The paper's precision is D / (n - 1) times
        inv(Sigma + tr(Sigma) / (n - 1) I)."""
        own, classes = [keys[self.labels == c] for c in range(self.classes)], range(self.classes)
        matched = [text[c] * (unit(own[c].sum(0)) @ text[c]) for c in classes]
        sizes = np.array([len(rows) for rows in own]) + copies
        means = np.array([(own[c].sum(0) + copies * matched[c]) / sizes[c] for c in classes])
        n, width, covariance = sizes.sum(), keys.shape[1], np.zeros((keys.shape[1],) * 2)
        for c in classes:
            for weight, row in [(copies, matched[c]), *((1.0, row) for row in own[c])]:
                covariance += weight * np.outer(row - means[c], row - means[c]) / (n - 1)
        precision, around = np.eye(width), np.concatenate([rows - rows.mean(0) for rows in own])
        if np.trace(covariance) > 1e-9:
            precision = np.linalg.inv(covariance + np.trace(covariance) / (n - 1) * np.eye(width))
            precision *= width / (n - 1) if paper else 1.0
        noise = np.trace(around @ precision @ around.T) / max(1, len(keys) - self.classes)
        noises = noise * (sizes - copies) / sizes**2
        lengths = np.diag(means @ precision @ means.T) - (noises - noises[sizes.argmax()])
        return query @ precision @ means.T - lengths / 2

    def proker(self, p: Values) -> Rows:
        """Bendou et al., CVPR 2025, section 4."""
        target = self.one_hot - self.plain @ self.text.T
        return self.zero_shot + p["alpha"] * self.support.tau * self.regression(target, p)

    def regression(self, target: Rows, p: Values) -> Rows:
        """Kernel ridge regression; an image of a larger class has a larger ridge."""
        kernel, across = (np.exp(-p["beta"] * (1 - rows @ self.keys.T)) for rows in (self.keys, self.query))
        return across @ np.linalg.solve(kernel + np.diag(p["ridge"] / self.weights), target)

    def stack(self, p: Values) -> Rows:
        """The formula of papers.stack_models; the keys are the adapted embeddings of "stack++"."""
        target = p["regression"] * self.one_hot - p["text_regression"] * self.plain @ self.text.T
        logits = p["text"] * self.zero_shot + self.regression(target, p)
        copies = p["text_images"] if self.support.text is not None else 0.0
        for name, which in (("discriminant", "plain"), ("discriminant_adapted", "adapted")):
            keys, query = (getattr(e, which).astype(np.float64) for e in (self.support.embeddings, self.queries))
            logits += p.get(name, 0.0) * self.discriminant(keys, query, self.text, copies, paper=False)
        return logits


def shares(logits: Rows) -> Rows:
    powers = np.exp(logits)
    return powers / powers.sum(1, keepdims=True)


def divergences(p: Rows, q: Rows) -> Rows:
    """KL(p[b] || q[j])."""
    return np.array([[(a * np.log(a / b)).sum() for b in q] for a in p])


def assert_parity(name: str, support: SupportSet, queries: Embeddings, reducer: str = "none") -> None:
    base, formulas = name.removesuffix("++"), Formulas(support, queries, METHODS[name].which, reducer)
    parameters, expected = PARAMETERS.get(name, PARAMETERS[base]), formulas.zero_shot
    if METHODS[name].needs_support:
        expected = getattr(formulas, base.replace("-", "_"))(parameters)
        assert np.abs(expected - formulas.zero_shot).max() > 1e-2
    given = {key: value for key, value in parameters.items() if key in METHODS[name].parameters}
    config = Config(method=name, parameters=given, reducer=reducer)
    plan = config.compile(support)
    fitted = config.fit_reducer(support)
    terms = METHODS[name].terms(support, fitted, {**METHODS[name].parameters, **given})
    models = np.sum([weight * model.scores(queries) for weight, model in terms], axis=0)
    for logits in (score(plan, queries), score(plan, queries, "reference"), models):
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        np.testing.assert_array_equal(logits.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("name", METHODS)
def test_the_plan_is_the_formula(name: str, counts: str, rng: np.random.Generator) -> None:
    if counts != "single" or name.startswith(("tip", "zero-shot")):
        assert_parity(name, *problem(rng, COUNTS[counts]))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.takes_reducer])
def test_the_plan_is_the_formula_after_a_reducer(name: str, rng: np.random.Generator) -> None:
    assert_parity(name, *problem(rng, [3, 1, 4, 2]), "pca")


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.needs_text])
def test_the_plan_is_the_formula_without_texts(name: str, rng: np.random.Generator) -> None:
    assert_parity(name, *problem(rng, [3, 1, 4, 2], text=False))
