"""The same chunks on more processes or machines: Ray Data over a pool of actors, each with the engine open.

The driver sends chunks out and keeps the log; actors write the parts, to a folder that every machine sees. Ray starts
an actor that was killed again, and computes its chunk anew. A chunk that is computed twice gives the same file twice.
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

from iosr_fast.encoders.encoder import Encoder
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.images.preprocess import BadImageError
from iosr_fast.utils.require import require
from tools.embedding.items import Chunk, Item
from tools.embedding.local import Write, run_chunks
from tools.embedding.plan import PLAN, Done, Plan, check_part
from tools.ray_cluster import EXTRA, joined

ATTEMPTS = 5  # at one chunk: when so many workers died at it, it is taken for what kills them


@dataclass(frozen=True)
class Pool:
    """`workers` actors with `threads` cores (and `gpus` GPUs, or a share of one) each; `address` joins a cluster, None
    starts Ray on this machine."""

    workers: int
    threads: int
    gpus: float = 0
    address: str | None = None


class Worker:
    """An actor. Opens the engine once; __call__ computes the chunk of one row, or finds it done by one that died.

    Another kind of run is a subclass with its kind of plan and its `open`.
    """

    plan_type: type[Plan] = Plan

    def __init__(self, engine: str, plan: str, out: str, threads: int, skip_bad: bool) -> None:
        self.plan, self.out = self.plan_type(**json.loads(plan)), Path(out)
        self.threads, self.skip_bad = threads, skip_bad
        host = socket.gethostname()
        there = self.out / PLAN
        if not there.is_file() or there.read_text(encoding="utf-8") != plan:
            raise RuntimeError(
                f"expected {out} to be one folder on all machines, but {host} sees another or none there"
            )
        if not (Path(engine) / "manifest.json").is_file():
            raise RuntimeError(f"expected {engine} on all machines, but {host} has none; put it on the share")
        self.encoder, self.write = self.open(engine)

    def open(self, engine: str) -> tuple[Encoder, Write | None]:
        """The encoder, and what writes a part (local.run_chunks). Raises RuntimeError where it is another than the
        plan's."""
        encoder = open_engine(engine, self.plan.runtime, threads=self.threads)
        if encoder.fingerprint != self.plan.engine:
            raise RuntimeError(
                f"expected one engine on all machines, but {socket.gethostname()} has another in {engine}"
            )
        return encoder, None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        chunk = Chunk(int(row["number"]), [Item(*values) for values in json.loads(row["items"])], row["rows"])
        path = self.out / self.plan.part_name(chunk.number)
        if path.exists():
            reason, errors = check_part(path, self.plan, chunk)
            if reason is None and (self.skip_bad or not errors):
                return _row(Done(path.name, len(chunk.items), errors, 0.0, os.getpid(), socket.gethostname()))
        nothing = Done(path.name, 0, 0, 0.0, os.getpid(), socket.gethostname())
        with attempt(path) as died:
            if died >= ATTEMPTS:
                return _row(nothing, killer=True)
            try:
                (done,) = run_chunks(
                    self.encoder, self.plan, [chunk], self.out, self.threads, self.skip_bad, write=self.write
                )
            except BadImageError as error:  # as a row: the driver shall name the image, not show Ray's traceback
                return _row(nothing, str(error.where), error.reason)
        return _row(done)


def _row(done: Done, bad: str = "", reason: str = "", killer: bool = False) -> dict[str, Any]:
    return {**asdict(done), "bad": bad, "reason": reason, "killer": killer}


@contextmanager
def attempt(path: Path) -> Iterator[int]:
    """How many earlier attempts at this part died in the block. A mark beside the part, with this process's id and
    host, stays if this one does, too.

    Ray Data restarts dead actors without end, and would do so for ever with a picture that crashes its decoder.
    """
    died = len(list(path.parent.glob(f".{path.name}.*.attempt.tmp")))
    mark = path.with_name(f".{path.name}.{uuid.uuid4().hex}.attempt.tmp")
    mark.write_text(f"{os.getpid()} {socket.gethostname()}\n", encoding="utf-8")
    try:
        yield died
    finally:
        mark.unlink(missing_ok=True)


def run_on_ray(
    engine: Path,
    plan: Plan,
    chunks: Sequence[Chunk],
    out: Path,
    pool: Pool,
    skip_bad: bool,
    worker: type[Worker] = Worker,
) -> Iterator[Done]:
    """Like local.run_chunks, on a pool of actors, in the order in which parts are finished.

    Raises BadImageError for an unreadable image unless `skip_bad`, RuntimeError where the cluster is too small for one
    worker, where an actor can't open the engine or sees another folder, and where a chunk keeps killing its workers.
    """
    with started(pool) as (ray, workers):
        data = require("ray.data", EXTRA)
        data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what goes wrong is raised here
        rows = [
            {"number": chunk.number, "items": json.dumps([_values(item) for item in chunk.items]), "rows": chunk.rows}
            for chunk in chunks
        ]
        # One row a block: a block is what Ray hands out, and hands out again when its actor dies.
        dataset = data.from_items(rows, override_num_blocks=len(rows)).map(
            worker,
            fn_constructor_args=(str(engine.resolve()), plan.to_json(), str(out.resolve()), pool.threads, skip_bad),
            compute=data.ActorPoolStrategy(size=min(workers, len(rows)), max_tasks_in_flight_per_actor=2),
            num_cpus=pool.threads,
            num_gpus=pool.gpus or None,
        )
        try:
            for row in dataset.iter_rows():
                bad, reason, killer = (row.pop(name) for name in ("bad", "reason", "killer"))
                if bad:
                    raise BadImageError(Path(bad), 0, reason)
                if killer:
                    raise RuntimeError(
                        f"{ATTEMPTS} workers died at {row['part']}; without --ray and with a smaller --chunk, in "
                        "another folder, one sees at which images"
                    )
                yield Done(**row)
        except ray.exceptions.RayError as error:
            told = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise RuntimeError(f"the workers can't go on: {told[-1] if told else type(error).__name__}") from error


def _values(item: Item) -> list[Any]:
    return [item.key, item.path, item.stamp, item.offset, item.size, item.fault]


@contextmanager
def started(pool: Pool) -> Iterator[tuple[Any, int]]:
    """Ray, joined or started, left at the end; and how many workers have room in it."""
    with joined(pool.address, pool.workers * pool.threads) as ray:
        room = ray.cluster_resources()
        workers = int(room.get("CPU", 0) // pool.threads)
        if pool.gpus:
            workers = min(workers, int(room.get("GPU", 0) / pool.gpus))
        if workers < 1:
            raise RuntimeError(
                f"expected room for a worker of {pool.threads} cores and {pool.gpus:g} GPUs, got a cluster of "
                f"{room.get('CPU', 0):.0f} cores and {room.get('GPU', 0):.0f} GPUs; give fewer --threads or --gpus"
            )
        yield ray, min(workers, pool.workers)
