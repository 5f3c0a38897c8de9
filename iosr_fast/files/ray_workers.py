"""Chunks of a run on several processes or machines: Ray Data over a pool of actors, each with the engine open.

The driver distributes chunks and writes the log; actors write the parts to a folder that every machine shares. Ray
restarts a killed actor and computes its chunk again, which gives the same file.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from iosr_fast.exceptions import BadImageError
from iosr_fast.files.chunks import run_chunks
from iosr_fast.files.part_folder import PLAN, Done
from iosr_fast.files.plan import PLANS, Plan
from iosr_fast.files.source import Chunk, Item
from iosr_fast.utils.ray_cluster import joined
from iosr_fast.utils.require import require

ATTEMPTS = 5  # workers that may die at a chunk before it is assumed to kill them


@dataclass(frozen=True)
class Pool:
    """`workers` actors of Ray with `gpus` GPUs (or a share of one) each; `address` joins a cluster, None starts Ray
    on this machine."""

    workers: int
    gpus: float = 0
    address: str | None = None


class Worker:
    """An actor that opens the engine once. __call__ computes one row's chunk, unless a dead worker had finished it."""

    def __init__(self, folder: str, kind: str, plan: str, out: str, threads: int, skip_bad: bool) -> None:
        self.plan, self.out = PLANS[kind](**json.loads(plan)), Path(out)
        self.threads, self.skip_bad = threads, skip_bad
        host = socket.gethostname()
        plan_file = self.out / PLAN
        if not plan_file.is_file() or plan_file.read_text(encoding="utf-8") != plan:
            raise RuntimeError(f"expected {out} to be one folder on all machines, but {host} has another or none there")
        if not (Path(folder) / "manifest.json").is_file():
            raise RuntimeError(f"expected {folder} on all machines, but {host} has none; put it on the share")
        self.opened = self.plan.open(folder, threads)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        chunk = Chunk(int(row["number"]), [Item(*values) for values in json.loads(row["items"])])
        path = self.out / self.plan.part_name(chunk.number)
        me = os.getpid(), socket.gethostname()
        if path.exists():
            reason, errors = self.plan.check_part(path, chunk)
            if reason is None and (self.skip_bad or not errors):
                return _result(Done(path.name, len(chunk.items), errors, 0.0, *me))
        nothing = Done(path.name, 0, 0, 0.0, *me)
        with attempt(path) as died:
            if died >= ATTEMPTS:
                return _result(nothing, killer=True)
            try:
                (done,) = run_chunks(self.plan, [chunk], self.out, self.opened, self.threads, self.skip_bad)
            except BadImageError as error:  # as a row, so that the driver names the image without Ray's traceback
                return _result(nothing, str(error.where), error.reason)
        return _result(done)


def row_of(chunk: Chunk) -> dict[str, Any]:
    """A chunk as a row of Ray Data."""
    items = [[item.key, item.path, item.stamp] for item in chunk.items]
    return {"number": chunk.number, "items": json.dumps(items)}


def _result(done: Done, bad: str = "", reason: str = "", killer: bool = False) -> dict[str, Any]:
    return {**asdict(done), "bad": bad, "reason": reason, "killer": killer}


@contextmanager
def attempt(path: Path) -> Iterator[int]:
    """Yield the number of earlier attempts at this part whose process died in the block.

    A mark beside the part, with this process's id and host, stays if the process dies. Without a limit Ray Data would
    restart actors forever on a picture that crashes its decoder.
    """
    died = len(list(path.parent.glob(f".{path.name}.*.attempt.tmp")))
    mark = path.with_name(f".{path.name}.{uuid.uuid4().hex}.attempt.tmp")
    mark.write_text(f"{os.getpid()} {socket.gethostname()}\n", encoding="utf-8")
    try:
        yield died
    finally:
        mark.unlink(missing_ok=True)


def run_on_ray(
    folder: Path, plan: Plan, chunks: Sequence[Chunk], out: Path, pool: Pool, threads: int, skip_bad: bool
) -> Iterator[Done]:
    """As run_chunks, on a pool of actors, in the order in which parts are finished.

    Raises BadImageError for an unreadable image unless `skip_bad`; RuntimeError if the cluster is too small for one
    worker, an actor can't open the engine or sees another folder, or a chunk keeps killing its workers.
    """
    with _started(pool, threads) as (ray, workers):
        data = require("ray.data", "ray")
        data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised here
        rows = [row_of(chunk) for chunk in chunks]
        # One row per block: Ray distributes blocks, and again when an actor dies.
        dataset = data.from_items(rows, override_num_blocks=len(rows)).map(
            Worker,
            fn_constructor_args=(
                str(folder.resolve()),
                plan.kind,
                plan.to_json(),
                str(out.resolve()),
                threads,
                skip_bad,
            ),
            compute=data.ActorPoolStrategy(size=min(workers, len(rows)), max_tasks_in_flight_per_actor=2),
            num_cpus=threads,
            num_gpus=pool.gpus or None,
        )
        try:
            for row in dataset.iter_rows():
                bad, reason, killer = (row.pop(name) for name in ("bad", "reason", "killer"))
                if bad:
                    raise BadImageError(Path(bad), 0, reason)
                if killer:
                    raise RuntimeError(
                        f"{ATTEMPTS} workers died at {row['part']}; run without --ray, with a smaller --chunk and in "
                        "another folder, to see at which images"
                    )
                yield Done(**row)
        except ray.exceptions.RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise RuntimeError(f"the workers failed: {lines[-1] if lines else type(error).__name__}") from error


@contextmanager
def _started(pool: Pool, threads: int) -> Iterator[tuple[Any, int]]:
    """Ray, joined or started for the block, and how many workers fit into it."""
    with joined(pool.address, pool.workers * threads) as ray:
        resources = ray.cluster_resources()
        workers = int(resources.get("CPU", 0) // threads)
        if pool.gpus:
            workers = min(workers, int(resources.get("GPU", 0) / pool.gpus))
        if workers < 1:
            raise RuntimeError(
                f"expected room for a worker of {threads} cores and {pool.gpus:g} GPUs, got a cluster of "
                f"{resources.get('CPU', 0):.0f} cores and {resources.get('GPU', 0):.0f} GPUs; lower --threads or --gpus"
            )
        yield ray, min(workers, pool.workers)
