"""Methods against float64 transcriptions of their papers' formulas, written as loops over images and classes.

The transcriptions share nothing with the methods. docs/parity.md has the comparison with the public code itself.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods import METHODS, compile_method
from iosr_fast.methods.ape import choose_channels
from iosr_fast.methods.kernel_ridge import KernelRidge, lower_inverse
from iosr_fast.methods.support_set import SupportSet, make_support_set
from iosr_fast.scoring.score import score
from tests.conftest import random_embeddings, unit_rows
from tests.methods.tip_x_reference import tip_x_batch, tip_x_literal

IMPLS = ("reference", "numpy", "cpp")
TOLERANCE = 1e-5  # of the largest logit
N_QUERIES = 31
# Parameters at which each term counts.
PARAMETERS = {
    "tip-x": {"alpha": 2.0, "beta": 5.5, "gamma": 1.5},
    "ape": {"alpha": 3.0, "beta": 4.0, "gamma": 0.4},
    "timo": {"alpha": 0.05, "gamma": 2.0},
    "gda": {"alpha": 0.05},
    "proker": {"alpha": 0.7, "beta": 1.3, "ridge": 0.2},
}

Rows = np.ndarray


def unit(rows: Rows) -> Rows:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def clustered(rng: np.random.Generator, labels: np.ndarray, classes: int, width: int) -> tuple[Embeddings, Rows]:
    """Embeddings like a CLIP's, and texts: classes lie close together, images all far from texts."""
    centres, image_gap, text_gap = rng.standard_normal((classes, width)), *(2 * rng.standard_normal((2, width)))

    def near() -> Rows:
        return unit(image_gap + centres[labels] + rng.standard_normal((len(labels), width))).astype(np.float32)

    text = unit(text_gap + centres + 0.5 * rng.standard_normal((classes, width))).astype(np.float32)
    return Embeddings(near(), near()), text


def problem(kind: str, rng: np.random.Generator, counts: list[int], width: int = 24) -> tuple[SupportSet, Embeddings]:
    """A support set with counts[c] images of class c, and queries."""
    classes, own = len(counts), np.repeat(np.arange(len(counts)), counts)
    if kind == "random":
        images, text = random_embeddings(rng, len(own), width), unit_rows(rng, classes, width)
        return make_support_set(images, own, text, 40.0), random_embeddings(rng, N_QUERIES, width)
    labels = np.concatenate([own, rng.integers(0, classes, N_QUERIES)])
    images, text = clustered(rng, labels, classes, width)
    return make_support_set(images[: len(own)], own, text, 100.0), images[len(own) :]


def reduction(reducer: str, keys: Rows) -> Callable[[Rows], Rows]:
    """The reducer's formula, fitted on keys (float64)."""
    if reducer == "none":
        return lambda rows: rows
    mean = keys.mean(0)
    projection = np.eye(keys.shape[1])
    if reducer == "pca":
        rank = max(1, round(0.5 * min(keys.shape)))
        values, vectors = np.linalg.eigh((keys - mean).T @ (keys - mean))
        projection = vectors[:, np.argsort(-values)[:rank]] @ vectors[:, np.argsort(-values)[:rank]].T
    return lambda rows: unit((rows - mean) @ projection.T)


def moved(reducer: str, support: SupportSet, queries: Embeddings, which: str) -> tuple[Rows, Rows]:
    """Keys and queries (float64) that meet each other, after the reducer's formula."""
    keys, query = (getattr(e, which).astype(np.float64) for e in (support.embeddings, queries))
    move = reduction(reducer, keys)
    return move(keys), move(query)


def zero_shot(support: SupportSet, queries: Embeddings) -> Rows:
    return support.tau * queries.plain.astype(np.float64) @ support.text.T.astype(np.float64)


def share(plain: Rows, text: Rows) -> Rows:
    powers = np.exp(plain.astype(np.float64) @ text.T.astype(np.float64) / 0.5)
    return powers / powers.sum(1, keepdims=True)


def divergence(p: Rows, q: Rows) -> float:
    """KL(p || q)."""
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))


def pairs_of(rows: Rows, others: Rows, value: Callable[[Rows, Rows], float]) -> tuple[float, float]:
    """Least and largest value of two different images."""
    found = [value(rows[i], others[j]) for i in range(len(rows)) for j in range(len(rows)) if i != j]
    return min(found), max(found)


def weight(support: SupportSet, c: int) -> float:
    """1 for classes of one size, as in the papers; otherwise a class counts as one of mean size."""
    return float(np.mean(support.counts) / (support.labels == c).sum())


