"""dense_values, and plans whose keys have values, against the float64 reference; run as triton_parity.py says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.kernels import cache_score, dense_values
from iosr_fast.kernels.launch import PRECISIONS, Config
from iosr_fast.scoring.device_plan import device_plan
from tests.conftest import EXTENDED, random_embeddings, random_plan, random_reducer, unit_rows
from tests.scoring.test_precision import correlated_rows
from tests.scoring.triton_parity import BATCHES, DEVICE, HALF, LAYOUTS, SMALL, WIDTHS, assert_close_to_truth, tensors

DENSE = [name for name, parts in EXTENDED.items() if parts.get("dense")]


@pytest.fixture(autouse=True)
def _several_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Enough for keys to be dealt to several programs."""
    monkeypatch.setattr(dense_values, "multiprocessors", lambda device: 16)
    yield


def dense_reference(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, beta: float, weights: np.ndarray
) -> np.ndarray:
    """out[b] = sum over keys j of weights[j] * exp(-beta * (1 - <query[b], keys[j]>)) * values[j], in float64."""
    cosine = query.astype(np.float64) @ keys.astype(np.float64).T
    return (weights * np.exp(-beta * (1.0 - cosine))) @ values.astype(np.float64)


def assert_dense_close(
    rng: np.random.Generator,
    shape: tuple[int, int, int, int],
    precision: str,
    values_dtype: torch.dtype,
    config: Config | None = None,
    weighted: bool = True,
    device: str = DEVICE,
) -> None:
    """dense_values against float64, with at most twice the error of eager at the same precisions."""
    batch, n_keys, width, n_values = shape
    beta, weights = 5.5, rng.uniform(0.1, 1e5, n_keys).astype(np.float32) if weighted else None
    query = torch.tensor(unit_rows(rng, batch, width), device=device)
    keys = torch.tensor(unit_rows(rng, n_keys, width), device=device)
    values = torch.tensor(rng.uniform(-1, 1, (n_keys, n_values)), device=device).to(values_dtype)
    scales = None
    if precision == "int8":
        scales = keys.abs().amax(dim=1) / 127
        keys = torch.round(keys / scales[:, None]).to(torch.int8)
    keys = keys if precision == "int8" else keys.to(HALF[precision])
    exact = keys.float() if scales is None else keys.float() * scales[:, None]
    ones = np.ones(n_keys, np.float32) if weights is None else weights
    truth = dense_reference(query.cpu().numpy(), exact.cpu().numpy(), values.cpu().numpy(), beta, ones)
    affinity = torch.exp(-beta * (1.0 - query.to(HALF[precision]).float() @ exact.T))
    shares = torch.tensor(ones / ones.max(), device=device)
    eager_out = ((affinity * shares).to(values_dtype).float() @ values.float()) * float(ones.max())
    out = dense_values.dense_values(
        query,
        keys,
        values,
        beta=beta,
        weights=None if weights is None else torch.tensor(weights, device=device),
        key_scales=scales,
        config=config,
    )
    assert out.shape == truth.shape and out.dtype == torch.float32
    error, eager_error = (np.abs(got.cpu().numpy() - truth).max() for got in (out, eager_out))
    # Sums of signed values cancel, so their roundings are measured by what is summed.
    size = (ones @ np.abs(values.cpu().float().numpy())).max()
    roundings = 4.0 if device == "cpu" else 6.0 + 4.0 * beta
    assert error <= 2 * eager_error + roundings * np.finfo(np.float32).eps * size


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("values_dtype", [torch.float16, torch.float32], ids=str)
def test_dense_values(precision: str, values_dtype: torch.dtype, rng: np.random.Generator) -> None:
    config = Config(16, 16, 16, 1, 1, block_v=16)
    for shape in ((1, 1, 1, 1), (5, 33, 17, 3), (33, 70, 33, 40)):
        assert_dense_close(rng, shape, precision, values_dtype, config)
    assert_dense_close(rng, (5, 33, 17, 20), precision, values_dtype, replace(config, swap=True), weighted=False)
    assert_dense_close(rng, (33, 70, 64, 70), precision, values_dtype)


