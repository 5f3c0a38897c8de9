"""Scorer: a plan bound to an implementation, for many batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iosr_fast.scoring import dispatch
from iosr_fast.scoring.cpp_scorer import bound_plan
from iosr_fast.scoring.inputs import ScoringInputs, scoring_inputs

if TYPE_CHECKING:
    from iosr_fast.encoders.encoder import Array, Embeddings
    from iosr_fast.scoring.plan import ScoringPlan


class Scorer:
    """`scorer(embeddings)` equals `score(plan, embeddings, impl)`; the implementation is chosen and the plan's arrays
    are checked once, so that a call of one query costs a few microseconds beside the arithmetic.

    Immutable, and safe to call from several threads. Raises IosrFastError for an unknown implementation,
    UnavailableError for one that can't run here; a call raises what `score` does.

    >>> import numpy as np
    >>> from iosr_fast import Embeddings, ScoringPlan
    >>> from iosr_fast.scoring.scorer import Scorer
    >>> scorer = Scorer(ScoringPlan(2, text=np.eye(2, 4), tau=100.0))
    >>> scorer(Embeddings(np.eye(4, dtype=np.float32)[:1]))
    array([[100.,   0.]], dtype=float32)
    """

    __slots__ = ("_bound", "impl", "plan")

    def __init__(self, plan: ScoringPlan, impl: str = "auto") -> None:
        native = dispatch.choose(impl, "cpu").name == "cpp" and plan.reducer is None
        self.plan = plan
        self.impl = impl
        self._bound = bound_plan(plan) if native else None

    def __call__(self, embeddings: Embeddings, *, check: bool = True) -> Array:
        """Logits (B, C), float32. `check=False` skips finiteness and norms, never shapes."""
        return self.with_path(embeddings, check=check)[0]

    def with_path(self, embeddings: Embeddings, *, check: bool = True) -> tuple[Array, str]:
        """The logits, and the path that computed them: "numpy", "cpp/scalar", "torch/cuda", "reference"."""
        if self._bound is not None:
            scored = self._bound(self.plan, embeddings, check)
            if scored is not None:
                return scored[0], f"cpp/{scored[1]}"
        # Other embeddings than float32 arrays, and those that are refused with a message.
        inputs = scoring_inputs(self.plan, embeddings, check)
        entry = dispatch.choose(self.impl, inputs.device)
        if entry.kind == "tensors":
            return self._with_tensors(inputs, entry)
        logits, path = entry.load()(self.plan, inputs.embeddings)
        if inputs.torch:
            from iosr_fast.scoring.device_plan import as_tensor

            return as_tensor(logits), path
        return logits, path

    def _with_tensors(self, inputs: ScoringInputs, entry: dispatch.Implementation) -> tuple[Array, str]:
        from iosr_fast.scoring.device_plan import as_tensor, device_plan

        plain, adapted = inputs.embeddings.plain, inputs.embeddings.adapted
        if inputs.device == "cuda":
            return entry.load()(device_plan(self.plan, plain.device), plain, adapted)
        on_device = device_plan(self.plan, "cpu" if "cpu" in entry.devices else "cuda")
        moved = [None if array is None else as_tensor(array).to(on_device.device) for array in (plain, adapted)]
        logits, path = entry.load()(on_device, *moved)
        return (logits.cpu() if inputs.torch else logits.cpu().numpy()), path
