"""score(): execute a plan with the best backend for the embeddings' device and number."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Array, Embeddings
from iosr_fast.scoring import dispatch
from iosr_fast.scoring.dispatch import Backend
from iosr_fast.scoring.inputs import checked_inputs
from iosr_fast.scoring.lower import lower
from iosr_fast.scoring.plan import ScoringPlan


def score(plan: ScoringPlan, embeddings: Embeddings, impl: str = "auto", *, check: bool = True) -> Array:
    """Execute `plan` on a batch: logits of shape (B, C), float32. argmax over axis 1 gives the labels.

    Equals the formula of ScoringPlan (reference.py writes it out) without forming the (B, N) affinity or a one-hot
    matrix. Torch tensors give a tensor on their device; NumPy arrays and other objects with DLPack in CPU memory give a
    NumPy array. No gradients are computed.

    `impl` names a backend (`iosr-fast info` lists them); "auto" takes the best one for the embeddings' device and
    number, or the one named by the environment variable IOSR_FAST_IMPL. A backend for GPUs copies embeddings from the
    CPU to the GPU and the logits back. `check=False` skips the check of finiteness and norms, which reads each
    embedding once more and, on a GPU, waits for the result: CUDA graphs can't record that. They record a call without
    it after the first one of a plan.

    Raises IosrFastError if the embeddings don't fit the plan or aren't finite and of unit norm, or if no such backend
    exists; UnavailableError if it exists and can't run.

    >>> import numpy as np
    >>> from iosr_fast import Embeddings, ScoringPlan, score
    >>> plan = ScoringPlan(2, text=np.eye(2, 4), tau=100.0)
    >>> score(plan, Embeddings(np.eye(4, dtype=np.float32)[:1]))
    array([[100.,   0.]], dtype=float32)
    """
    return score_with_path(plan, embeddings, impl, check=check)[0]


def score_with_path(
    plan: ScoringPlan, embeddings: Embeddings, impl: str = "auto", *, check: bool = True
) -> tuple[Array, str]:
    """score(), and the path that computed the sums of affinities: "cpp/avx512", "triton/values", "torch/cuda",
    "reference"; "cpp/no-keys" where there are none."""
    inputs = checked_inputs(plan, embeddings, check)
    n_keys = 0 if plan.keys is None else len(plan.keys)
    backend = dispatch.choose(impl, inputs.device, len(inputs.embeddings), n_keys)
    if backend.tensors:
        return _with_tensors(plan, inputs.embeddings, inputs.device, inputs.torch, backend)
    if backend.name == "reference":
        from iosr_fast.scoring.reference import score_reference

        logits, path = score_reference(plan, inputs.embeddings).astype(np.float32), "reference"
    else:
        from iosr_fast import _C

        logits, path = _run(plan, inputs.embeddings, backend, _C.add_product)
    if inputs.torch:
        from iosr_fast.scoring.device_plan import as_tensor

        return as_tensor(logits), path
    return logits, path


def _run(plan: Any, embeddings: Embeddings, backend: Backend, add_product: Any) -> tuple[Array, str]:
    logits, queries = lower(plan, embeddings, add_product)
    if queries is None or not len(queries):
        return logits, f"{backend.name}/no-keys"
    return logits, import_module(backend.module).affinity_sums(plan, queries, logits)


def _with_tensors(
    plan: ScoringPlan, embeddings: Embeddings, device: str, from_torch: bool, backend: Backend
) -> tuple[Array, str]:
    import torch

    from iosr_fast.scoring.device_plan import as_tensor, device_plan
    from iosr_fast.scoring.half_plan import half_plan

    plain, adapted = embeddings.plain, embeddings.adapted
    if device == "cpu":
        place = "cpu" if "cpu" in dispatch.devices_of(backend) else "cuda"
        plain, adapted = (None if rows is None else as_tensor(rows).to(place) for rows in (plain, adapted))
    with torch.no_grad(), torch.cuda.device(plain.device if plain.is_cuda else -1):
        placed = device_plan(half_plan(plan) if plain.is_cuda else plan, plain.device)
        logits, path = _run(placed, Embeddings(plain, adapted), backend, placed.add_product)
    if device == "cuda":
        return logits, path
    return (logits.cpu() if from_torch else logits.cpu().numpy()), path
