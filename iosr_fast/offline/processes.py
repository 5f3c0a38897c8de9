"""Where a training runs: the processes and devices it has, and the folder for what it keeps."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from iosr_fast._require import require
from iosr_fast.offline.clip import LoadedClip
from iosr_fast.offline.train_config import TrainConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def make_fabric(precision: str = "32-true", accelerator: str = "auto") -> Fabric:
    """Lightning Fabric for this process: alone, or one of those that torchrun started (one or more machines).

    Raises ImportError where it is not installed.
    """
    fabric = require("lightning_fabric", "train")
    local, world = (int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    if world > 1:
        strategy = require("lightning_fabric.strategies", "train").DDPStrategy()
        made = fabric.Fabric(
            accelerator=accelerator, devices=local, num_nodes=world // local, strategy=strategy, precision=precision
        )
    else:
        made = fabric.Fabric(accelerator=accelerator, devices=1, precision=precision)
    made.launch()
    typed: Fabric = made
    return typed


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
