"""The Triton kernels against the float64 reference.

Triton decides when a kernel is defined whether its interpreter will run it, so one process has either the interpreter
or the compiler. test_triton.py therefore runs this file and triton_dense.py by pytest in a process of its own,
with TRITON_INTERPRET=1, and imports `assert_close_to_truth` from it for the tests on a GPU. The name keeps it out of
the main run.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.kernels import cache_score, layout
from iosr_fast.kernels.launch import PRECISIONS, Config
from iosr_fast.scoring.device_plan import DevicePlan, device_plan
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reference import score_reference
from iosr_fast.scoring.torch_op import ScoringModule
from tests.conftest import EXTENDED, random_embeddings, random_plan, random_reducer, unit_rows
from tests.scoring.numerics import AT_THE_BOUNDS, linear_size, plan_at_a_bound
from tests.scoring.test_precision import correlated_rows
from tests.scoring.test_score import BATCHES, LAYOUTS, TERM_SETS, WIDTHS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATHS = ("few", "aligned", "ragged", "aligned-tma", "ragged-tma")
POINTERS = PATHS[:3]
ALIGNED = ([4] * 5, [16] * 3, [1] * 70, [8])
TMA_WIDTHS = (16, 48, 112)  # rows of a multiple of 16 bytes at every precision
HALF = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float16}
# Small tiles, as the interpreter takes its time for each program; both orders of the operands.
SMALL = (Config(16, 16, 32, 1, 1), Config(16, 32, 64, 1, 1))


def tensors(embeddings: Embeddings, device: str = DEVICE) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(embeddings.plain, device=device), torch.tensor(embeddings.adapted, device=device)


def eager(plan: DevicePlan, plain: torch.Tensor, adapted: torch.Tensor) -> torch.Tensor:
    """The papers' code: full affinity and one-hot matrix or values, in float32 on queries rounded as the kernels round
    them."""
    logits = torch.zeros((len(plain), plan.n_classes), device=plan.device)
    if plan.text is not None:
        logits += plan.tau * (plain.float() @ plan.text.T)
    if plan.keys is not None:
        half = {torch.int8: torch.float16}.get(plan.keys.dtype, plan.keys.dtype)
        keys = plan.keys.float()
        keys = keys if plan.key_scales is None else keys * plan.key_scales[:, None]
        query = plan.query_rows(plain.float(), adapted.float()).to(half).float()
        affinity = torch.exp(-plan.beta * (1.0 - query @ keys.T))
        affinity = affinity if plan.weights is None else affinity * plan.weights
        values = plan.values
        if values is None:
            counts = plan.class_offsets.diff().long()
            labels = torch.repeat_interleave(torch.arange(plan.n_classes, device=plan.device), counts)
            values = torch.eye(plan.n_classes, device=plan.device)[labels]
        logits += plan.alpha * (affinity @ values)
    if plan.linear is not None:
        logits += plan.feature_rows(plain.float(), adapted.float()) @ plan.linear.T
    return logits if plan.bias is None else logits + plan.bias


def way(path: str | None) -> dict[str, Any]:
    """score_triton's arguments for a path."""
    return {} if path is None else {"path": path.removesuffix("-tma"), "tma": path.endswith("-tma")}


def layouts_of(path: str) -> tuple[list[int], ...]:
    return ALIGNED if path.startswith("aligned") else LAYOUTS


