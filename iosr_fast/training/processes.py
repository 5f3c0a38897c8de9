"""Where a training runs: the processes and devices it has, and the folder for what it keeps."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from iosr_fast.clip.load import LoadedClip
from iosr_fast.training.train_config import TrainConfig
from iosr_fast.utils.require import require

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def make_fabric(precision: str = "32-true", accelerator: str = "auto") -> Fabric:
    """Lightning Fabric for this process: alone, or one of those that torchrun started (one or more machines).

    Raises ImportError where it is not installed, ValueError for a device or a precision that isn't to be had here.
    """
    fabric = require("lightning_fabric", "train")
    local, world = (int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    wanted: dict[str, Any] = {"accelerator": accelerator, "devices": 1, "precision": precision}
    if world > 1:
        # DINO's sums of the teacher's outputs are each process's own until the step ends; the other buffers are equal.
        strategy = require("lightning_fabric.strategies", "train").DDPStrategy(broadcast_buffers=False)
        wanted |= {"devices": local, "num_nodes": world // local, "strategy": strategy}
    unfit = require("lightning_fabric.utilities.exceptions", "train").MisconfigurationException
    try:
        made = fabric.Fabric(**wanted)
    except (RuntimeError, unfit) as error:
        raise ValueError(f"can't train on accelerator {accelerator!r} in {precision}: {error}") from error
    made.launch()
    typed: Fabric = made
    return typed


def check_shared(fabric: Fabric, folder: Path) -> None:
    """Raise ValueError in all processes where some don't see the `folder` that the first one writes to.

    Found at a resume only, it would cost all that was trained before.
    """
    if fabric.world_size == 1:
        return
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f".shared.{os.getpid()}"
    if fabric.is_global_zero:
        mark.touch()
    mark = folder / fabric.broadcast(mark.name)  # the others have the name only once the file is there
    lacking = fabric.all_reduce(torch.tensor(float(not mark.exists()), device=fabric.device), reduce_op="sum")
    if fabric.is_global_zero:
        mark.unlink()
    assert isinstance(lacking, torch.Tensor)
    if lacking > 0:
        raise ValueError(
            f"expected {folder} to be one folder for all processes, but {int(lacking)} of {fabric.world_size} see "
            "another than the first one does: put it where all machines can read it"
        )


def check_same(fabric: Fabric, key: Mapping[str, Any]) -> None:
    """Raise ValueError in all processes where the `key` of some (what the training is) differs from the first one's.

    Other pictures on one machine would train, wrongly or until the processes wait for each other for ever.
    """
    if fabric.world_size == 1:
        return
    first: Mapping[str, Any] = fabric.broadcast(dict(key))
    names = sorted(name for name in key if key[name] != first[name])
    differ = fabric.all_reduce(torch.tensor(float(bool(names)), device=fabric.device), reduce_op="sum")
    assert isinstance(differ, torch.Tensor)
    if names:
        told = ", ".join(f"{name} {key[name]!r} where the first has {first[name]!r}" for name in names)
        raise ValueError(
            f"expected the same training in all processes, got in process {fabric.global_rank} {told}; give all the "
            "same options and the same files (copies with their times)"
        )
    if differ > 0:
        raise ValueError(f"expected the same training in all processes, got another in {int(differ)} of them")


@contextmanager
def kept_folder(folder: Path | None, config: TrainConfig) -> Iterator[Path | None]:
    """Where outputs of the frozen blocks are kept: in `folder`, or for as long as training lasts; None if nowhere."""
    if not config.cached_views:
        yield None
    elif folder is not None:
        yield folder / "kept"
    else:
        with tempfile.TemporaryDirectory(prefix="iosr_fast-") as temporary:
            yield Path(temporary)


@contextmanager
def on_device(device: torch.device, clip: LoadedClip) -> Iterator[None]:
    """The image encoder on `device` for the length of a with block."""
    clip.model.visual.to(device)
    try:
        yield
    finally:
        clip.model.visual.to("cpu")
