"""Checkpoints of a training: written atomically, verified when read, with one spare in case of damage.

Only the first process of a training writes and reads them.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from iosr_fast.exceptions import IosrFastError
from iosr_fast.sealed.files import remove_leftovers
from iosr_fast.sealed.folders import new_folder
from iosr_fast.sealed.manifest import read_manifest, write_manifest

KIND = "training checkpoint"
FILE = "state.safetensors"
KEEP = 2
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training after `step` optimizer steps."""

    step: int
    tensors: dict[str, torch.Tensor]
    extra: dict[str, Any]


class Checkpoints:
    """The last two checkpoints of one training in a folder, each a folder with a manifest of hashes.

    `key` (JSON values) identifies the training; it never resumes from a checkpoint with another key.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder = folder
        self.key: dict[str, Any] = json.loads(json.dumps(dict(key)))  # as `latest` reads it: without tuples

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], extra: Mapping[str, Any]) -> None:
        """Write a checkpoint, then remove all but the last two. Raises OSError, with the older ones untouched."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder, of=r"step-\d+")  # of processes killed while writing
        try:
            with new_folder(self.folder / f"step-{step:09d}", KIND) as temporary:
                save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary / FILE)
                write_manifest(temporary, KIND, {"step": step, "key": self.key, "extra": dict(extra)})
        except (OSError, SafetensorError) as error:
            earlier = self._present()
            state = (
                f"that of step {int(earlier[-1].name.removeprefix('step-'))} is intact"
                if earlier
                else "there is no other"
            )
            raise OSError(
                getattr(error, "errno", None) or errno.EIO,
                f"can't write a checkpoint of step {step} to {self.folder} ({error}); {state}: free some space and "
                "start the same command again to resume from it",
            ) from error
        for old in self._present()[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)  # the next save removes one that a slow share still holds

    def latest(self) -> Checkpoint | None:
        """The newest valid checkpoint, or None; damaged ones are logged, renamed and skipped.

        Raises ValueError for a checkpoint of another training.
        """
        from safetensors.torch import load_file

        for folder in reversed(self._present()):
            try:
                manifest = read_manifest(folder, KIND)
                step, key, extra = manifest["step"], manifest["key"], manifest["extra"]
            except (ValueError, KeyError, OSError) as error:
                log.warning("the checkpoint %s is damaged and skipped: %s", folder, error)
                aside = folder.with_name(f"damaged-{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)  # of an earlier run
                folder.rename(aside)
                continue
            if key != self.key:
                names = sorted(k for k in {*key, *self.key} if key.get(k) != self.key.get(k))
                differences = ", ".join(f"{k} {self.key.get(k)!r} where it has {key.get(k)!r}" for k in names)
                raise IosrFastError(
                    f"the checkpoints in {self.folder} are of another training ({differences}); delete them, or use "
                    "their settings"
                )
            return Checkpoint(step, load_file(folder / FILE), extra)
        return None

    def _present(self) -> list[Path]:
        return sorted(self.folder.glob("step-*")) if self.folder.is_dir() else []


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Its state as tensors named optimizer.{parameter}.{name}, without hyper-parameters, which each step sets."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{name}": torch.as_tensor(v) for i, entry in state.items() for name, v in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """The inverse of `flatten_optimizer`; tensors with other names are ignored."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".")
            state.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