def test_dense_values_without_queries_or_with_wrong_ones(rng: np.random.Generator) -> None:
    query, keys = (torch.tensor(unit_rows(rng, n, 8), device=DEVICE) for n in (2, 3))
    values = torch.ones((3, 4), device=DEVICE)
    assert dense_values.dense_values(query[:0], keys, values, beta=1.0).shape == (0, 4)
    wrong = (
        ({"query": query[0]}, r"expected query \(B, D\)"),
        ({"keys": keys[:, :5]}, r"expected keys \(N, 8\)"),
        ({"keys": keys[:0], "values": values[:0]}, "N >= 1"),
        ({"values": values[:2]}, r"expected values \(3, V\).*one row per key"),
        ({"values": values.double()}, "float16 or float32"),
        ({"weights": torch.ones(2, device=DEVICE)}, r"expected weights \(3,\) float32, got \(2,\)"),
        ({"keys": keys.to(torch.int8)}, "expected key_scales with int8 keys"),
        ({"key_scales": torch.ones(3, device=DEVICE)}, "with no others"),
        ({"beta": -1.0}, "expected beta finite and >= 0"),
    )
    for change, message in wrong:
        arguments = {"query": query, "keys": keys, "values": values, "beta": 1.0} | change
        with pytest.raises(ValueError, match=message):
            dense_values.dense_values(**arguments)


# Plans whose keys have values


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", DENSE)
def test_plans_with_values(name: str, precision: str, rng: np.random.Generator) -> None:
    start = DENSE.index(name) + 3 * PRECISIONS.index(precision)
    for step in range(3):
        counts, batch = LAYOUTS[(start + step) % len(LAYOUTS)], BATCHES[(start + step) % len(BATCHES)]
        width = WIDTHS[(start + 5 * step) % len(WIDTHS)]
        plan = random_plan(rng, list(counts), width, **EXTENDED[name], precision=precision)  # type: ignore[arg-type]
        embeddings = random_embeddings(rng, batch, width)
        assert_close_to_truth(plan, embeddings, None, SMALL[step % 2], expected="dense")
    assert_close_to_truth(plan, random_embeddings(rng, 0, width), None, expected="dense")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch", [3, 40])
def test_default_configurations_of_plans_with_values(batch: int, precision: str, rng: np.random.Generator) -> None:
    for counts, width in (([40] * 3, 72), ([1, 0, 130], 17)):
        plan = random_plan(rng, counts, width, **EXTENDED["all"], precision=precision)  # type: ignore[arg-type]
        assert_close_to_truth(plan, random_embeddings(rng, batch, width), None, expected="dense")


def test_values_of_int8_keys_in_a_basis_of_their_own(rng: np.random.Generator) -> None:
    plan = random_plan(rng, [100, 50], 48, ("text", "cache"), dense=True, beta=8.0)
    plan = replace(plan, keys=correlated_rows(rng, 150, 48)).with_key_precision("int8")
    assert plan.query_transform is not None
    for reduced in (plan, replace(plan, reducer=random_reducer(rng, "projection", 48))):
        queries = Embeddings(unit_rows(rng, 5, 48), correlated_rows(rng, 5, 48))
        assert_close_to_truth(reduced, queries, None, SMALL[0], expected="dense")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_embeddings_of_extended_plans(dtype: torch.dtype, rng: np.random.Generator) -> None:
    """Whatever a half row is moved by is computed in float32: nothing is rounded that the kernels don't round."""
    for name, parts in EXTENDED.items():
        precision = "fp32" if len(name) % 2 else "fp16"
        plan = device_plan(random_plan(rng, [3, 2], 24, **parts, precision=precision), DEVICE)  # type: ignore[arg-type]
        plain, adapted = (rows.to(dtype) for rows in tensors(random_embeddings(rng, 3, 24)))
        halves, path = cache_score.score_triton(plan, plain, adapted)
        assert path == f"triton/{'dense' if name in DENSE else 'few' if plan.keys is not None else 'no-keys'}"
        assert torch.equal(halves, cache_score.score_triton(plan, plain.float(), adapted.float())[0]), name


@pytest.mark.parametrize("path", ["aligned", "dense"])
def test_keys_with_values_leave_no_choice_of_a_path(path: str, rng: np.random.Generator) -> None:
    plan = device_plan(random_plan(rng, [2, 1], 8, dense=True), DEVICE)
    with pytest.raises(ValueError, match=f'expected no path for keys with values, got "{path}"'):
        cache_score.score_triton(plan, *tensors(random_embeddings(rng, 2, 8)), path=path)
