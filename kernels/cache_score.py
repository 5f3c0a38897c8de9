"""score_triton: execute a plan with Triton kernels, without the (B, N) affinity or a copy of the keys in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from iosr_fast.exceptions import IosrFastError
from iosr_fast.kernels import layout
from iosr_fast.kernels.cache_kernels import affine_kernel, aligned_kernel, merge_kernel, ragged_kernel
from iosr_fast.kernels.dense_values import dense_values
from iosr_fast.kernels.device import (
    PRECISION,
    QUERY_DTYPE,
    WORKSPACE_BYTES,
    exponent_scale,
    gpu_name,
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

# The aligned path is faster than the ragged one as long as missing shots cost at most this factor more work.
ALIGNED_OVERHEAD = 1.25
_MERGE_BLOCK = 128


def score_triton(
    plan: DevicePlan,
    plain: Tensor,
    adapted: Tensor | None,
    *,
    path: str | None = None,
    config: Config | None = None,
) -> tuple[Tensor, str]:
    """logits[b, c] = tau * <plain[b], text[c]>
                 + alpha * sum over keys j of class c: weights[j] * exp(-beta * (1 - <query[b], keys[j]>))
                 + <feature[b], linear[c]> + bias[c]

    plain, adapted: (B, D) float32, float16 or bfloat16 on the plan's device, checked unit rows; adapted may be None if
    the plan doesn't read it. Returns logits (B, C) float32 and the path that computed the cache term:

    "triton/aligned"  tiles of whole classes, all padded to the same number of keys; chosen if that takes at most 1.25
                      times the tiles of the ragged path
    "triton/ragged"   work items of whole classes of any size
    "triton/split"    large classes are also split into pieces, and partial sums (at most 64 MB) are added in order;
                      chosen if the longest class would occupy one multiprocessor after the others have finished
    "triton/dense"    keys with values in place of classes: dense_values
    "triton/no-keys"  the plan has no cache term

    The affine terms are computed in float32 (3xTF32); PyTorch adds a linear term over another feature than one
    embedding, which has another width. The cache term rounds queries to the keys' half type (float16 for int8) and sums
    in float32. Equal calls give equal bits. `path` ("aligned", "ragged" or "split") and `config` override the automatic
    choices, for tests and tuning. Raises ValueError for another path, or for any if the keys have values.
    Source: Tip-Adapter (Zhang et al., ECCV 2022), eq. 5-6; here one GEMM with a segmented sum in place of its second.
    """
    with on_gpu(plan.device):
        logits = affine_terms(plan, plain, adapted)
        if plan.keys is None:
            return logits, "triton/no-keys"
        if plan.values is not None:
            if path is not None:
                raise IosrFastError(f'expected no path for keys with values, got "{path}"')
            _add_dense(plan, plan.query_rows(plain, adapted), logits, config)
            return logits, "triton/dense"
        precision = PRECISION[plan.keys.dtype]
        if path is None:
            path = choose_path(plan, len(plain), gpu_name(plan.device), multiprocessors(plan.device))
        elif path not in ("aligned", "ragged", "split"):
            raise IosrFastError(f'expected path "aligned", "ragged" or "split", got "{path}"')
        if len(plain):
            config = config or config_for(gpu_name(plan.device), path, precision, load_of(len(plain)))
            query = plan.query_rows(plain, adapted).to(QUERY_DTYPE[precision]).contiguous()
            if path == "aligned":
                _add_aligned(plan, query, logits, config)
            else:
                _add_items(plan, query, logits, config, split=path == "split")
    return logits, f"triton/{path}"


def choose_path(plan: DevicePlan, batch: int, gpu: str, n_multiprocessors: int) -> str:
    """ "aligned", "ragged" or "split" for a plan with keys and a batch of queries; the rules are score_triton's."""
    assert plan.keys is not None
    precision, load = PRECISION[plan.keys.dtype], load_of(batch)
    tile, ragged_tile = (config_for(gpu, path, precision, load) for path in ("aligned", "ragged"))
    aligned = layout.aligned(plan, tile.block_n)
    ragged = layout.items(plan, ragged_tile.block_n, ragged_tile.block_c)
    cheap = aligned.tiles * tile.block_n <= ALIGNED_OVERHEAD * ragged.tiles * ragged_tile.block_n
    path, work, config = ("aligned", aligned, tile) if cheap else ("ragged", ragged, ragged_tile)
    fair_share = -(-work.tiles * -(-batch // config.block_b) // n_multiprocessors)
    return "split" if work.longest > 2 * max(fair_share, 1) else path


def piece_keys(plan: DevicePlan, batch: int, config: Config, n_multiprocessors: int) -> int:
    """Keys of a piece on the split path: a multiprocessor's fair share, rounded up to a power of two of tiles, so that
    few layouts are computed."""
    assert plan.keys is not None
    work = len(plan.keys) * -(-batch // config.block_b)
    tiles = max(1, work // (config.block_n * n_multiprocessors))
    return config.block_n * (1 << (tiles - 1).bit_length())


def affine_terms(plan: DevicePlan, plain: Tensor, adapted: Tensor | None, config: Config | None = None) -> Tensor:
    """tau * plain @ text' + feature @ linear' + bias without missing terms: (B, C) float32."""
    n_queries, n_classes = len(plain), plan.n_classes
    if not n_queries or (plan.text is None and plan.linear is None and plan.bias is None):
        return torch.zeros((n_queries, n_classes), dtype=torch.float32, device=plan.device)
    logits = torch.empty((n_queries, n_classes), dtype=torch.float32, device=plan.device)
    # The kernel expects rows as wide as an embedding.
    linear = plan.linear if plan.feature in EMBEDDINGS else None
    rows, feature = plain.float().contiguous(), plain
    if linear is not None:
        feature = plan.feature_rows(plain, adapted)
    config = config or config_for(gpu_name(plan.device), "affine", "fp32", load_of(n_queries))
    affine_kernel[_blocks(n_queries, config) * -(-n_classes // config.block_n),](
        rows,
        pointer(plan.text, rows),
        rows if feature is plain else feature.float().contiguous(),
        pointer(linear, rows),
        pointer(plan.bias, rows),
        logits,
        n_queries,
        n_classes,
        plan.tau,
        WIDTH=plan.width,
        HAS_TEXT=plan.text is not None,
        HAS_LINEAR=linear is not None,
        HAS_BIAS=plan.bias is not None,
        **config.meta(),
    )
    if plan.linear is not None and linear is None:
        add_linear_term(plan, plain, adapted, logits)
    return logits


def _add_dense(plan: DevicePlan, query: Tensor, logits: Tensor, config: Config | None) -> None:
    assert plan.keys is not None and plan.values is not None
    rest = {"beta": plan.beta, "weights": plan.weights, "key_scales": plan.key_scales, "config": config}
    logits.add_(dense_values(query, plan.keys, plan.values, **rest), alpha=plan.alpha)


def _add_aligned(plan: DevicePlan, query: Tensor, logits: Tensor, config: Config) -> None:
    shots = layout.aligned(plan, config.block_n).shots
    columns = -(-plan.n_classes // (config.block_n // shots))
    aligned_kernel[_blocks(len(query), config) * columns,](
        query,
        plan.keys,
        pointer(plan.key_scales, logits),
        plan.class_offsets,
        pointer(plan.weights, logits),
        logits,
        len(query),
        plan.n_classes,
        exponent_scale(plan.beta),
        plan.alpha,
        WIDTH=plan.width,
        SHOTS=shots,
        **_has(plan),
        **config.meta(),
    )


def _add_items(plan: DevicePlan, query: Tensor, logits: Tensor, config: Config, *, split: bool) -> None:
    piece = piece_keys(plan, len(query), config, multiprocessors(plan.device)) if split else None
    shape = (plan, config.block_n, config.block_c, piece)
    work = layout.items(*shape)
    table, cut = layout.tables(*shape)
    # Whole blocks of queries at a time, as many as the workspace holds.
    blocks = max(1, WORKSPACE_BYTES // (4 * max(1, work.n_slots) * config.block_b))
    rows = min(len(query), blocks * config.block_b)
    partial = torch.empty((work.n_slots, rows), dtype=torch.float32, device=plan.device) if work.n_slots else logits
    for first in range(0, len(query), rows):
        block, out = query[first : first + rows], logits[first : first + rows]
        ragged_kernel[_blocks(len(block), config) * len(work.table),](
            block,
            plan.keys,
            pointer(plan.key_scales, logits),
            plan.class_offsets,
            pointer(plan.weights, logits),
            out,
            table,
            partial,
            len(block),
            plan.n_classes,
            len(work.table),
            exponent_scale(plan.beta),
            plan.alpha,
            WIDTH=plan.width,
            SPLIT=work.n_slots > 0,
            **_has(plan),
            **config.meta("block_c"),
        )
        if work.n_slots:
            merge_kernel[len(work.cut), -(-len(block) // _MERGE_BLOCK)](
                partial, cut, out, len(block), plan.n_classes, plan.alpha, BLOCK_B=_MERGE_BLOCK
            )


def _has(plan: DevicePlan) -> dict[str, Any]:
    return {"HAS_WEIGHTS": plan.weights is not None, "HAS_SCALES": plan.key_scales is not None}


def _blocks(n_queries: int, config: Config) -> int:
    return -(-n_queries // config.block_b)
