"""Each model family's predictions without a fold against a model that is fitted on the other images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods import METHODS
from iosr_fast.methods.folds import make_folds
from iosr_fast.methods.models import gaussian, keys, ridge
from iosr_fast.methods.models.gaussian import GaussianModel
from iosr_fast.methods.models.keys import DivergenceModel, KeyModel, RefinedKeyModel
from iosr_fast.methods.models.model import Memory, Model, TextModel, join_terms
from iosr_fast.methods.models.ridge import RidgeModel, kernel_matrix, lower_inverse
from iosr_fast.methods.ood_scores import BackgroundModel, DensityModel, NearestKeyModel
from iosr_fast.methods.out_of_fold import HeldOut
from iosr_fast.methods.papers import stack_models
from iosr_fast.methods.support_set import SupportSet, class_weights, make_support_set
from iosr_fast.scoring.reducers import fit_reducer
from iosr_fast.scoring.score import score
from tests.methods.support_sets import Clusters, unit

MODELS: dict[str, Callable[[SupportSet], Model]] = {
    "texts": TextModel,
    "keys": lambda support: KeyModel(support, "adapted", beta=4.0),
    "refined keys": lambda support: RefinedKeyModel(support, "adapted", beta=4.0, gamma=0.4),
    "divergences": DivergenceModel,
    "gaussians": GaussianModel,
    "gaussians with texts": lambda support: GaussianModel(support, "adapted", copies=1.5),
    "densities": DensityModel,
    "background": BackgroundModel,
    "nearest key": NearestKeyModel,
}


def uneven(views: bool = False) -> SupportSet:
    """Classes of different size, one of a single image, one of near duplicates alone, and one with a near duplicate."""
    support = Clusters(6, width=11, adapted=True).support([3, 1, 20, 2, 4, 3], views=views)
    plain = support.embeddings.plain.copy()
    plain[27] = unit(plain[26] + 1e-3)
    plain[30:33] = unit(plain[30] + 1e-3 * np.random.default_rng(3).standard_normal((3, 11)))
    return replace(support, embeddings=Embeddings(plain, support.embeddings.adapted))


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_without_a_fold_is_a_fit_on_the_others(name: str, views: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    support = uneven(views)
    reducer, folds = fit_reducer("centre", support.embeddings.plain), make_folds(support)
    for model in (MODELS[name](support), replace(MODELS[name](support), reducer=reducer)):
        scores = model.without(folds)
        assert np.isnan(scores[~folds.scored]).all() and folds.scored.sum() == 29
        for j in folds.rows:
            kept = folds.fold != folds.fold[j]
            others = make_support_set(support.embeddings[kept], support.labels[kept], support.text, support.tau)
            expected = replace(MODELS[name](others), reducer=model.reducer).scores(support.as_queries[[j]])[0]
            near = {"rtol": 1e-5, "atol": 1e-6 * max(1.0, np.abs(expected).max())}
            np.testing.assert_allclose(scores[j], np.broadcast_to(expected, 6), **near)
        with_memory = replace(model, memory=Memory())
        for _ in range(2):
            np.testing.assert_array_equal(with_memory.without(folds), scores)
        monkeypatch.setattr(keys, "_TILE", 1)  # an image at a time
        np.testing.assert_allclose(model.without(folds), scores, rtol=1e-4, atol=1e-4)
        monkeypatch.undo()


def test_a_part_keeps_what_its_plan_needs_and_no_factorisation(monkeypatch: pytest.MonkeyPatch) -> None:
    support, queries = uneven(), Clusters(6, width=11, adapted=True).queries(3)[0]
    parameters = {name: 0.5 + 0.1 * i for i, name in enumerate(METHODS["stack++"].parameters)}
    expected = METHODS["stack++"].compile(support, None, parameters)
    held_out, factorised = HeldOut.of_support(support, make_folds(support)), []
    monkeypatch.setattr(ridge, "lower_inverse", lambda lower: factorised.append(len(lower)) or np.linalg.inv(lower))
    parts = {name: held_out.part(model) for name, model in stack_models(support, parameters).items()}
    assert factorised == [33], "labels and texts share one"
    monkeypatch.setattr(gaussian, "fit_gaussians", None)
    plan = join_terms(6, [(parameters[name], part.model.fields()) for name, part in parts.items()])
    assert factorised == [33], "and the plan needs no other"
    np.testing.assert_allclose(score(plan, queries), score(expected, queries), rtol=1e-6)
    again = {name: held_out.part(model) for name, model in stack_models(support, parameters).items()}
    assert all(again[name] is part for name, part in parts.items())
    assert not any({"factorised", "moments"} & set(vars(part.model)) for part in parts.values())
    assert parts["regression"].model.system is None


def test_a_memory_forgets_what_was_asked_for_least_recently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iosr_fast.methods.models.model.MOST", 10)
    kept, made = Memory(), []
    for key, n_bytes in [*((key, 3) for key in "abccadb"), ("e", 11), ("e", 11)]:
        kept.get(key, n_bytes, lambda key=key: made.append(key) or key)
    assert made == [*"abcdbee"]


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("which", ["plain", "adapted"])
def test_a_regression_without_a_fold_keeps_the_weights_of_classes(which: str, views: bool) -> None:
    support, folds = uneven(views), make_folds(uneven())
    model = RidgeModel(support, which, None, 1.3, 0.2, label_weight=0.7, text_weight=1.6)  # type: ignore[arg-type]
    scores = model.without(folds)
    key_rows, queries = (getattr(e, which) for e in (support.embeddings, support.as_queries))
    cosines = support.embeddings.plain.astype(np.float64) @ support.text.T
    target = 0.7 * np.eye(6)[support.labels] - 1.6 * cosines
    ridge = 0.2 / class_weights(support.counts)[support.labels]
    assert np.isnan(scores[~folds.scored]).all()
    for j in folds.rows:
        kept = folds.fold != folds.fold[j]
        system = kernel_matrix(key_rows[kept], key_rows[kept], 1.3) + np.diag(ridge[kept])
        expected = kernel_matrix(queries[[j]], key_rows[kept], 1.3) @ np.linalg.solve(system, target[kept])
        np.testing.assert_allclose(scores[j], expected[0], atol=1e-9)


@pytest.mark.parametrize("size", [1, 99, 100, 101, 257])
def test_the_inverse_of_a_triangle_is_that_of_numpy(size: int, rng: np.random.Generator) -> None:
    lower = np.tril(rng.standard_normal((size, size))) / size + np.eye(size)
    np.testing.assert_allclose(lower_inverse(lower), np.linalg.inv(lower), atol=1e-12)


@pytest.mark.parametrize("name", ["gaussians", "gaussians with texts", "densities", "background", "paper"])
def test_few_rows_of_many_channels_are_compared_in_their_span(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with queries outside of it, and support images that are as far from it as queries (`views`)."""
    make = MODELS.get(name, lambda support: GaussianModel(support, copies=2.0, paper=True))
    world = Clusters(6, width=90, adapted=True)
    model, queries = make(world.support([3, 1, 20, 2, 4, 3], views=True)), world.queries(4)[0]
    folds = make_folds(model.support)
    scores, without, fields = model.scores(queries), model.without(folds), model.fields()
    assert isinstance(model, GaussianModel) and len(model.moments.second) < 50
    monkeypatch.setattr(gaussian.Span, "of", lambda rows: gaussian.CHANNELS)
    model = replace(model)
    assert len(model.moments.second) == 90
    near = {"rtol": 1e-6, "atol": 1e-6 * np.abs(scores).min()}
    np.testing.assert_allclose(scores, model.scores(queries), **near)
    np.testing.assert_allclose(without, model.without(folds), **near)
    np.testing.assert_allclose(fields["linear"], model.fields()["linear"], rtol=1e-6, atol=1e-9)
