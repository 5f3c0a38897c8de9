"""Methods against their papers' formulas in float64, the support set, and overlap against brute force."""

from __future__ import annotations

import ast
from dataclasses import replace

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings, Encoder
from iosr_fast.methods import METHODS, compile_method
from iosr_fast.methods.support_set import SupportSet, encode_support, make_support_set
from iosr_fast.scoring.score import score
from iosr_fast.training.overlap import auroc, overlap_area, pair_cosines
from tests import ROOT
from tests.conftest import random_embeddings, unit_rows

PACKAGE = ROOT / "iosr_fast"


def support_set(rng: np.random.Generator, n: int = 23, classes: int = 5, width: int = 16) -> SupportSet:
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
    return make_support_set(
        random_embeddings(rng, n, width), rng.permutation(labels), unit_rows(rng, classes, width), 40.0
    )


def papers_tip_adapter(support: SupportSet, queries: Embeddings, which: str, alpha: float, beta: float) -> np.ndarray:
    """Tip-Adapter's code in float64: one-hot values, affinity, both logits added (Zhang et al., equations 4 to 6)."""
    keys, query = getattr(support.embeddings, which).astype(float), getattr(queries, which).astype(float)
    values = np.eye(support.n_classes)[support.labels]
    affinity = query @ keys.T
    cache_logits = np.exp(-(beta - beta * affinity)) @ values
    return support.tau * queries.plain.astype(float) @ support.text.T.astype(float) + cache_logits * alpha


@pytest.mark.parametrize(("method", "which"), [("tip-adapter", "plain"), ("tip-adapter++", "adapted")])
def test_tip_adapter_equals_the_papers_formula(rng: np.random.Generator, method: str, which: str) -> None:
    support, queries = support_set(rng), random_embeddings(rng, 33, 16)
    expected = papers_tip_adapter(support, queries, which, 2.5, 7.0)
    for impl in ("reference", "numpy", "cpp"):
        logits = score(compile_method(method, support, alpha=2.5, beta=7.0), queries, impl)
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        np.testing.assert_array_equal(logits.argmax(1), expected.argmax(1))


def test_zero_shot_uses_no_support(rng: np.random.Generator) -> None:
    support, queries = support_set(rng), random_embeddings(rng, 7, 16)
    expected = 40.0 * queries.plain.astype(float) @ support.text.T.astype(float)
    np.testing.assert_allclose(score(compile_method("zero-shot", support), queries), expected, atol=1e-4)
    none = make_support_set(Embeddings(np.zeros((0, 16), np.float32)), np.zeros(0, int), support.text, 40.0)
    np.testing.assert_allclose(score(compile_method("zero-shot", none), queries), expected, atol=1e-4)


def test_defaults_are_those_of_the_registry(rng: np.random.Generator) -> None:
    support, queries = support_set(rng), random_embeddings(rng, 9, 16)
    for name, method in METHODS.items():
        given = score(compile_method(name, support, **method.parameters), queries)
        np.testing.assert_array_equal(
            score(compile_method(name, support, **dict.fromkeys(method.parameters)), queries), given
        )
        assert all(
            axis == tuple(sorted(axis)) and set(method.axes) < set(method.parameters) for axis in method.axes.values()
        )


def test_bad_requests_are_named(rng: np.random.Generator) -> None:
    support = support_set(rng)
    with pytest.raises(ValueError, match=r"expected a method of .*tip-adapter, .*got 'tipadapter'"):
        compile_method("tipadapter", support)
    with pytest.raises(ValueError, match=r"has the parameters \['alpha', 'beta'\], got \['gamma'\]"):
        compile_method("tip-adapter", support, gamma=1.0)
    with pytest.raises(ValueError, match="needs an encoder with an adapter"):
        plain = SupportSet(Embeddings(support.embeddings.plain), support.class_offsets, support.text, 1.0)
        compile_method("tip-adapter++", plain)
    with pytest.raises(ValueError, match="needs support images, got none"):
        nothing = Embeddings(np.zeros((0, 16), np.float32), np.zeros((0, 16), np.float32))
        compile_method("tip-adapter", make_support_set(nothing, np.zeros(0, int), support.text, 1.0))
    with pytest.raises(ValueError, match="no text embeddings"):
        compile_method("tip-x", replace(support, text=None))
    with pytest.raises(ValueError, match="at least one image of each class, got none of 1 classes"):
        compile_method("gda", support.only(support.labels != 2))
    with pytest.raises(ValueError, match="expected a reducer of none, centre, pca"):
        compile_method("gda", support, reducer="whiten")


def test_support_set_is_sorted_stably(rng: np.random.Generator) -> None:
    embeddings, labels = random_embeddings(rng, 6, 4), np.array([2, 0, 2, 0, 0, 3])
    support = make_support_set(embeddings, labels, unit_rows(rng, 4, 4), 1.0)
    np.testing.assert_array_equal(support.class_offsets, [0, 3, 3, 5, 6])
    np.testing.assert_array_equal(support.labels, [0, 0, 0, 2, 2, 3])
    np.testing.assert_array_equal(support.embeddings.plain, embeddings.plain[[1, 3, 4, 0, 2, 5]])


def test_support_set_refuses_what_does_not_fit(rng: np.random.Generator) -> None:
    embeddings, text = random_embeddings(rng, 3, 4), unit_rows(rng, 2, 4)
    with pytest.raises(ValueError, match="one label for each of 3"):
        make_support_set(embeddings, np.array([0, 1]), text, 1.0)
    with pytest.raises(ValueError, match=r"labels in 0\.\.1, got 0\.\.2"):
        make_support_set(embeddings, np.array([0, 1, 2]), text, 1.0)
    with pytest.raises(ValueError, match="as wide as the text's, 5, got 4"):
        make_support_set(embeddings, np.array([0, 1, 1]), unit_rows(rng, 2, 5), 1.0)


def test_some_images_of_a_support_set(rng: np.random.Generator) -> None:
    support = replace(support_set(rng), queries=random_embeddings(rng, 23, 16))
    assert support.queries is not None
    rows = (support.labels != 1) & (rng.random(23) < 0.7)
    some = support.only(rows)
    np.testing.assert_array_equal(some.labels, support.labels[rows])
    np.testing.assert_array_equal(some.embeddings.adapted, support.embeddings.adapted[rows])
    assert some.queries is not None and some.n_classes == 5 and some.counts[1] == 0
    np.testing.assert_array_equal(some.queries.plain, support.queries.plain[rows])


def test_without_texts_the_number_of_classes_must_be_told(rng: np.random.Generator) -> None:
    embeddings = random_embeddings(rng, 3, 4)
    assert make_support_set(embeddings, np.array([0, 1, 1]), None, 1.0, 3).n_classes == 3
    with pytest.raises(ValueError, match="text embeddings or n_classes"):
        make_support_set(embeddings, np.array([0, 1, 1]), None, 1.0)


class MeanColour(Encoder):
    """An encoder whose embedding is easy to predict: the mean colour, normalised; the adapted one is its reverse."""

    image_size, width, fingerprint, runtime = 8, 3, "mean-colour", "numpy"

    def __init__(self) -> None:
        self.batches: list[int] = []

    def encode(self, pixels: np.ndarray) -> Embeddings:
        assert pixels.dtype == np.uint8 and pixels.shape[1:] == (8, 8, 3)
        self.batches.append(len(pixels))
        mean = pixels.reshape(len(pixels), -1, 3).mean(1) + 1
        plain = (mean / np.linalg.norm(mean, axis=1, keepdims=True)).astype(np.float32)
        return Embeddings(plain, plain[:, ::-1].copy())


@pytest.mark.parametrize("views", [1, 3, 10])
def test_views_are_averaged_and_normalised(rng: np.random.Generator, views: int) -> None:
    images = [np.full((9, 11, 3), rng.integers(0, 256, 3), np.uint8) for _ in range(7)]
    encoder = MeanColour()
    encoded = encode_support(encoder, images, views, True, rng, batch=8)
    expected = np.array([image[0, 0] + 1.0 for image in images])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(encoded.plain, expected, atol=1e-6)  # every view of one colour is that colour
    assert encoded.adapted is not None
    np.testing.assert_allclose(encoded.adapted, expected[:, ::-1], atol=1e-6)
    assert sum(encoder.batches) == 7 * views and max(encoder.batches) <= max(8, views)
    noisy = [rng.integers(0, 256, (30, 20, 3), dtype=np.uint8) for _ in range(3)]
    norms = np.linalg.norm(encode_support(encoder, noisy, views, True, rng).plain, axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-6)


def test_pairs_equal_brute_force(rng: np.random.Generator) -> None:
    rows, labels = unit_rows(rng, 12, 5), rng.integers(0, 3, 12)
    paired, unpaired = pair_cosines(rows, labels)
    same = [float(rows[i] @ rows[j]) for i in range(12) for j in range(i + 1, 12) if labels[i] == labels[j]]
    other = [float(rows[i] @ rows[j]) for i in range(12) for j in range(i + 1, 12) if labels[i] != labels[j]]
    np.testing.assert_allclose(np.sort(paired), np.sort(same), atol=1e-6)
    np.testing.assert_allclose(np.sort(unpaired), np.sort(other), atol=1e-6)
    wins = np.mean([(a > b) + 0.5 * (a == b) for a in paired for b in unpaired])
    assert auroc(paired, unpaired) == pytest.approx(wins)
    with pytest.raises(ValueError, match="pairs of the same and of different classes"):
        pair_cosines(rows, np.zeros(12, int))


def test_overlap_area_of_known_densities(rng: np.random.Generator) -> None:
    low, high = rng.uniform(-0.5, 0.0, 200_000), rng.uniform(0.0, 0.5, 200_000)
    half = rng.uniform(-0.25, 0.25, 200_000)
    assert overlap_area(high, low) < 0.01
    assert overlap_area(low, low) == pytest.approx(1.0)
    assert overlap_area(half, low) == pytest.approx(0.5, abs=0.01)
    assert auroc(high, low) == pytest.approx(1.0) and auroc(low, low) == pytest.approx(0.5)


def test_a_methods_name_stands_in_its_own_file_only() -> None:
    """What the package asks of a method is a field of Method, never a comparison of names."""
    files = {name: f"methods/{name.removesuffix('++').replace('-', '_')}.py" for name in METHODS}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in METHODS:
                assert path.relative_to(PACKAGE).as_posix() == files[node.value], f"{node.value} in {path}"