def tip_x(
    support: SupportSet, queries: Embeddings, keys: Rows, query: Rows, alpha: float, beta: float, gamma: float
) -> Rows:
    """Udandarao et al., ICCV 2023, equations 5 to 7, scaled to the ranges over pairs of support images."""
    own, asked = (share(e.plain, support.text) for e in (support.embeddings, queries))
    least, most = pairs_of(own, own, divergence)
    low, high = pairs_of(keys, keys, lambda a, b: float(a @ b))
    logits = zero_shot(support, queries)
    for b in range(len(query)):
        for j, c in enumerate(support.labels):
            scaled = (divergence(asked[b], own[j]) - least) / (most - least) * (high - low) + low
            logits[b, c] += weight(support, c) * alpha * np.exp(-beta * (1 - query[b] @ keys[j]))
            logits[b, c] += weight(support, c) * gamma * -scaled
    return logits


def public_channels(support: SupportSet, rows: Rows, weight: float, number: int) -> np.ndarray:
    """Channels by the public code's loops over all classes and their samples (Zhu et al., ICCV 2023, equation 6)."""
    text = support.text.astype(np.float64)
    samples = [[text[c], *rows[support.labels == c].astype(np.float64)] for c in range(len(text))]
    similarity, count = np.zeros(text.shape[1]), 0
    for i in range(len(text)):
        for j in range(len(text)):
            for one in samples[i]:
                for other in samples[j]:
                    if i != j:
                        similarity += one * other
                        count += 1
    criterion = -weight * similarity / count + (1 - weight) * text.var(0, ddof=1)
    return np.sort(np.argsort(-criterion)[:number])


def ape(
    support: SupportSet, queries: Embeddings, keys: Rows, query: Rows, alpha: float, beta: float, gamma: float
) -> Rows:
    """Zhu et al., ICCV 2023, equations 6 to 12, with the public code's 1e-6 and binary logarithm."""
    width = keys.shape[1]
    chosen = public_channels(support, keys, 0.7, round(0.75 * width))
    near, asked, text = (unit(rows.astype(np.float64)[:, chosen]) for rows in (keys, query, support.text))
    powers = np.exp(unit(support.embeddings.plain.astype(np.float64)[:, chosen]) @ text.T)
    logits = zero_shot(support, queries)
    for b in range(len(query)):
        for j, c in enumerate(support.labels):
            onehot, guess = np.eye(support.n_classes)[c], powers[j] / powers[j].sum()
            kl = sum(y * np.log2((y + 1e-6) / (p + 1e-6)) for y, p in zip(onehot, guess, strict=True))
            affinity = np.exp(-beta * (1 - asked[b] @ near[j]))
            logits[b, c] += weight(support, c) * alpha * np.exp(gamma * kl) * affinity
    return logits


def discriminant(keys: Rows, labels: np.ndarray, classes: int, copies: int = 0) -> Callable[[Rows], Rows]:
    """Wang et al., ICLR 2024, equations 4 to 8: x -> the score of each class; without the noise of means that classes
    have beyond a largest one. The first `copies` rows of each class have no noise."""
    n, width = keys.shape
    means = [sum(keys[labels == c]) / (labels == c).sum() for c in range(classes)]
    covariance = sum(np.outer(x - means[c], x - means[c]) for x, c in zip(keys, labels, strict=True)) / max(1, n - 1)
    singular = np.trace(covariance) <= 1e-12
    shrunk = np.eye(width) if singular else (n - 1) * covariance + np.trace(covariance) * np.eye(width)
    precision = np.eye(width) if singular else width * np.linalg.inv(shrunk)
    images = keys[copies * classes :], labels[copies * classes :]
    counts = [int((images[1] == c).sum()) for c in range(classes)]
    centres = [images[0][images[1] == c].mean(0) for c in range(classes)]
    noise = sum((x - centres[c]) @ precision @ (x - centres[c]) for x, c in zip(*images, strict=True))
    noise /= max(1, len(images[0]) - classes)
    lengths = [
        m @ precision @ m - noise * (n / (n + copies) ** 2 - max(counts) / (max(counts) + copies) ** 2)
        for m, n in zip(means, counts, strict=True)
    ]
    return lambda x: np.array(
        [x @ precision @ m + np.log(1 / classes) - s / 2 for m, s in zip(means, lengths, strict=True)]
    )


def gda(support: SupportSet, queries: Embeddings, keys: Rows, query: Rows, alpha: float) -> Rows:
    scores = discriminant(keys, support.labels, support.n_classes)
    return zero_shot(support, queries) + alpha * np.array([scores(x) for x in query])


