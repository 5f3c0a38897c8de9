"""A plan's scoring recorded as CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from iosr_fast.encoders.encoder import Array, Embeddings
from iosr_fast.encoders.runtimes.batched import bucket_of, check_buckets
from iosr_fast.encoders.runtimes.cuda_graphs import Recorder
from iosr_fast.exceptions import IosrFastError
from iosr_fast.scoring.device_plan import as_tensor
from iosr_fast.scoring.inputs import scoring_inputs
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.score import score
from iosr_fast.utils.require import require

if TYPE_CHECKING:
    from torch import Tensor


class GraphedScorer:
    """score(plan, embeddings) on a GPU as one launch, for batches padded to one of a few sizes.

    The constructor scores the plan once (Triton then reads the class offsets back) and records each of `buckets`. A
    graph holds its plan's arrays, so another plan needs another GraphedScorer. Batches beyond the largest bucket take
    several runs. Threads take turns.
    Not yet run on a GPU.
    """

    def __init__(
        self,
        plan: ScoringPlan,
        buckets: Iterable[int],
        impl: str = "auto",
        device: str = "cuda",
        recorder: Recorder | None = None,
    ) -> None:
        """`impl` as for scoring.score. Raises ValueError without a bucket, RuntimeError if recording fails."""
        torch = require("torch", "gpu")
        sizes = list(buckets)
        if not sizes:
            raise IosrFastError("expected at least one batch size to record, got none")
        self.plan, self.buckets = plan, check_buckets(sizes, max(sizes))
        names = ("plain", "adapted") if plan.needs_adapted else ("plain",)
        shape = (self.buckets[-1], plan.width)
        with torch.inference_mode(False):  # inference tensors can't be written to outside of it
            self._queries = {name: torch.zeros(shape, dtype=torch.float32, device=device) for name in names}
        self._impl = impl
        self._recorder = recorder or Recorder(device=device)
        self._replay = {size: self._recorder.record(partial(self._score, size)) for size in self.buckets}

    def __call__(self, embeddings: Embeddings) -> Array:
        """Logits (B, C) float32: a NumPy array for NumPy arrays, a tensor on their device for tensors.

        Finiteness and norms are not checked, as in score(check=False). Raises ValueError if the embeddings don't fit.
        """
        torch = require("torch", "gpu")
        inputs = scoring_inputs(self.plan, embeddings, check=False)
        queries = {name: _tensor(getattr(inputs.embeddings, name)) for name in self._queries}
        n_queries, most = len(queries["plain"]), self.buckets[-1]
        with self._recorder.turn():
            parts = [
                self._part({name: rows[start : start + most] for name, rows in queries.items()})
                for start in range(0, n_queries, most)
            ]
            logits = torch.cat(parts) if parts else self._queries["plain"].new_empty((0, self.plan.n_classes))
            if not inputs.torch:
                return logits.cpu().numpy()
            return logits.cpu() if inputs.device == "cpu" else logits

    def _part(self, rows: dict[str, Tensor]) -> Tensor:
        n_queries = len(rows["plain"])
        for name, static in self._queries.items():
            static[:n_queries].copy_(rows[name])
        logits: Tensor = self._replay[bucket_of(n_queries, self.buckets)]()
        return logits[:n_queries].clone()  # the next replay overwrites it

    def _score(self, size: int) -> Tensor:
        queries = {name: static[:size] for name, static in self._queries.items()}
        logits: Tensor = score(self.plan, Embeddings(queries["plain"], queries.get("adapted")), self._impl, check=False)
        return logits


def _tensor(rows: Any) -> Tensor:
    return as_tensor(rows) if isinstance(rows, np.ndarray) else rows
