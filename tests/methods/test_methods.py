"""Methods against their papers' formulas in float64, and the support set."""

from __future__ import annotations

import ast
from dataclasses import replace

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods import METHODS, compile_method
from iosr_fast.methods.support_set import SupportSet, make_support_set, mean_of_views
from iosr_fast.scoring.score import score
from tests import ROOT
from tests.conftest import random_embeddings, unit_rows

PACKAGE = ROOT / "iosr_fast"


def support_set(rng: np.random.Generator, n: int = 23, classes: int = 5, width: int = 16) -> SupportSet:
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
    return make_support_set(
        random_embeddings(rng, n, width), rng.permutation(labels), unit_rows(rng, classes, width), 40.0
    )


def papers_tip_adapter(support: SupportSet, queries: Embeddings, which: str, alpha: float, beta: float) -> np.ndarray:
    """Tip-Adapter's code in float64: one-hot values, affinity, both logits added (Zhang et al., equations 4 to 6); a
    class counts as one of mean size."""
    keys, query = getattr(support.embeddings, which).astype(float), getattr(queries, which).astype(float)
    values = np.eye(support.n_classes)[support.labels] * support.counts.mean() / support.counts
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


@pytest.mark.parametrize("views", [1, 3, 10])
def test_views_are_averaged_and_normalised(rng: np.random.Generator, views: int) -> None:
    rows = random_embeddings(rng, 7 * views, 16)
    averaged = mean_of_views(rows, views)
    for part, mean in ((rows.plain, averaged.plain), (rows.adapted, averaged.adapted)):
        expected = np.array([part[views * i : views * (i + 1)].astype(float).mean(0) for i in range(7)])
        np.testing.assert_allclose(mean, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)
    assert mean_of_views(Embeddings(rows.plain), views).adapted is None


def test_a_methods_name_stands_in_its_own_file_only() -> None:
    """What the package asks of a method is a field of Method, never a comparison of names; measurements name them."""
    files = {name: f"methods/{name.removesuffix('++').replace('-', '_')}.py" for name in METHODS}
    measurements = (PACKAGE / "benchmarks", PACKAGE / "evaluation")
    for path in sorted(PACKAGE.rglob("*.py")):
        if any(folder in path.parents for folder in measurements):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in METHODS:
                assert path.relative_to(PACKAGE).as_posix() == files[node.value], f"{node.value} in {path}"
