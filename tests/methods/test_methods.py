"""Support sets, the registry of methods, and errors for what does not fit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods import check_parameters, compile_method, unavailable_reason
from iosr_fast.methods.support_set import SupportSet, make_support_set, mean_of_views
from iosr_fast.methods.tune import check_choice
from tests.conftest import random_embeddings, unit_rows
from tests.methods.support_sets import unit


def support_set(rng: np.random.Generator) -> SupportSet:
    labels = rng.permutation(np.concatenate([np.arange(5), rng.integers(0, 5, 18)]))
    return make_support_set(random_embeddings(rng, 23, 16), labels, unit_rows(rng, 5, 16), 40.0)


def test_what_a_method_needs_and_lacks_is_named(rng: np.random.Generator) -> None:
    support, empty = support_set(rng), np.zeros((0, 16), np.float32)
    nothing = make_support_set(Embeddings(empty, empty), np.zeros(0, int), support.text, 1.0)
    for name, one, words in (
        (
            "tip-adapter++",
            replace(support, embeddings=Embeddings(support.embeddings.plain)),
            "an encoder with an adapter",
        ),
        ("tip-adapter", nothing, "needs support images, got none"),
        ("tip-x", replace(support, text=None), "no text embeddings"),
        ("gda", support.only(support.labels != 2), "at least one image of each class, got none of 1 classes"),
    ):
        with pytest.raises(ValueError, match=words):
            compile_method(name, one)
        assert unavailable_reason(name, support) is None and words in str(unavailable_reason(name, one))


def test_wrong_names_and_parameters_are_named(rng: np.random.Generator) -> None:
    assert check_parameters("gda", alpha=1, beta=None) == {"alpha": 1.0}
    for words, call in {
        r"expected a method of .*tip-adapter, .*got 'tipadapter'": lambda: compile_method(
            "tipadapter", support_set(rng)
        ),
        r"has the parameters \['alpha', 'beta'\], got \['gamma'\]": lambda: check_parameters("tip-adapter", gamma=1.0),
        "expected a reducer of none, centre, pca": lambda: compile_method("gda", support_set(rng), reducer="whiten"),
        "stack takes no reducer, got 'centre'": lambda: check_choice("stack", "centre", None),
        "expected tune to be 'loo' or 'none', got 'yes'": lambda: check_choice("gda", None, "yes"),
        "expected parameters or tune='loo', got both; leave alpha out": lambda: check_choice(
            "gda", None, "loo", alpha=1
        ),
        "method 'auto' chooses by leave-one-out: leave alpha, reducer out": lambda: check_choice(
            "auto", "none", None, alpha=1.0
        ),
        "leave tune='none' out, or name a method": lambda: check_choice("auto", None, "none"),
        "expected a method of auto, zero-shot": lambda: check_choice("svm", None, None),
    }.items():
        with pytest.raises(ValueError, match=words):
            call()
    assert check_choice("auto", None, "loo") == {} and check_choice("gda", "pca", "none", alpha=2) == {"alpha": 2.0}


def test_a_support_set_is_sorted_stably(rng: np.random.Generator) -> None:
    embeddings, labels = random_embeddings(rng, 6, 4), np.array([2, 0, 2, 0, 0, 3])
    support = make_support_set(embeddings, labels, unit_rows(rng, 4, 4), 1.0, queries=embeddings[::-1])
    np.testing.assert_array_equal(support.class_offsets, [0, 3, 3, 5, 6])
    np.testing.assert_array_equal(support.labels, [0, 0, 0, 2, 2, 3])
    np.testing.assert_array_equal(support.embeddings.plain, embeddings.plain[[1, 3, 4, 0, 2, 5]])
    np.testing.assert_array_equal(support.as_queries.plain, embeddings.plain[::-1][[1, 3, 4, 0, 2, 5]])
    some = support.only(np.array([True, False, True, False, True, True]))
    np.testing.assert_array_equal(some.labels, [0, 0, 2, 3])
    np.testing.assert_array_equal(some.embeddings.adapted, embeddings.adapted[[1, 4, 2, 5]])
    np.testing.assert_array_equal(some.as_queries.plain, embeddings.plain[::-1][[1, 4, 2, 5]])


def test_views_are_averaged_and_normalised(rng: np.random.Generator) -> None:
    rows = random_embeddings(rng, 21, 16)
    averaged = mean_of_views(rows, 3)
    for part, mean in ((rows.plain, averaged.plain), (rows.adapted, averaged.adapted)):
        np.testing.assert_allclose(mean, unit(part.reshape(7, 3, 16).astype(float).mean(1)), atol=1e-6)
    assert mean_of_views(Embeddings(rows.plain), 3).adapted is None


def test_a_support_set_refuses_what_does_not_fit(rng: np.random.Generator) -> None:
    rows, text = random_embeddings(rng, 3, 4), unit_rows(rng, 2, 4)
    assert make_support_set(rows, np.array([0, 1, 1]), None, 1.0, 3).n_classes == 3
    for words, labels, texts in (
        ("one label for each of 3", [0, 1], text),
        (r"labels in 0\.\.1, got 0\.\.2", [0, 1, 2], text),
        ("as wide as the text's, 5, got 4", [0, 1, 1], unit_rows(rng, 2, 5)),
        ("text embeddings or n_classes", [0, 1, 1], None),
    ):
        with pytest.raises(ValueError, match=words):
            make_support_set(rows, np.array(labels), texts, 1.0)
