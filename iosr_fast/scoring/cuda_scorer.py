"""Scoring with the CUDA C++ kernels of csrc/cuda, for GPUs of compute capability 8.0 and newer, without Triton."""

from __future__ import annotations

import functools
import importlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from iosr_fast.exceptions import IosrFastError
from iosr_fast.scoring.cuda_layout import PART_SCALE_UP, ClassLayout, class_layout, padded, query_parts, split_rows
from iosr_fast.scoring.device_plan import cached, on_gpu
from iosr_fast.scoring.fields import EMBEDDINGS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from iosr_fast.scoring.device_plan import DevicePlan

# Bytes of class sums to be merged; a batch that needs more is scored in slices.
_WORKSPACE = 64 << 20


@functools.cache
def _module() -> Any:
    return importlib.import_module("iosr_fast._C_cuda")


def score_cuda(plan: DevicePlan, plain: Tensor, adapted: Tensor | None) -> tuple[Tensor, str]:
    """logits[b, c] = tau * <plain[b], text[c]>
                 + alpha * sum over keys j of class c: weights[j] * exp(-beta * (1 - <query[b], keys[j]>))
                 + <feature[b], linear[c]> + bias[c]

    plain, adapted: (B, D) float32, float16 or bfloat16 on the plan's device, checked unit rows; adapted may be None if
    the plan doesn't read it. Returns logits (B, C) float32 and the path of the cache term:

    "cuda/mma"        half or int8 keys on the tensor cores, sums in float32; int8 is converted to float16 in registers
    "cuda/mma-split"  the same for queries with more bits than the keys: they are a sum of 2 or 3 half matrices
    "cuda/fp32"       float32 keys, by fused multiply-adds
    "cuda/dense-torch"  keys with values in place of classes, which have no kernel: torch_scorer adds the term
    "cuda/linear", "cuda/linear-mma"  the plan has no cache term; queries are float32, or half
    "cuda/empty"      there is no query

    Paths of kernels end in "-small" for up to 16 queries. Neither the (B, N) affinity nor a one-hot matrix is stored
    in memory (except tiles of the affinity with "dense-torch"). Sums of classes that span several runs of 64 keys are
    stored, in at most 64 MB, and merged in order: equal calls give equal bits. The linear terms keep float32's
    precision: float32 queries, including those that a reducer has converted, take fused multiply-adds, half ones the
    tensor cores ("cuda/linear-mma"). PyTorch adds a linear term over another feature than one embedding.

    The first call for a plan reads back whether classes are empty or large and how large its rows are, and caches that;
    later calls neither wait for the device nor read from it. A CUDA graph may record even the first call, which then
    caches nothing, assumes empty and large classes, and computes the linear terms in float32.
    Raises RuntimeError with CUDA's message if a launch fails.
    Source: Tip-Adapter (Zhang et al., ECCV 2022), eq. 5-6; here one GEMM with a segmented sum in place of its second.
    """
    import torch

    from iosr_fast.scoring.torch_scorer import add_cache_term, add_linear_term

    logits = torch.empty((len(plain), plan.n_classes), dtype=torch.float32, device=plan.device)
    if not len(plain):
        return logits, "cuda/empty"
    with on_gpu(plan.device):
        path = _run_kernels(plan, plain, adapted, logits)
    if plan.linear is not None and plan.feature not in EMBEDDINGS:
        add_linear_term(plan, plain, adapted, logits)
    if plan.values is not None:
        add_cache_term(plan, plain, adapted, logits)
        path = "dense-torch"
    return logits, f"cuda/{path}"


def _run_kernels(plan: DevicePlan, plain: Tensor, adapted: Tensor | None, logits: Tensor) -> str:
    module = _module()
    device, stream = _place(plan.device)
    call = {"device": device, "stream": stream, "n_classes": plan.n_classes, "n_queries": len(plain)}
    path, layout = "", None
    if plan.class_offsets is not None:
        layout = class_layout(plan, module.chunk)
        path = _cache_term(module, plan, layout, plan.query_rows(plain, adapted), logits, call)
    terms = _linear_terms(plan, plain, adapted)
    if terms.operands or plan.bias is not None or layout is None or layout.has_empty:
        linear_path: str = module.linear(
            **call,
            precision=terms.precision,
            operands=terms.operands,
            row_parts=terms.row_parts,
            part_scale=1.0 / PART_SCALE_UP,
            bias=_address(plan.bias),
            class_offsets=None if layout is None else _address(plan.class_offsets),
            logits=logits.data_ptr(),
        )
        path = path or linear_path
    return path