def timo(
    support: SupportSet, queries: Embeddings, keys: Rows, query: Rows, alpha: float, gamma: float, text: Rows
) -> Rows:
    """Li et al., AAAI 2025, with one `text` a class: `gamma` (a whole number here) rows more in each class of GDA."""
    means = [unit(sum(keys[support.labels == c])) for c in range(support.n_classes)]
    instances = [text[c] * (means[c] @ text[c]) for c in range(support.n_classes) for _ in range(int(gamma))]
    labels = np.concatenate([np.repeat(np.arange(support.n_classes), int(gamma)), support.labels])
    scores = discriminant(np.concatenate([instances, keys]), labels, support.n_classes, int(gamma))
    return zero_shot(support, queries) + alpha * np.array([scores(x) for x in query])


def ridge_values(keys: Rows, residual: Rows, beta: float, ridge: Rows) -> Rows:
    kernel = np.array([[np.exp(-beta * (1 - a @ b)) for b in keys] for a in keys])
    return np.linalg.solve(kernel + np.diag(ridge), residual)


def proker(
    support: SupportSet, queries: Embeddings, keys: Rows, query: Rows, alpha: float, beta: float, ridge: float
) -> Rows:
    """Bendou et al., CVPR 2025, section 4; an image of a larger class has a larger ridge."""
    known = support.embeddings.plain.astype(np.float64) @ support.text.T.astype(np.float64)
    each = ridge * support.counts[support.labels] / support.counts[support.counts > 0].mean()
    values = ridge_values(keys, np.eye(support.n_classes)[support.labels] - known, beta, each)
    logits = zero_shot(support, queries)
    for b in range(len(query)):
        for j in range(len(keys)):
            logits[b] += support.tau * alpha * np.exp(-beta * (1 - query[b] @ keys[j])) * values[j]
    return logits


PAPERS: dict[str, Callable[..., Rows]] = {"tip-x": tip_x, "timo": timo, "ape": ape, "gda": gda, "proker": proker}
COUNTS = {"balanced": [4] * 6, "ragged": [3, 1, 5, 2, 2, 7], "one-shot": [1] * 6}


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("reducer", ["none", "centre", "pca"])
@pytest.mark.parametrize("kind", ["random", "clustered"])
@pytest.mark.parametrize("name", [name for name in METHODS if name.removesuffix("++") in PAPERS])
def test_logits_are_those_of_the_formula(
    name: str, kind: str, reducer: str, counts: str, rng: np.random.Generator
) -> None:
    support, queries = problem(kind, rng, COUNTS[counts])
    parameters = PARAMETERS[name.removesuffix("++")]
    keys, query = moved(reducer, support, queries, METHODS[name].which)
    as_image = {}
    if name.startswith("timo"):
        rows = getattr(support.embeddings, METHODS[name].which).astype(np.float64)
        as_image = {"text": reduction(reducer, rows)(support.text.astype(np.float64))}
    expected = PAPERS[name.removesuffix("++")](support, queries, keys, query, **parameters, **as_image)
    plan = compile_method(name, support, reducer=reducer, **parameters)
    assert np.abs(expected - zero_shot(support, queries)).max() > 1e-2
    for impl in IMPLS:
        logits = score(plan, queries, impl)
        error = np.abs(logits - expected).max() / np.abs(expected).max()
        assert error <= TOLERANCE, f"{impl}: {error:.2g}"
        np.testing.assert_array_equal(logits.argmax(1), expected.argmax(1), impl)


@pytest.mark.parametrize("which", ["plain", "adapted"])
@pytest.mark.parametrize("kind", ["random", "clustered"])
def test_tip_x_collapses_the_public_loops(kind: str, which: str, rng: np.random.Generator) -> None:
    support, queries = problem(kind, rng, [3, 1, 5, 2])
    own, keys = share(support.embeddings.plain, support.text), getattr(support.embeddings, which).astype(float)
    ranges = pairs_of(own, own, divergence), pairs_of(keys, keys, lambda a, b: float(a @ b))
    parameters = {"alpha": 2.0, "beta": 5.5, "gamma": 10.0}
    literal = tip_x_literal(support, queries, *ranges, which=which, **parameters)
    expected = tip_x(support, queries, *moved("none", support, queries, which), **parameters)
    np.testing.assert_allclose(literal, expected, atol=1e-9 * np.abs(expected).max())
    plan = compile_method("tip-x" if which == "plain" else "tip-x++", support, **parameters)
    logits = score(plan, queries, "reference")
    np.testing.assert_allclose(logits, literal, atol=TOLERANCE * np.abs(literal).max())


