"""What PyTorch does without a kernel of ours; whatever depends on the plan alone is computed outside the timed part.

papers-formula  a cosine GEMM, exp, and a GEMM with the one-hot matrix, as in the public code; classes alone
eager-best      one GEMM, exp in place, and a segment sum or, with values, another GEMM, into buffers that are reused
compiled-best   the same in one function, compiled by torch.compile; of classes on a GPU alone, all of one size
torch-fp32      the product of queries and keys alone, in the faster of its two orientations: no exp, no sums, no text.
                Nothing that PyTorch does in float32 can be faster than this.
torch-mm        the same in float16, on a GPU alone
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from benchmarks.devices import Call, Device
from benchmarks.papers import papers_logits
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.scoring.device_plan import as_tensor
from iosr_fast.scoring.plan import ScoringPlan

PRODUCTS = ("torch-fp32", "torch-mm")  # which return no logits
# One-hot matrix and affinity of the papers' formula in float32; above, the formula is left out.
PAPERS_LIMIT_BYTES, PAPERS_LIMIT_GPU_BYTES = 2e9, 32e9


def torch_rivals(plan: ScoringPlan, embeddings: Embeddings, device: Device) -> dict[str, Call]:
    """name -> call that returns logits (B, C) on `device`; those in PRODUCTS return the (B, N) cosines.

    `plan` has float32 keys and reads adapted embeddings in the cache term. On a GPU everything but the text term is in
    float16, as the papers' code runs there, and torch-fp32 is in float32 without TF32, PyTorch's default.
    """
    assert plan.text is not None and plan.keys is not None
    kind = torch.float16 if device.is_gpu else torch.float32
    keys32 = as_tensor(plan.keys).to(device.name)  # may be gigabytes: on the CPU they are shared, not copied
    plain, query32, text = (
        torch.from_numpy(np.array(array)).to(device.name) for array in (embeddings.plain, embeddings.adapted, plan.text)
    )
    if plan.linear is not None:  # one product with texts and weights
        weights = torch.from_numpy(np.array(plan.linear)).to(device.name) / plan.tau
        plain, text = torch.cat([plain, query32], 1), weights + torch.nn.functional.pad(text, (0, plan.width))
    keys, query = keys32.to(kind), query32.to(kind)
    if plan.values is None:
        rivals = _with_classes(plan, plain, query, text, keys)
    else:
        rivals = _with_values(plan, plain, query, text, keys)
    rivals["torch-fp32"] = _product(keys32, query32, device)
    if device.is_gpu:
        rivals["torch-mm"] = _product(keys, query, device)
    return {name: torch.inference_mode()(call) for name, call in rivals.items()}


def _with_classes(
    plan: ScoringPlan, plain: torch.Tensor, query: torch.Tensor, text: torch.Tensor, keys: torch.Tensor
) -> dict[str, Call]:
    assert plan.class_offsets is not None
    counts = np.diff(plan.class_offsets)
    lengths = torch.from_numpy(counts).to(keys.device)
    affinity = torch.empty(len(keys), len(query), dtype=keys.dtype, device=keys.device)
    logits = torch.empty(len(query), plan.n_classes, device=keys.device)

    def eager_best() -> torch.Tensor:
        torch.mm(keys, query.T, out=affinity)
        affinity.sub_(1.0).mul_(plan.beta).exp_()
        sums = torch.segment_reduce(affinity, "sum", lengths=lengths, axis=0, unsafe=True)
        torch.mm(plain, text.T, out=logits)
        return logits.mul_(plan.tau).add_(sums.T, alpha=plan.alpha)

    rivals: dict[str, Call] = {"eager-best": eager_best}
    limit_bytes = PAPERS_LIMIT_GPU_BYTES if keys.is_cuda else PAPERS_LIMIT_BYTES
    if 4.0 * len(keys) * (plan.n_classes + len(query)) <= limit_bytes:
        labels = torch.repeat_interleave(torch.arange(plan.n_classes, device=keys.device), lengths)
        onehot = torch.zeros(len(keys), plan.n_classes, dtype=keys.dtype, device=keys.device)
        onehot.scatter_(1, labels[:, None], 1.0)
        scales = (plan.tau, plan.alpha, plan.beta)
        rivals["papers-formula"] = partial(papers_logits, plain, query, text, keys, onehot, scales)
    if keys.is_cuda and len(set(counts.tolist())) == 1:  # a compiler fuses a sum of equal segments with exp
        shape = (len(query), plan.n_classes, int(counts[0]))

        def fused(query: torch.Tensor, keys: torch.Tensor, plain: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            sums = ((query @ keys.T).float() * plan.beta - plan.beta).exp().view(shape).sum(-1)
            return plan.tau * plain @ text.T + plan.alpha * sums

        rivals["compiled-best"] = partial(_compiled(fused), query, keys, plain, text)
    return rivals


def _with_values(
    plan: ScoringPlan, plain: torch.Tensor, query: torch.Tensor, text: torch.Tensor, keys: torch.Tensor
) -> dict[str, Call]:
    values = as_tensor(plan.values).to(keys.device, keys.dtype)  # type: ignore[arg-type]
    affinity = torch.empty(len(query), len(keys), dtype=keys.dtype, device=keys.device)

    def eager_best() -> torch.Tensor:
        torch.mm(query, keys.T, out=affinity)
        affinity.sub_(1.0).mul_(plan.beta).exp_()
        logits = torch.mm(plain, text.T).mul_(plan.tau)
        if values.dtype == torch.float32:
            return logits.addmm_(affinity, values, alpha=plan.alpha)
        return logits.add_(affinity @ values, alpha=plan.alpha)

    def whole(
        query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, plain: torch.Tensor, text: torch.Tensor
    ) -> torch.Tensor:
        sums = (query @ keys.T * plan.beta - plan.beta).exp() @ values
        return plan.tau * plain @ text.T + plan.alpha * sums

    compiled = partial(_compiled(whole), query, keys, values, plain, text)
    return {"eager-best": eager_best, "compiled-best": compiled}


def _compiled(function: Call) -> Call:
    compiled: Call = torch.compile(function, fullgraph=True, dynamic=False)
    return compiled


def _product(keys: torch.Tensor, query: torch.Tensor, device: Device) -> Call:
    by_key = torch.empty(len(keys), len(query), dtype=keys.dtype, device=keys.device)
    by_query = torch.empty(len(query), len(keys), dtype=keys.dtype, device=keys.device)
    calls: dict[str, Call] = {
        "keys first": lambda: torch.mm(keys, query.T, out=by_key).T,
        "queries first": lambda: torch.mm(query, keys.T, out=by_query),
    }
    return calls[device.fastest(calls)]
