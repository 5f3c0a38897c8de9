"""score_triton: execute a plan with Triton kernels, without the (B, N) affinity or a copy of the keys in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from iosr_fast.exceptions import IosrFastError
from iosr_fast.kernels import layout
from iosr_fast.kernels.affine import NO_AFFINE_TERMS, affine_arguments, affine_terms, contiguous
from iosr_fast.kernels.cache_kernels import cache_kernel, digits_kernel, merge_kernel
from iosr_fast.kernels.dense_values import dense_values
from iosr_fast.kernels.device import (
    PRECISION,
    WORKSPACE_BYTES,
    exponent_scale,
    gpu_name,
    has_tensor_memory_accelerator,
    multiprocessors,
    pointer,
)
from iosr_fast.kernels.launch import Config, config_for, load_of
from iosr_fast.scoring.device_plan import on_gpu
from iosr_fast.scoring.fields import EMBEDDINGS
from iosr_fast.scoring.torch_scorer import add_linear_term

if TYPE_CHECKING:
    from torch import Tensor

    from iosr_fast.scoring.device_plan import DevicePlan

PATHS = ("few", "aligned", "ragged")
_MERGE_BLOCK = 128


def score_triton(
    plan: DevicePlan,
    plain: Tensor,
    adapted: Tensor | None,
    *,
    path: str | None = None,
    config: Config | None = None,
    tma: bool | None = None,
) -> tuple[Tensor, str]:
    """logits[b, c] = tau * <plain[b], text[c]>
                 + alpha * sum over keys j of class c: weights[j] * exp(-beta * (1 - <query[b], keys[j]>))
                 + <feature[b], linear[c]> + bias[c]

    plain, adapted: (B, D) float32, float16 or bfloat16 on the plan's device, checked unit rows; adapted may be None if
    the plan doesn't read it. Returns logits (B, C) float32 and the path that computed the cache term:

    "triton/few"      up to 32 queries: all terms in one launch, one more if a class has more keys than a tile
    "triton/aligned"  tiles of whole classes that have equally many keys, a power of two
    "triton/ragged"   tiles of whole classes of any size; larger classes are cut into pieces, and their sums (at most 64
                      MB) added in order
    "triton/dense"    keys with values in place of classes: dense_values
    "triton/no-keys"  the plan has no cache term

    "aligned" ends in "-tma" where tensor descriptors load the tiles: compute capability 9.0 to 11.0, if rows of keys
    take a multiple of 16 bytes. There, a program sums many tiles and loads the next one meanwhile. "ragged" does so
    with `tma` only: by descriptors its tiles take more instructions than by pointers.

    The affine terms have float32's accuracy: float16 products of high and low parts; PyTorch adds a linear term over
    another feature than one embedding, which has another width. The cache term rounds queries to the keys' half type,
    or for int8 keys to 16 bits, and sums in float32. Equal calls give equal bits. `path`, `config` and `tma` override
    the automatic choices, for tests and tuning. Raises ValueError for another path, for any if the keys have values, or
    for a path or tensor descriptors that don't fit the plan; RuntimeError if a CUDA graph is recorded before the plan
    was scored once.
    Source: Tip-Adapter (Zhang et al., ECCV 2022), eq. 5-6; here one GEMM with a segmented sum in place of its second.
    """
    if path is not None and plan.values is not None:
        raise IosrFastError(f'expected no path for keys with values, got "{path}"')
    with on_gpu(plan.device):
        if plan.keys is None or plan.values is not None or not len(plain):
            logits = affine_terms(plan, plain, adapted)
            if plan.keys is None:
                return logits, "triton/no-keys"
            if plan.values is not None:
                _add_dense(plan, plan.query_rows(plain, adapted), logits, config)
                return logits, "triton/dense"
        path, config, tma = choose(plan, len(plain), path, config, tma)
        if len(plain):
            logits = _score_classes(plan, plain, adapted, path, config, tma)
    return logits, f"triton/{path}{'-tma' if tma else ''}"


def choose(
    plan: DevicePlan, batch: int, path: str | None, config: Config | None, tma: bool | None
) -> tuple[str, Config, bool]:
    """The path, its configuration, and whether tensor descriptors load tiles; the rules are score_triton's."""
    assert plan.keys is not None
    if path not in (None, *PATHS):
        raise IosrFastError(f'expected path "few", "aligned" or "ragged", got "{path}"')
    fits = plan.width * plan.keys.element_size() % 16 == 0 and plan.keys.data_ptr() % 16 == 0
    load = "few" if path == "few" else "many" if path else load_of(batch)
    if tma and (load == "few" or not fits):
        raise IosrFastError(
            "expected many queries and rows of keys of a multiple of 16 bytes for tensor descriptors, got "
            f"{batch} queries, {plan.width} channels and the path {path!r}"
        )
    by_tma = load == "many" and fits and has_tensor_memory_accelerator(plan.device) if tma is None else tma
    precision = PRECISION[plan.keys.dtype]

    def default(path: str) -> Config:
        return config_for(gpu_name(plan.device), f"{path}-tma" if by_tma else path, precision, load)

    if path is None:
        aligned = load == "many" and layout.shots(plan, (config or default("aligned")).block_n)
        path = "few" if load == "few" else "aligned" if aligned else "ragged"
    if tma is None and path == "ragged":
        by_tma = False
    if config is None:
        config = default(path)
        # A few keys are dealt to all multiprocessors.
        while load == "few" and config.block_n > 16 and len(plan.keys) < config.block_n * multiprocessors(plan.device):
            config = replace(config, block_n=config.block_n // 2)
    if path == "aligned" and not layout.shots(plan, config.block_n):
        raise IosrFastError(
            f'expected classes of equally many keys, a power of two of at most {config.block_n}, for path "aligned"; '
            'take "ragged"'
        )
    return path, config, by_tma


def _add_dense(plan: DevicePlan, query: Tensor, logits: Tensor, config: Config | None) -> None:
    assert plan.keys is not None and plan.values is not None
    rest = {"beta": plan.beta, "weights": plan.weights, "key_scales": plan.key_scales, "config": config}
    logits.add_(dense_values(query, plan.keys, plan.values, **rest), alpha=plan.alpha)


@dataclass(frozen=True)
class _Work:
    """How a plan's keys are dealt to programs: n_items of at most block_n keys, `table` (unread with `shots`), and the
    classes in pieces, `cut`, whose sums take n_slots rows."""

    n_items: int
    block_c: int
    shots: int = 0
    n_slots: int = 0
    table: Tensor | None = None
    cut: Tensor | None = None


def _work(plan: DevicePlan, path: str, block_n: int) -> _Work:
    assert plan.keys is not None
    if path == "aligned":
        shots = layout.shots(plan, block_n)
        return _Work(triton.cdiv(plan.n_classes, block_n // shots), block_n // shots, shots)
    block_c = layout.block_classes(len(plan.keys), plan.n_classes, block_n)
    items, table, cut = layout.items(plan, block_n, block_c)
    return _Work(len(items.table), block_c, 0, items.n_slots, table, cut)


def _score_classes(
    plan: DevicePlan, plain: Tensor, adapted: Tensor | None, path: str, config: Config, tma: bool
) -> Tensor:
    """All terms of a plan whose keys have classes, for at least one query."""
    few, n_queries = path == "few", len(plain)
    if few:
        logits = torch.empty((n_queries, plan.n_classes), dtype=torch.float32, device=plan.device)
        affine = affine_arguments(plan, plain, adapted, logits, few=True)
    else:
        logits = affine_terms(plan, plain, adapted)
        affine = NO_AFFINE_TERMS | dict.fromkeys(("plain", "text", "feature", "linear", "bias"), logits)
    query, work = _queries(plan, plan.query_rows(plain, adapted), few), _work(plan, path, config.block_n)
    # Whole blocks of queries at a time, as many as the workspace holds.
    blocks = max(1, WORKSPACE_BYTES // (4 * max(1, work.n_slots) * config.block_b))
    step = min(n_queries, blocks * config.block_b)
    partial = torch.empty((work.n_slots, step), dtype=torch.float32, device=plan.device)
    for first in range(0, n_queries, step):
        part = slice(first, first + step)
        terms = affine | {name: affine[name][part] for name in ("plain", "feature")}
        _launch(plan, query[part], logits[part], partial, terms, work, config, few=few, tma=tma)
    if few and plan.linear is not None and plan.feature not in EMBEDDINGS:
        add_linear_term(plan, plain, adapted, logits)
    return logits


def _queries(plan: DevicePlan, query: Tensor, few: bool) -> Tensor:
    """Queries in the keys' half type. digits() rounds those for int8 keys, and cache_kernel a few; to bfloat16 not,
    because Triton's interpreter cuts bits off instead."""
    assert plan.keys is not None
    if plan.keys.dtype == torch.int8 or (few and plan.keys.dtype != torch.bfloat16):
        return contiguous(query)
    return query.to(plan.keys.dtype).contiguous()


def _launch(
    plan: DevicePlan,
    query: Tensor,
    logits: Tensor,
    partial: Tensor,
    affine: dict[str, Any],
    work: _Work,
    config: Config,
    *,
    few: bool,
    tma: bool,
) -> None:
    keys, n_queries, scales = plan.keys, len(query), logits
    assert keys is not None
    if keys.dtype == torch.int8:
        query, scales = digits(query)
    n_tiles = triton.cdiv(n_queries, config.block_b) * work.n_items
    cache_kernel[min(n_tiles, config.programs * multiprocessors(plan.device)) if tma else n_tiles,](
        query=_descriptor(query, config.block_b, config.block_d) if tma else query,
        query_scales=scales,
        keys=_descriptor(keys, config.block_n, config.block_d) if tma else keys,
        key_scales=pointer(plan.key_scales, logits),
        weights=pointer(plan.weights, logits),
        class_offsets=plan.class_offsets,
        items=pointer(work.table, logits),
        partial=partial if work.n_slots else logits,
        logits=logits,
        n_queries=n_queries,
        n_keys=len(keys),
        n_classes=plan.n_classes,
        n_items=work.n_items,
        scale=exponent_scale(plan.beta),
        alpha=plan.alpha,
        WIDTH=plan.width,
        SHOTS=work.shots,
        SPLIT=work.n_slots > 0,
        FEW=few,
        TMA=tma,
        HAS_WEIGHTS=plan.weights is not None,
        HAS_SCALES=plan.key_scales is not None,
        BLOCK_B=config.block_b,
        BLOCK_N=config.block_n,
        BLOCK_D=config.block_d,
        BLOCK_C=work.block_c,
        **affine,
        **config.options(),
    )
    if work.cut is not None and work.n_slots:
        merge_kernel[len(work.cut), triton.cdiv(n_queries, _MERGE_BLOCK)](
            partial, work.cut, logits, n_queries, plan.n_classes, plan.alpha, BLOCK_B=_MERGE_BLOCK
        )


def digits(query: Tensor) -> tuple[Tensor, Tensor]:
    """(2 B, D) int8 and (B,) float32: the two digits and the scales of queries for int8 keys (digits_kernel)."""
    n_queries, width = query.shape
    both = torch.empty((2 * n_queries, width), dtype=torch.int8, device=query.device)
    scales = torch.empty(n_queries, dtype=torch.float32, device=query.device)
    digits_kernel[n_queries,](query, both, scales, n_queries, WIDTH=width, BLOCK_D=triton.next_power_of_2(width))
    return both, scales


def _descriptor(rows: Tensor, block: int, channels: int) -> TensorDescriptor:
    """Of memory that begins at a multiple of 16 bytes: of a copy for rows that don't."""
    return TensorDescriptor.from_tensor(rows if rows.data_ptr() % 16 == 0 else rows.clone(), [block, channels])
