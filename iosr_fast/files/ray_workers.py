"""Chunks of a run on several processes or machines: Ray Data over a pool of actors, each with the engine open.

The driver distributes chunks and stores their parts, in order. Ray restarts a killed actor and computes its chunk
again, which gives the same bytes.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from iosr_fast.exceptions import BadImageError
from iosr_fast.files.chunks import Done, run_chunks
from iosr_fast.files.parts import differences
from iosr_fast.files.source import Chunk
from iosr_fast.files.stream import ReadOptions
from iosr_fast.files.work import Work
from iosr_fast.utils.machine import usable_threads
from iosr_fast.utils.ray_cluster import joined
from iosr_fast.utils.require import require

ATTEMPTS = 5  # workers that may die at a chunk before it is assumed to kill them
_CLUSTER_THREADS = 4


class Pool(NamedTuple):
    """`workers` actors of Ray with `gpus` GPUs (or a share of one) each; `address` joins a cluster, None starts Ray
    on this machine."""

    workers: int = 2
    gpus: float = 0
    address: str | None = None


class Worker:
    """An actor that opens the engine once. __call__ computes one row's chunk."""

    def __init__(self, work: Work, plan: str, options: ReadOptions) -> None:
        self.work, self.plan = work, json.loads(plan)
        known = {name: self.plan[name] for name in work.facts}
        if different := differences(known, json.loads(json.dumps(work.facts))):
            host = socket.gethostname()
            raise RuntimeError(f"expected one engine and classifier on all machines, but on {host} {different}")
        self.reader = work.open(options)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        chunk = Chunk(int(row["number"]), int(row["start"]), *json.loads(row["images"]))
        try:
            ((done, content),) = run_chunks(self.work, self.reader, [chunk], self.plan["images"])
        except BadImageError as error:  # as a row, so that the driver names the image without Ray's traceback
            return {"done": "", "content": b"", "bad": str(error.where), "reason": error.reason, "runtime": ""}
        runtime = self.reader.encoder.runtime
        return {"done": done.to_json(), "content": content, "bad": "", "reason": "", "runtime": runtime}


def row_of(chunk: Chunk) -> dict[str, Any]:
    """A chunk as a row of Ray Data."""
    paths = [os.path.abspath(path) for path in chunk.paths]
    return {"number": chunk.number, "start": chunk.start, "images": json.dumps([chunk.keys, paths])}


def run_on_ray(
    work: Work, plan: dict[str, Any], chunks: Sequence[Chunk], pool: Pool, options: ReadOptions
) -> Generator[tuple[Done, bytes], None, None]:
    """As run_chunks, on a pool of actors.

    Raises BadImageError for an unreadable image unless `skip_bad`; RuntimeError if the cluster is too small for one
    worker, an actor can't open the engine or has another one, a chunk keeps killing its workers, or runtimes differ.
    """
    threads = options.threads or (_CLUSTER_THREADS if pool.address else max(1, usable_threads() // pool.workers))
    options = replace(options, batch=plan["batch"], threads=threads)
    with joined(pool.address, pool.workers * threads) as ray:
        workers = min(pool.workers, _room(ray.cluster_resources(), threads, pool.gpus))
        data = require("ray.data", "ray")
        context = data.DataContext.get_current()
        context.enable_progress_bars, context.execution_options.preserve_order = False, True
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised here
        rows = [row_of(chunk) for chunk in chunks]
        opened = replace(work, folder=str(Path(work.folder).resolve()))
        # One row per block: Ray distributes blocks, and again when an actor dies.
        dataset = data.from_items(rows, override_num_blocks=len(rows)).map(
            Worker,
            fn_constructor_args=(opened, json.dumps(plan), options),
            compute=data.ActorPoolStrategy(size=min(workers, len(rows)), max_tasks_in_flight_per_actor=2),
            num_cpus=threads,
            num_gpus=pool.gpus or None,
            max_task_retries=ATTEMPTS - 1,
        )
        runtimes = set()
        try:
            for row in dataset.iter_rows():
                if row["bad"]:
                    raise BadImageError(Path(row["bad"]), 0, row["reason"])
                runtimes.add(row["runtime"])
                if len(runtimes) > 1:
                    raise RuntimeError(f"expected one runtime on all machines, got {runtimes}; name it by --runtime")
                yield Done.of_json(row["done"]), row["content"]
        except ray.exceptions.RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise RuntimeError(
                f"the workers failed: {lines[-1] if lines else type(error).__name__}; if they die at the same images, "
                "run without --ray to see at which"
            ) from error


def _room(resources: dict[str, float], threads: int, gpus: float) -> int:
    """How many workers fit into a cluster."""
    cores, cards = resources.get("CPU", 0), resources.get("GPU", 0)
    workers = int(min(cores / threads, cards / gpus if gpus else cores))
    if workers < 1:
        raise RuntimeError(
            f"expected room for a worker of {threads} cores and {gpus:g} GPUs, got a cluster of {cores:.0f} cores and "
            f"{cards:.0f} GPUs; lower --threads or --gpus"
        )
    return workers
