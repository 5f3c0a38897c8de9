"""The engine alone, in a process of its own, that runs when it is told to and sleeps in between.

python tools/serving_load/bare_engine.py BUNDLE BATCH THREADS   # then the seconds of each run, one a line

Pixels are ready, so nothing is decoded, queued, scored or sent: what a server could reach if all else were free.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.classifier import Classifier
from tools.demo.bundle import held_out_queries


class BareEngine:
    """The process, as its parent sees it. An async context manager."""

    def __init__(self, bundle: Path, batch: int, threads: int) -> None:
        self._command = (sys.executable, str(Path(__file__).resolve()), str(bundle), str(batch), str(threads))

    async def __aenter__(self) -> BareEngine:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(*self._command, stdin=pipe, stdout=pipe)
        await self._line()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def run(self, seconds: float) -> float:
        """Images a second of whole batches over about `seconds`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n".encode())
        return float((await self._line())["images_per_s"])

    async def _line(self) -> Any:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of the bare engine ended with code {await self._process.wait()}")
        return json.loads(line)


def serve(bundle: str, batch: int, threads: int) -> None:
    encoder = Classifier.load(bundle, threads=threads).encoder
    pictures = held_out_queries()[0]
    side = encoder.image_size
    if pictures.shape[1] != side:
        pictures = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)
    pixels = np.ascontiguousarray(np.resize(pictures, (batch, side, side, 3)))
    for _ in range(3):
        encoder.encode(pixels)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        start, batches = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < float(line) or not batches:
            encoder.encode(pixels)
            batches += 1
        print(json.dumps({"images_per_s": batches * batch / elapsed}), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
