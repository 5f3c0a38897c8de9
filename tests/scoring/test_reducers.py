"""Reducers against their formulas in float64, and fit_reducer against the statistics that it names."""

from __future__ import annotations

import numpy as np
import pytest

from iosr_fast.scoring.reducers import Reducer, fit_reducer
from tests.conftest import unit_rows

SHAPES = ((1, 1), (5, 3), (3, 7), (40, 33))


def by_formula(reducer: Reducer, rows: np.ndarray) -> np.ndarray:
    """unit(projection @ (row - shift)) in float64, row by row."""
    width = rows.shape[1]
    shift = np.zeros(width) if reducer.shift is None else reducer.shift.astype(np.float64)
    projection = np.eye(width) if reducer.projection is None else reducer.projection.astype(np.float64)
    projection = np.diag(projection) if projection.ndim == 1 else projection
    moved = np.stack([projection @ (row - shift) for row in rows.astype(np.float64)])
    return moved / np.linalg.norm(moved, axis=1, keepdims=True)


def projections(rng: np.random.Generator, width: int) -> dict[str, np.ndarray | None]:
    return {"none": None, "diagonal": rng.uniform(0.5, 2.0, width), "full": rng.standard_normal((width, width))}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("projection", ["none", "diagonal", "full"])
def test_rows_are_moved_as_the_formula_says(projection: str, shape: tuple[int, int], rng: np.random.Generator) -> None:
    width, rows = shape[1], unit_rows(rng, *shape)
    matrix = projections(rng, width)[projection]
    for shift in (0.4 * unit_rows(rng, 1, width)[0], None):
        if shift is None and matrix is None:
            continue
        reducer = Reducer(shift, matrix)
        moved = reducer(rows)
        assert reducer.width == width and moved.dtype == np.float32 and moved.shape == shape
        np.testing.assert_allclose(moved, by_formula(reducer, rows), rtol=1e-4, atol=1e-5)
        assert reducer(rows[:0]).shape == (0, width)


def test_a_row_that_is_mapped_to_zero_stays_zero(rng: np.random.Generator) -> None:
    rows = unit_rows(rng, 3, 8)
    rows[2] = np.eye(8)[5]
    assert not Reducer(rows[1])(rows)[1].any()
    for projection in (1.0 - np.eye(8)[5], np.diag(1.0 - np.eye(8)[5])):
        moved = Reducer(projection=projection)(rows)
        assert not moved[2].any() and np.isfinite(moved).all()


def test_a_reducer_is_a_frozen_copy_and_leaves_rows_alone(rng: np.random.Generator) -> None:
    shift, projection = rng.standard_normal(8), np.asfortranarray(rng.standard_normal((8, 8)))
    rows, reducer = unit_rows(rng, 4, 8), Reducer(shift, projection)
    before, original = reducer(rows), rows.copy()
    shift[:], projection[:] = 0, 0
    np.testing.assert_array_equal(reducer(rows), before)
    np.testing.assert_array_equal(rows, original)
    for array in (reducer.shift, reducer.projection):
        assert array is not None and array.dtype == np.float32 and array.flags.c_contiguous
        assert not array.flags.writeable


BAD_REDUCERS = {
    "neither": ({}, "a shift or a projection, got neither"),
    "shift of two dimensions": ({"shift": np.zeros((1, 8))}, r"a shift of shape \(D,\), got \(1, 8\)"),
    "shift and projection apart": (
        {"shift": np.zeros(8), "projection": np.eye(7)},
        r"a projection of shape \(8, 8\) or \(8,\), got \(7, 7\)",
    ),
    "oblong projection": ({"projection": np.ones((4, 8))}, r"a projection of shape \(D, D\) or \(D,\), got \(4, 8\)"),
    "projection of three dimensions": ({"projection": np.ones((2, 2, 2))}, r"got \(2, 2, 2\)"),
    "shift NaN": ({"shift": np.full(8, np.nan)}, "shift to be finite, got 8"),
    "projection infinite": ({"projection": np.diag([1.0, np.inf])}, "projection to be finite, got 1"),
    "shift too large": ({"shift": np.full(4, 1e3)}, "shift of magnitudes up to"),
    "projection too large": ({"projection": 1e20 * np.eye(4)}, "projection of magnitudes up to"),
}


@pytest.mark.parametrize("case", BAD_REDUCERS)
def test_a_wrong_reducer_is_refused(case: str) -> None:
    parts, message = BAD_REDUCERS[case]
    with pytest.raises(ValueError, match=message):
        Reducer(**parts)


@pytest.mark.parametrize("projection", ["none", "diagonal", "full"])
def test_then_is_one_reducer_after_another(projection: str, rng: np.random.Generator) -> None:
    rows, shift = unit_rows(rng, 9, 16), 0.3 * unit_rows(rng, 1, 16)[0]
    first, channels = (
        Reducer(shift, projections(rng, 16)[projection]),
        rng.uniform(0.5, 2.0, 16) * (np.arange(16) % 3 > 0),
    )
    np.testing.assert_allclose(first.then(channels)(rows), Reducer(projection=channels)(first(rows)), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_centre_subtracts_the_mean(shape: tuple[int, int], rng: np.random.Generator) -> None:
    rows = unit_rows(rng, *shape)
    reducer = fit_reducer("centre", rows)
    assert reducer is not None and reducer.projection is None and fit_reducer("none", rows) is None
    np.testing.assert_allclose(reducer.shift, rows.astype(np.float64).mean(0), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [(40, 33), (20, 64), (9, 4), (1, 16), (5, 1)], ids=str)
@pytest.mark.parametrize("components", [None, 1, 3])
def test_pca_keeps_the_leading_components(
    components: int | None, shape: tuple[int, int], rng: np.random.Generator
) -> None:
    n_rows, width = shape
    rows = unit_rows(rng, n_rows, width)
    rank = components or max(1, round(0.5 * min(n_rows, width)))
    if rank > width:
        with pytest.raises(ValueError, match=f"at most {width} principal components, one a channel, got {rank}"):
            fit_reducer(f"pca:{rank}", rows)
        return
    reducer = fit_reducer("pca" if components is None else f"pca:{components}", rows)
    assert reducer is not None and reducer.projection is not None and reducer.shift is not None
    centred = rows.astype(np.float64) - rows.astype(np.float64).mean(0)
    projection = reducer.projection.astype(np.float64)
    # An orthogonal projection of that rank (N rows have no more components than N), and the best there is: it keeps
    # the sum of the largest eigenvalues of the scatter.
    np.testing.assert_allclose(projection, projection.T, atol=1e-7)
    np.testing.assert_allclose(projection @ projection, projection, atol=1e-6)
    assert round(np.trace(projection)) == min(rank, n_rows)
    values = np.linalg.eigvalsh(centred.T @ centred)[::-1]
    np.testing.assert_allclose(np.linalg.norm(centred @ projection) ** 2, values[:rank].sum(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["", "PCA", "whiten", "pca:", "centre:", "pca:0", "pca:-1", "pca:1.5", "centre:3"])
def test_an_unknown_name_is_refused(name: str, rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match=r"expected a reducer of none, centre, pca or pca:NUMBER, got"):
        fit_reducer(name, unit_rows(rng, 5, 8))


@pytest.mark.parametrize("name", ["centre", "pca", "pca:2"])
def test_no_rows_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"support images to fit the reducer '{name}' on, got none; use 'none'"):
        fit_reducer(name, np.zeros((0, 8), np.float32))
