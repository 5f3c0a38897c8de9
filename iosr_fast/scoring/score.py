"""score(): execute a plan with the best implementation for the embeddings' device."""

from __future__ import annotations

from iosr_fast.encoders.encoder import Array, Embeddings
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.scorer import Scorer


def score(plan: ScoringPlan, embeddings: Embeddings, impl: str = "auto", *, check: bool = True) -> Array:
    """Execute `plan` on a batch: logits of shape (B, C), float32. argmax over axis 1 gives the labels.

    Equals the formula of ScoringPlan (reference.py writes it out) without forming the (B, N) affinity or a one-hot
    matrix. Torch tensors give a tensor on their device; NumPy arrays and other objects with DLPack in CPU memory give a
    NumPy array. No gradients are computed.

    `impl` names an implementation (`iosr-fast info` lists them); "auto" takes the best one for the embeddings' device,
    or the one named by the environment variable IOSR_FAST_IMPL. An implementation for GPUs copies embeddings from the
    CPU to the GPU and the logits back. `check=False` skips the check of finiteness and norms, which reads each
    embedding once more and, on a GPU, waits for the result: CUDA graphs can't record that.

    `Scorer(plan)` (scoring/scorer.py) does the same for many batches; it makes the choice once.

    Raises IosrFastError if the embeddings don't fit the plan or aren't finite and of unit norm, or if no such
    implementation exists; UnavailableError if it exists and can't run.

    >>> import numpy as np
    >>> from iosr_fast import Embeddings, ScoringPlan, score
    >>> plan = ScoringPlan(2, text=np.eye(2, 4), tau=100.0)
    >>> score(plan, Embeddings(np.eye(4, dtype=np.float32)[:1]))
    array([[100.,   0.]], dtype=float32)
    """
    return Scorer(plan, impl)(embeddings, check=check)


def score_with_path(
    plan: ScoringPlan, embeddings: Embeddings, impl: str = "auto", *, check: bool = True
) -> tuple[Array, str]:
    """score(), and the path that computed it: "numpy", "cpp/scalar", "torch/cuda", "reference"."""
    return Scorer(plan, impl).with_path(embeddings, check=check)