def test_only_the_public_form_of_tip_x_depends_on_the_batch(rng: np.random.Generator) -> None:
    support, queries = problem("clustered", rng, [3, 1, 5, 2])
    parameters = {"alpha": 1.0, "beta": 5.5, "gamma": 5.0}
    plan, part = compile_method("tip-x", support, **parameters), slice(0, 3)
    whole = score(plan, queries, "reference")[part]
    np.testing.assert_allclose(score(plan, queries[part], "reference"), whole, rtol=1e-6)
    by_batch = tip_x_batch(support, queries[part], **parameters)
    assert np.abs(by_batch - tip_x_batch(support, queries, **parameters)[part]).max() > 0.1
    # Its ranges are those of all pairs of the batch's images and keys.
    own, asked = (share(e.plain, support.text) for e in (support.embeddings, queries[part]))
    divergences = [divergence(s, other) for s in asked for other in own]
    cosines = queries.plain[part].astype(float) @ support.embeddings.plain.T.astype(float)
    ranges = (min(divergences), max(divergences)), (cosines.min(), cosines.max())
    np.testing.assert_allclose(by_batch, tip_x_literal(support, queries[part], *ranges, **parameters), rtol=1e-9)


def test_tip_x_of_a_single_image_is_unscaled(rng: np.random.Generator) -> None:
    support, queries = problem("random", rng, [0, 1, 0])
    plan = compile_method("tip-x", support, alpha=0.0, gamma=2.0)
    own, asked = (share(e.plain, support.text) for e in (support.embeddings, queries))
    expected = zero_shot(support, queries)
    expected[:, 1] -= 2.0 * np.array([divergence(s, own[0]) for s in asked])
    np.testing.assert_allclose(score(plan, queries), expected, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("weight", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("counts", [[3] * 5, [1] * 9, [2, 0, 4, 1]], ids=str)
@pytest.mark.parametrize("kind", ["random", "clustered"])
def test_ape_chooses_the_channels_of_the_public_loops(
    kind: str, counts: list[int], weight: float, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    support, _ = problem(kind, rng, counts)
    monkeypatch.setitem(choose_channels.__globals__, "SIMILARITY_WEIGHT", weight)
    rows = support.embeddings.adapted
    for number in (1, 7, 18, 24):
        chosen = np.flatnonzero(choose_channels(support, rows, number / 24))
        np.testing.assert_array_equal(chosen, public_channels(support, rows, weight, number))


# What is left when images are left out


FOLDS = {
    "one each": lambda labels: np.arange(len(labels)),
    "one of each class": lambda labels: np.arange(len(labels)) % 3,
    "some stay, a fold is missing": lambda labels: np.where(labels % 2 == 0, 2 * (np.arange(len(labels)) % 3), -1),
    "none": lambda labels: np.full(len(labels), -1),
}


@pytest.mark.parametrize("folds", FOLDS)
@pytest.mark.parametrize("kind", ["random", "clustered"])
def test_kernel_ridge_without_a_fold_is_a_fit_without_it(kind: str, folds: str, rng: np.random.Generator) -> None:
    support, _ = problem(kind, rng, [3, 1, 5, 2, 2, 7])
    rows, queries = (e.astype(np.float64) for e in (support.embeddings.plain, support.embeddings.adapted))
    residual, own = rng.standard_normal((len(rows), 6)), FOLDS[folds](support.labels)
    kernel, query_kernel = (np.exp(-2.0 * (1 - x @ rows.T)) for x in (rows, queries))
    ridge = rng.uniform(0.02, 0.1, len(rows))
    found = KernelRidge(kernel, residual, ridge).without_folds(own, query_kernel)
    for j, fold in enumerate(own):
        if fold < 0:
            assert np.isnan(found[j]).all()
            continue
        kept = own != fold
        values = ridge_values(rows[kept], residual[kept], 2.0, ridge[kept])
        np.testing.assert_allclose(found[j], query_kernel[j, kept] @ values, atol=1e-8)
    of_images = KernelRidge(kernel, residual, ridge).without_folds(own, kernel)
    np.testing.assert_allclose(KernelRidge(kernel, residual, ridge).without_folds(own), of_images, atol=1e-9)


@pytest.mark.parametrize("size", [1, 99, 100, 101, 257])
def test_the_inverse_of_a_triangle_is_that_of_numpy(size: int, rng: np.random.Generator) -> None:
    lower = np.tril(rng.standard_normal((size, size))) / size + np.eye(size)
    np.testing.assert_allclose(lower_inverse(lower), np.linalg.inv(lower), atol=1e-12)
