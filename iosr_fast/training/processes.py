"""The processes of a training: devices, checks that all run the same training, and handling of signals."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from iosr_fast.backbones.load import LoadedModel
from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.require import require

if TYPE_CHECKING:
    from lightning_fabric import Fabric

SIGNALS = (signal.SIGINT, signal.SIGTERM)
T = TypeVar("T")


def make_fabric(precision: str = "32-true", accelerator: str = "auto") -> Fabric:
    """Lightning Fabric for this process, alone or among those that torchrun started (on one or more machines).

    Raises ImportError if it is not installed, ValueError for a device or precision that this machine lacks.
    """
    fabric = require("lightning_fabric", "train")
    local, world = (int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    options: dict[str, Any] = {"accelerator": accelerator, "devices": 1, "precision": precision}
    if world > 1:
        # DINO's sums of the teacher's outputs differ between processes until a step ends; other buffers are equal.
        strategy = require("lightning_fabric.strategies", "train").DDPStrategy(broadcast_buffers=False)
        options |= {"devices": local, "num_nodes": world // local, "strategy": strategy}
    misconfigured = require("lightning_fabric.utilities.exceptions", "train").MisconfigurationException
    try:
        result: Fabric = fabric.Fabric(**options)
    except (RuntimeError, misconfigured) as error:
        raise IosrFastError(f"can't train on accelerator {accelerator!r} in {precision}: {error}") from error
    result.launch()
    return result


def check_same(fabric: Fabric, key: Mapping[str, Any]) -> None:
    """Raise ValueError in all processes if some have another `key` (which identifies the training) than the first one.

    With other pictures on one machine, results would be wrong or the processes would wait for each other forever.
    """
    if fabric.world_size == 1:
        return
    first: Mapping[str, Any] = fabric.broadcast(dict(key))
    names = sorted(name for name in key if key[name] != first[name])
    total = fabric.all_reduce(torch.tensor(float(bool(names)), device=fabric.device), reduce_op="sum")
    if names:
        differences = ", ".join(f"{name} {key[name]!r} where the first has {first[name]!r}" for name in names)
        raise IosrFastError(
            f"expected the same training in all processes, got in process {fabric.global_rank} {differences}; give all "
            "of them the same options and the same files (copies must keep their times)"
        )
    assert isinstance(total, torch.Tensor)
    if differing := int(total):
        raise IosrFastError(f"expected the same training in all processes, got another in {differing} of them")


def in_first_process(fabric: Fabric, call: Callable[[], T]) -> T:
    """The result of `call`, made by the first process, in all of them; what it raises is raised in all."""
    result: T | Exception | None = None
    if fabric.is_global_zero:
        try:
            result = call()
        except Exception as error:
            result = error
    result = fabric.broadcast(result)
    if isinstance(result, Exception):
        raise result
    return cast("T", result)


@contextmanager
def on_device(device: torch.device, clip: LoadedModel) -> Iterator[None]:
    """Move the image encoder to `device` for a with block, then back to the CPU."""
    clip.model.visual.to(device)
    try:
        yield
    finally:
        clip.model.visual.to("cpu")


class Interrupt:
    """Delays SIGINT and SIGTERM until the current step is done and saved; a second SIGINT (Ctrl-C) acts at once.

    A signal sets `requested` in this process. Only a process's main thread can handle signals; entered in another
    thread, this changes nothing.
    """

    def __init__(self) -> None:
        self.requested = self._interrupted = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Ctrl-C reaches the processes of torchrun twice, as SIGINT from the terminal and as SIGTERM from torchrun.
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = self._interrupted or number == signal.SIGINT
        self.requested = True


def shielded(items: Iterator[T]) -> Iterator[T]:
    """The same items; worker processes that the iterator starts for its first item never receive SIGNALS.

    Terminals, torchrun and batch systems signal all processes of a group. Decoding processes would end, and the current
    step would wait for its pictures forever. Signals to this thread are delayed until the first item.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows has no process groups
        yield from items
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # worker processes inherit it
    try:
        first = next(items, None)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if first is not None:
        yield first
        yield from items
