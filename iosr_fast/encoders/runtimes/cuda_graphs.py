"""CUDA graphs: a fixed sequence of launches, recorded once for each batch size and then launched as one.

At small batches the launches of a network's many kernels take longer than the kernels; a graph's launch is one. A graph
reads and writes the memory it was recorded with, so inputs are copied in and outputs copied out.
None of this has been run on a GPU yet: what is tested is everything but the recording itself (tests/test_cuda_graphs.py
has the tests for a GPU, too).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from iosr_fast.encoders.encoder import Array, Embeddings
from iosr_fast.encoders.runtimes.batched import bucket_of, check_buckets
from iosr_fast.scoring.inputs import make_batch
from iosr_fast.scoring.plan import ScoringPlan, score
from iosr_fast.utils.require import require

if TYPE_CHECKING:
    from torch import Tensor


class Recorder:
    """Records functions on one stream, and lets their graphs be replayed in turns: they share one pool of memory."""

    def __init__(self, stream: Any = None) -> None:
        torch = require("torch", "train")
        self._torch = torch
        self._stream = torch.cuda.Stream() if stream is None else stream
        self._pool = torch.cuda.graph_pool_handle()
        self._lock, self._done = threading.Lock(), torch.cuda.Event()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Around copying in, replaying and copying out: no other turn writes to that memory meanwhile.

        Turns are on the caller's current stream, which may be another one each time.
        """
        with self._lock:
            stream = self._torch.cuda.current_stream()
            stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)

    def record(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """A function that launches again what `run` launches now, and returns what it returned when it was recorded.

        `run` launches on the current stream. It is called twice: first as it is, for all that is done once only and
        would wait for the device, then for the record. Raises RuntimeError where a launch can't be recorded.
        """
        torch = self._torch
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the GPU while this one records.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = run()

        def replay() -> Any:
            graph.replay()
            return outputs

        return replay


class GraphedScorer:
    """score(plan, embeddings) on a GPU as one launch, for batches that are filled up to one of a few sizes.

    Each of `buckets` is recorded when this is made, with all that the plan's first scoring does besides (Triton reads
    the class offsets back once). A graph holds its plan's arrays: another plan takes another GraphedScorer. Larger
    batches than the largest bucket go in several runs. Calls from several threads take turns.
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
        """`impl` as for scoring.score. Raises ValueError without a bucket, RuntimeError where it can't be recorded."""
        torch = require("torch", "train")
        given = list(buckets)
        if not given:
            raise ValueError("expected at least one batch size to record, got none")
        self.plan, self.buckets = plan, check_buckets(given, max(given))
        names = ("plain", "adapted") if plan.needs_adapted else ("plain",)
        shape = (self.buckets[-1], plan.width)
        with torch.inference_mode(False):  # or they could not be written to outside of it
            self._queries = {name: torch.zeros(shape, dtype=torch.float32, device=device) for name in names}
        self._impl = impl
        self._recorder = recorder or Recorder()
        self._replay = {size: self._recorder.record(partial(self._score, size)) for size in self.buckets}

    def __call__(self, embeddings: Embeddings) -> Array:
        """Logits (B, C) float32: a NumPy array for NumPy arrays, for tensors a tensor where they are.

        Finiteness and norms are not checked, as score(check=False). Raises ValueError where the embeddings don't fit.
        """
        torch = require("torch", "train")
        batch = make_batch(self.plan, embeddings, check=False)
        given = {name: _tensor(getattr(batch.embeddings, name)) for name in self._queries}
        n_queries, most = len(given["plain"]), self.buckets[-1]
        with self._recorder.turn():
            parts = [
                self._part({name: rows[start : start + most] for name, rows in given.items()})
                for start in range(0, n_queries, most)
            ]
            logits = torch.cat(parts) if parts else self._queries["plain"].new_empty((0, self.plan.n_classes))
            if not batch.torch:
                return logits.cpu().numpy()
            return logits.cpu() if batch.device == "cpu" else logits

    def _part(self, rows: dict[str, Tensor]) -> Tensor:
        n_queries = len(rows["plain"])
        for name, static in self._queries.items():
            static[:n_queries].copy_(rows[name])
        logits: Tensor = self._replay[bucket_of(n_queries, self.buckets)]()
        return logits[:n_queries].clone()  # the next replay writes where this one wrote

    def _score(self, size: int) -> Tensor:
        queries = {name: static[:size] for name, static in self._queries.items()}
        logits: Tensor = score(self.plan, Embeddings(queries["plain"], queries.get("adapted")), self._impl, check=False)
        return logits


def _tensor(rows: Any) -> Tensor:
    from iosr_fast.scoring.device_plan import as_tensor

    return as_tensor(rows) if isinstance(rows, np.ndarray) else rows