def assert_close_to_truth(
    plan: ScoringPlan,
    embeddings: Embeddings,
    path: str | None,
    config: Config | None = None,
    device: str = DEVICE,
    expected: str | None = None,
) -> torch.Tensor:
    """Score, see that the path ran, and that the error is at most twice eager's at the keys' precision.

    A path that ends in "-tma" loads by tensor descriptors."""
    truth = score_reference(plan, embeddings)
    on_device = device_plan(plan, device)
    plain, adapted = tensors(embeddings, device)
    logits, ran = cache_score.score_triton(on_device, plain, adapted, **way(path), config=config)
    assert ran == f"triton/{expected or path}"
    assert logits.dtype == torch.float32 and logits.shape == truth.shape
    error = np.abs(logits.cpu().numpy() - truth).max(initial=0.0)
    eager_error = np.abs(eager(on_device, plain, adapted).cpu().numpy() - truth).max(initial=0.0)
    scale = np.abs(truth).max(initial=0.0) + (plan.tau if plan.text is not None else 0.0)
    scale += linear_size(plan)
    if plan.values is not None:  # whose signs cancel
        scale += np.abs(cancelled(on_device, plain, adapted)).max(initial=0.0)
    # Two roundings at the terms' magnitude, and, with int8 keys, those of the scales of keys and queries, which the
    # exponential magnifies by beta; on a GPU, where three TF32 products stand for one of float32, four more.
    roundings = 2.0 + 2.0 * plan.beta * (plan.key_scales is not None) if device == "cpu" else 6.0 + 4.0 * plan.beta
    assert error <= 2 * eager_error + roundings * np.finfo(np.float32).eps * scale
    return logits


def cancelled(plan: DevicePlan, plain: torch.Tensor, adapted: torch.Tensor) -> np.ndarray:
    """The cache term of keys with values, were all their signs the same."""
    positive = replace(plan, text=None, linear=None, bias=None, values=plan.values.abs())
    sums: np.ndarray = eager(positive, plain, adapted).cpu().numpy()
    return sums


@pytest.mark.parametrize(
    ("path", "width"), [*itertools.product(POINTERS, WIDTHS), *itertools.product(PATHS[3:], TMA_WIDTHS)]
)
def test_odd_widths_and_batches(path: str, width: int, rng: np.random.Generator) -> None:
    # Each path meets every batch and every precision; 5 has no factor in common with their number.
    cases = list(itertools.product(BATCHES, layouts_of(path), PRECISIONS))
    start = 2 * ((WIDTHS + TMA_WIDTHS).index(width) * len(PATHS) + PATHS.index(path))
    for step in range(2):
        batch, counts, precision = cases[(start + step) * 5 % len(cases)]
        terms = ("text", "cache") if path == "few" else ("cache",)
        plan = random_plan(rng, list(counts), width, terms).with_key_precision(precision)
        assert_close_to_truth(plan, random_embeddings(rng, batch, width), path, SMALL[step % 2])


@pytest.mark.parametrize("path", ["few", "aligned", "ragged-tma"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_layout_at_every_precision(path: str, precision: str, rng: np.random.Generator) -> None:
    # Each path meets every layout at two precisions, and every precision half of the layouts.
    first, width = PRECISIONS.index(precision) % 2, 48 if path.endswith("-tma") else 17
    for step, counts in enumerate((*layouts_of(path), [16] * 3, [2] * 9)):
        if step % 2 != first:
            continue
        plan = random_plan(rng, list(counts), width, weighted=step % 4 < 2).with_key_precision(precision)
        assert_close_to_truth(plan, random_embeddings(rng, 5, width), path, SMALL[sum(counts) > 30])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("batch", "counts", "expected"), [(3, [1, 0, 37], "few"), (40, [16] * 9, "aligned"), (40, [1, 0, 37] * 6, "ragged")]
)
def test_default_configurations(
    precision: str, batch: int, counts: list[int], expected: str, rng: np.random.Generator
) -> None:
    plan = random_plan(rng, counts, 72).with_key_precision(precision)
    assert_close_to_truth(plan, random_embeddings(rng, batch, 72), None, expected=expected)


def test_many_tiles_of_queries_and_classes(rng: np.random.Generator) -> None:
    """More than one band of query blocks, and both the rows and the columns of the last tile cut short."""
    for path, counts in (("aligned", [4] * 5), ("ragged-tma", [5, 0, 12])):
        plan = random_plan(rng, counts, 16).with_key_precision("fp16")
        assert_close_to_truth(plan, random_embeddings(rng, 16 * 16 + 3, 16), path, SMALL[1])


@pytest.mark.parametrize("terms", TERM_SETS, ids="+".join)
def test_each_combination_of_terms(terms: tuple[str, ...], rng: np.random.Generator) -> None:
    embeddings = random_embeddings(rng, 5, 33)
    path = "few" if "cache" in terms else None
    for query, feature, weighted in itertools.product(("plain", "adapted"), ("plain", "adapted"), (True, False)):
        plan = random_plan(rng, [2, 0, 3, 1], 33, terms, query=query, feature=feature, weighted=weighted)
        assert_close_to_truth(plan, embeddings, path, SMALL[0], expected=path or "no-keys")
    if "linear" in terms:
        assert_close_to_truth(replace(plan, bias=None), embeddings, path, SMALL[0], expected=path or "no-keys")


@pytest.mark.parametrize("name", [name for name, parts in EXTENDED.items() if not parts.get("dense")])
@pytest.mark.parametrize("path", ["few", "ragged"])
def test_reducers_and_distributions_over_texts(path: str, name: str, rng: np.random.Generator) -> None:
    terms = EXTENDED[name].get("terms", ("cache",))
    if "cache" not in terms and path != "few":
        return
    for step, (counts, width, batch) in enumerate((([3, 0, 20], 33, 5), ([5, 1], 1, 1), ([2] * 20, 17, 0))):
        precision = PRECISIONS[(step + PATHS.index(path)) % len(PRECISIONS)]
        plan = random_plan(rng, list(counts), width, **EXTENDED[name], precision=precision)
        taken, expected = (path, path) if "cache" in terms else (None, "no-keys")
        assert_close_to_truth(plan, random_embeddings(rng, batch, width), taken, SMALL[step % 2], expected=expected)


@pytest.mark.parametrize("path", ["few", "ragged-tma"])
def test_a_reduced_query_meets_int8_keys_in_a_basis_of_their_own(path: str, rng: np.random.Generator) -> None:
    keys = correlated_rows(rng, 150, 48)
    plan = ScoringPlan(3, keys=keys, class_offsets=[0, 90, 90, 150], beta=8.0).with_key_precision("int8")
    assert plan.query_transform is not None
    queries = Embeddings(correlated_rows(rng, 5, 48), unit_rows(rng, 5, 48))
    assert_close_to_truth(plan, queries, path, SMALL[0])
    reduced = replace(plan, reducer=random_reducer(rng, "projection", 48))
    assert_close_to_truth(reduced, queries, path, SMALL[0])


@pytest.mark.parametrize("path", ["few", "ragged"])
@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 5.5), (1.7, 0.0), (1.7, 100.0), (-0.5, 1.0), (1e4, 1e3)])
def test_constants_at_their_ends(path: str, alpha: float, beta: float, rng: np.random.Generator) -> None:
    embeddings = random_embeddings(rng, 5, 64)
    plan = random_plan(rng, [4, 0, 29, 1], 64, alpha=alpha, beta=beta)
    # A query that is a key has affinity 1, where the exponent's rounding shows most.
    embeddings = Embeddings(embeddings.plain, np.concatenate([plan.keys[:3], embeddings.adapted[3:]]))
    logits = assert_close_to_truth(plan, embeddings, path, SMALL[0])
    if beta == 0.0:
        cache = replace(plan, text=None, linear=None, bias=None, weights=None)
        sums = assert_close_to_truth(cache, embeddings, path, SMALL[0])
        np.testing.assert_allclose(sums[0].cpu(), alpha * np.diff(plan.class_offsets), rtol=1e-6)
    if alpha == 0.0:
        without = replace(plan, keys=None, class_offsets=None, weights=None)
        torch.testing.assert_close(logits, assert_close_to_truth(without, embeddings, None, expected="no-keys"))


@pytest.mark.parametrize("path", ["few", "ragged-tma"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_duplicate_keys_count_twice(path: str, precision: str, rng: np.random.Generator) -> None:
    key = unit_rows(rng, 1, 32)
    plan = ScoringPlan(2, keys=np.repeat(key, 3, axis=0), class_offsets=np.array([0, 1, 3]), beta=7.0)
    logits = assert_close_to_truth(plan.with_key_precision(precision), random_embeddings(rng, 5, 32), path, SMALL[0])
    torch.testing.assert_close(logits[:, 1], 2 * logits[:, 0], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("path", ["few", "ragged"])
def test_an_empty_batch_has_empty_logits(path: str, rng: np.random.Generator) -> None:
    plan = random_plan(rng, [2, 1], 8)
    assert assert_close_to_truth(plan, random_embeddings(rng, 0, 8), path).shape == (0, 2)
    assert_close_to_truth(plan, random_embeddings(rng, 0, 8), None, expected="few")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_embeddings(dtype: torch.dtype, rng: np.random.Generator) -> None:
    plan = device_plan(random_plan(rng, [3, 2], 24).with_key_precision("fp16"), DEVICE)
    plain, adapted = (rows.to(dtype) for rows in tensors(random_embeddings(rng, 3, 24)))
    halves = cache_score.score_triton(plan, plain, adapted)[0]
    assert torch.equal(halves, cache_score.score_triton(plan, plain.float(), adapted.float())[0])
    strided = torch.stack([plain, adapted], dim=1)
    assert torch.equal(halves, cache_score.score_triton(plan, strided[:, 0], strided[:, 1])[0])


def test_queries_for_descriptors_may_begin_anywhere(rng: np.random.Generator) -> None:
    """Tensor descriptors take memory from a multiple of 16 bytes on; a caller's view may begin anywhere."""
    plan = device_plan(random_plan(rng, [3, 2], 16).with_key_precision("fp16"), DEVICE)
    rows = [one.half() for one in tensors(random_embeddings(rng, 3, 16))]
    shifted = [torch.cat([one.new_zeros(1), one.flatten()])[1:].view(3, 16) for one in rows]
    assert shifted[1].data_ptr() % 16 and shifted[1].is_contiguous()
    first, second = (
        cache_score.score_triton(plan, *given, **way("ragged-tma"), config=SMALL[0])[0] for given in (rows, shifted)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("path", ["few", "ragged-tma"])
def test_large_classes_are_cut_and_the_workspace_is_bounded(
    path: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, config = random_plan(rng, [75, 0, 33, 3, 2], 16), SMALL[0]
    embeddings = random_embeddings(rng, 21, 16)
    work = layout.items(device_plan(plan, DEVICE), config.block_n, 16)[0]
    assert work.n_slots == 5 + 3 and work.cut.tolist() == [[0, 0, 5], [2, 5, 8]]
    whole = assert_close_to_truth(plan, embeddings, path, config)
    monkeypatch.setattr(cache_score, "WORKSPACE_BYTES", 4 * work.n_slots * 16)
    assert torch.equal(whole, assert_close_to_truth(plan, embeddings, path, config))


@pytest.mark.parametrize("path", PATHS)
def test_equal_calls_give_equal_bits(path: str, rng: np.random.Generator) -> None:
    plan = device_plan(random_plan(rng, [8] * 3 if path.startswith("aligned") else [40, 3, 0, 9], 32), DEVICE)
    rows = tensors(random_embeddings(rng, 7, 32))
    first, second = (cache_score.score_triton(plan, *rows, **way(path), config=SMALL[0])[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_module_deals_its_keys_once(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator makes a DevicePlan at each call; layouts belong to the module's tensors."""
    computed = []
    for name in ("shots_of", "cut_items"):
        function = getattr(layout, name)
        monkeypatch.setattr(
            layout, name, lambda *args, function=function: (computed.append(function), function(*args))[1]
        )
    module = ScoringModule(random_plan(rng, [3, 0, 2], 16), "triton")
    rows = tensors(random_embeddings(rng, 4, 16))
    first = module(*rows)
    n_computed = len(computed)
    assert n_computed > 0 and torch.equal(module(*rows), first)
    assert len(computed) == n_computed


def test_a_first_scoring_cannot_be_recorded(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "is_recording", lambda device: True)
    plan = device_plan(random_plan(rng, [3, 0, 2], 16), DEVICE)
    with pytest.raises(RuntimeError, match="scored with Triton once before a CUDA graph records it"):
        cache_score.score_triton(plan, *tensors(random_embeddings(rng, 4, 16)))


def test_a_recording_may_not_upload_another_table(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan was scored, and a path or batch that needs another table is recorded: a copy from the host can't be."""
    plan = device_plan(random_plan(rng, [40, 1], 16), DEVICE)
    rows = tensors(random_embeddings(rng, 4, 16))
    scored = cache_score.score_triton(plan, *rows, path="ragged", config=SMALL[0])[0]
    monkeypatch.setattr(layout, "is_recording", lambda device: True)
    assert torch.equal(cache_score.score_triton(plan, *rows, path="ragged", config=SMALL[0])[0], scored)
    with pytest.raises(RuntimeError, match=r"uploads a table; score it once outside"):
        cache_score.score_triton(plan, *rows, path="ragged", config=SMALL[1])


def test_the_automatic_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(counts: list[int], batch: int, width: int = 8, tma: bool | None = None) -> tuple[str, int, bool]:
        keys = np.eye(1, width).repeat(sum(counts), axis=0)
        plan = ScoringPlan(len(counts), keys=keys, class_offsets=np.concatenate([[0], np.cumsum(counts)]))
        on_device = device_plan(plan.with_key_precision("fp16"), DEVICE)
        path, config, by_tma = cache_score.choose(on_device, batch, None, None, tma)
        return path, config.block_n, by_tma

    assert chosen([16] * 1000, 33) == ("aligned", 128, False)
    assert chosen([16] * 1000, 33, tma=True)[::2] == ("aligned", True)
    assert chosen([1] * 1000, 1024)[0] == "aligned"
    assert chosen([3] * 100, 1024)[0] == chosen([16, 15], 1024)[0] == chosen([0, 0, 1], 64)[0] == "ragged"
    assert chosen([1024] * 2, 1024)[0] == "ragged"
    assert chosen([16] * 100, 32) == ("few", 128, False)
    assert chosen([16], 1) == ("few", 16, False)  # few keys, smaller tiles
    assert chosen([3] * 100, 64, tma=True)[::2] == ("ragged", True)
    monkeypatch.setattr(cache_score, "has_tensor_memory_accelerator", lambda device: True)
    assert chosen([16] * 1000, 33) == ("aligned", 256, True) and chosen([16] * 1000, 32)[2] is False
    assert chosen([3] * 100, 64) == ("ragged", 128, False), "pointers take fewer instructions"
    assert chosen([16] * 100, 33, width=7) == ("aligned", 128, False)
    for batch, width in ((1, 8), (33, 7)):
        with pytest.raises(ValueError, match=f"for tensor descriptors, got {batch} queries, {width} channels"):
            chosen([16], batch, width, tma=True)


def test_an_unknown_path_is_refused(rng: np.random.Generator) -> None:
    plan = device_plan(random_plan(rng, [2, 1], 8), DEVICE)
    with pytest.raises(ValueError, match='expected path "few", "aligned" or "ragged", got "diagonal"'):
        cache_score.score_triton(plan, *tensors(random_embeddings(rng, 2, 8)), path="diagonal")
    with pytest.raises(ValueError, match=r'classes of equally many keys, .* for path "aligned"; take "ragged"'):
        cache_score.score_triton(plan, *tensors(random_embeddings(rng, 2, 8)), path="aligned")


@pytest.mark.parametrize("case", AT_THE_BOUNDS, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_constants_at_their_bounds(case: dict[str, float], precision: str, rng: np.random.Generator) -> None:
    plan = plan_at_a_bound(rng, case, precision)
    dense = plan.values is not None
    logits = assert_close_to_truth(
        plan, random_embeddings(rng, 9, 40), None if dense else "few", SMALL[0], expected="dense" if dense else None
    )
    assert torch.isfinite(logits).all()