def _cache_term(
    module: Any, plan: DevicePlan, layout: ClassLayout, query: Tensor, logits: Tensor, call: dict[str, int]
) -> str:
    import torch

    assert plan.keys is not None
    keys = _padded(plan.keys)
    queries, parts, part_scale = query_parts(query, plan.keys.dtype)
    n_slots = 2 * -(-len(keys) // module.chunk)
    n_slices = -(-4 * n_slots * len(queries) // _WORKSPACE) if layout.has_spanning else 1
    step = -(-len(queries) // n_slices)
    edges = None
    if layout.has_spanning:
        edges = torch.empty((n_slots, step), dtype=torch.float32, device=plan.device)
    path = ""
    for begin in range(0, len(queries), step):
        rows = queries[begin : begin + step]
        path = module.cache(
            **{**call, "n_queries": len(rows)},
            key_precision=_precision(plan.keys.dtype),
            n_keys=len(keys),
            queries=rows.data_ptr(),
            query_bytes=_row_bytes(queries),
            query_parts=parts,
            part_scale=part_scale,
            keys=keys.data_ptr(),
            key_bytes=_row_bytes(keys),
            key_class=layout.key_class.data_ptr(),
            class_offsets=_address(plan.class_offsets),
            weights=_address(plan.weights),
            key_scales=_address(plan.key_scales),
            scale=plan.beta * math.log2(math.e),
            alpha=plan.alpha,
            edges=_address(edges),
            logits=logits[begin:].data_ptr(),
        )
    return path


@dataclass(frozen=True)
class _LinearTerms:
    """The arguments of module.linear, and the tensors that must outlive the launch."""

    precision: str
    row_parts: int
    operands: list[tuple[int, int, int, int, float]]
    tensors: list[Tensor]


def _linear_terms(plan: DevicePlan, plain: Tensor, adapted: Tensor | None) -> _LinearTerms:
    """The text and linear terms. Half queries multiply rows that are split into two float16 matrices, on the tensor
    cores; float32 queries multiply the rows.

    A linear term over another feature than one embedding has another width and is left out.
    """
    import torch

    terms = [] if plan.text is None else [(plan.text, plain, plan.tau)]
    if plan.linear is not None and plan.feature in EMBEDDINGS:
        terms.append((plan.linear, plan.feature_rows(plain, adapted), 1.0))
    narrow = all(queries.dtype != torch.float32 for _, queries, _ in terms)
    split = [cached(rows, "split", functools.partial(split_rows, rows)) for rows, _, _ in terms] if narrow else []
    half = bool(split) and None not in split
    converted: dict[int, Tensor] = {}
    operands, tensors = [], []
    for index, (rows, queries, factor) in enumerate(terms):
        if id(queries) not in converted:
            converted[id(queries)] = padded(queries.half() if half else queries.float())
        left, parts = converted[id(queries)], split[index] if half else None
        right, scale = (_padded(rows), 1.0) if parts is None else parts
        operands.append((left.data_ptr(), _row_bytes(left), right.data_ptr(), _row_bytes(right), factor * scale))
        tensors += [left, right]
    return _LinearTerms("fp16" if half else "fp32", 2 if half else 1, operands, tensors)


def _padded(rows: Tensor) -> Tensor:
    return cached(rows, "padded", lambda: padded(rows))


def _row_bytes(rows: Tensor) -> int:
    return rows.shape[1] * rows.element_size()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _precision(dtype: torch.dtype) -> str:
    import torch

    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "int8"}
    if dtype not in names:
        raise IosrFastError(f"expected keys of float32, float16, bfloat16 or int8, got {dtype}")
    return names[dtype]


def _place(device: torch.device) -> tuple[int, int]:
    """The device's index and the handle of its current stream."""
    import torch

    if device.type != "cuda":
        raise IosrFastError(
            f"expected a plan on a CUDA device, got one on {device}; device_plan(plan, 'cuda') moves it"
        )
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream
