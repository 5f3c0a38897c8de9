"""Train the adapter of a frozen CLIP, supervised or by DINO, on one process or many, resumable at any step.

The blocks before the first adapter run without autograd (or once, with `cached_views`), and the last block computes
only the CLS token where the embedding reads no other, as the compiled encoder does.

Every random draw is a function of the seed, the epoch, the step and the process, and the order of the pictures does not
depend on the number of processes. So, on a CPU, a killed training that resumes from its last checkpoint ends with
exactly the weights of an uninterrupted one.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from iosr_fast.clip.adapter import Adapter, check_belongs
from iosr_fast.clip.load import LoadedClip
from iosr_fast.exceptions import IosrFastError
from iosr_fast.training.activation_cache import prune
from iosr_fast.training.adapted_encoder import AdaptedEncoder
from iosr_fast.training.batches import Batches, hash_seed, part_size
from iosr_fast.training.checkpoints import Checkpoints, flatten_optimizer, restore_optimizer
from iosr_fast.training.data import PictureSource
from iosr_fast.training.dino import Dino
from iosr_fast.training.held_out import HeldOutEvaluator
from iosr_fast.training.probe import Probe
from iosr_fast.training.processes import (
    Interrupt,
    activations_folder,
    check_same,
    check_shared,
    make_fabric,
    on_device,
)
from iosr_fast.training.supervised import Supervised
from iosr_fast.training.train_config import TrainConfig
from iosr_fast.training.training_log import TrainingLog

if TYPE_CHECKING:
    from lightning_fabric import Fabric

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """The report after each step. Epochs and steps count from 1; `loss`, `accuracy` and `pictures` are of this step.

    With DINO `accuracy` is the share of pictures for which the student, on the second crop, and the teacher, on the
    first, choose the same prototype. `seconds` is the step's time, decoding included.
    """

    epoch: int
    step: int
    steps_an_epoch: int
    loss: float
    accuracy: float
    learning_rate: float
    pictures: int
    seconds: float


def train_adapter(
    clip: LoadedClip,
    adapter: Adapter,
    source: PictureSource,
    config: TrainConfig,
    folder: Path | None = None,
    report: Callable[[Progress], None] | None = None,
    *,
    held_out: PictureSource | None = None,
    report_epoch: Callable[[int, Probe, Probe], None] | None = None,
    checkpoint_every: int = 0,
    checkpoint_minutes: float = 0.0,
    tensorboard: bool = False,
    fabric: Fabric | None = None,
) -> Adapter:
    """Train `adapter` and return the result on the CPU, in evaluation mode, with the training's facts in its config.

    Without `config.dino` training is supervised (cross entropy of a linear head on the un-normalised adapted embedding)
    and returns `adapter` itself; with it training is self-supervised and returns the teacher's adapter.

    `folder` receives checkpoints (at the end of each epoch, and every `checkpoint_every` steps and
    `checkpoint_minutes` if those are above 0), steps.csv and epochs.csv (with `tensorboard` its events too), and the
    cached outputs of the frozen blocks if `config.cached_views` is above 0. Training resumes from the newest whole
    checkpoint in it. Without a folder nothing is written. `held_out` pictures are encoded after each epoch: their
    overlap and linear-probe accuracy, plain and adapted, go to `report_epoch` as (epoch, plain, adapted).

    `fabric` has precision, devices and processes (default: `make_fabric`). All processes make the same call; the first
    one reports and writes.

    Raises ValueError for an adapter of another CLIP, fewer than two classes (supervised), a batch that the processes
    can't share, a process with another folder, other pictures or another config, or checkpoints of another training;
    KeyboardInterrupt after SIGINT or SIGTERM, once the current step is done and saved; OSError if the disk is full,
    with earlier checkpoints untouched.
    """
    check_belongs(adapter, clip)
    classes = len(source.class_names)
    if config.dino is None and classes < 2:
        raise IosrFastError(f"expected at least two classes to train on, got {classes}: {source.class_names}")
    if not len(source.labels):
        raise IosrFastError("expected pictures to train on, got none")
    fabric = fabric or make_fabric(config.precision)
    part_size(config, fabric.world_size)
    if folder is not None:
        check_shared(fabric, folder)
    with activations_folder(folder, config) as cache, torch.random.fork_rng(devices=[]), on_device(fabric.device, clip):
        training = _Training(clip, adapter, source, config, fabric, folder, cache, held_out, tensorboard)
        try:
            training.run(report, report_epoch, checkpoint_every, 60 * checkpoint_minutes)
        finally:
            training.close()
    facts = {**asdict(config), "pictures": len(source.labels), "classes": classes}
    trained = training.objective.result().to("cpu")
    trained.config = replace(adapter.config, training=facts)
    return trained.eval().requires_grad_(False)


class _Training:
    """One training on one process: objective, optimizer, batches and progress."""

    def __init__(
        self,
        clip: LoadedClip,
        adapter: Adapter,
        source: PictureSource,
        config: TrainConfig,
        fabric: Fabric,
        folder: Path | None,
        cache: Path | None,
        held_out: PictureSource | None,
        tensorboard: bool,
    ) -> None:
        self.config, self.fabric = config, fabric
        a = adapter.config
        key = {
            **asdict(config),
            "clip": clip.fingerprint,
            "source": source.fingerprint,
            "adapter": [a.first_adapted_block, a.bottleneck, a.scale, a.dropout],
        }
        check_same(fabric, key)
        encoder = AdaptedEncoder(clip, adapter.config.first_adapted_block)
        torch.manual_seed(config.seed)
        adapter.requires_grad_(True)
        self.objective: Supervised | Dino = (
            Supervised(encoder, adapter, len(source.class_names))
            if config.dino is None
            else Dino(encoder, adapter, config.dino, config.epochs)
        )
        optimizer = torch.optim.AdamW(
            self.objective.parameter_groups(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.decayed = [group["weight_decay"] > 0 for group in optimizer.param_groups]
        self.steps_an_epoch = math.ceil(len(source.labels) / config.batch)
        self.total = config.epochs * self.steps_an_epoch
        self.module, self.optimizer = fabric.setup(self.objective, optimizer)
        self.checkpoints = None if folder is None else Checkpoints(folder / "checkpoints", key)
        self.done = self._restore()
        self.checkpoint_seconds, self.saved, self.overdue = 0.0, time.monotonic(), False
        self.batches = Batches(clip, encoder, source, config, self.objective, fabric, cache)
        self.held_out = None
        if held_out is not None and fabric.is_global_zero:
            self.held_out = HeldOutEvaluator(clip, encoder, held_out, config, fabric, cache)
        if cache is not None and fabric.is_global_zero:
            prune(cache)  # of other settings; files in use stay
        self.log = None
        if folder is not None and fabric.is_global_zero:
            self.log = TrainingLog(folder, self.done, tensorboard)

    def run(
        self,
        report: Callable[[Progress], None] | None,
        report_epoch: Callable[[int, Probe, Probe], None] | None,
        checkpoint_every: int,
        checkpoint_seconds: float,
    ) -> None:
        self.checkpoint_seconds = checkpoint_seconds
        with Interrupt() as interrupt:
            for epoch in range(self.done // self.steps_an_epoch, self.config.epochs):
                self.objective.begin_epoch(epoch)
                for progress in self._epoch(epoch, interrupt):
                    if self.log is not None:
                        values = {"loss": progress.loss, self.objective.metric: progress.accuracy}
                        self.log.step(self.done, progress.epoch, **values, learning_rate=progress.learning_rate)
                    if report is not None and self.fabric.is_global_zero:
                        report(progress)
                    ended = progress.step == self.steps_an_epoch
                    if ended and self.held_out is not None:
                        self._measure(epoch, report_epoch)
                    due = checkpoint_every and self.done % checkpoint_every == 0
                    if ended or due or self.overdue or interrupt.everywhere:
                        self._save()
                    if interrupt.everywhere:
                        raise KeyboardInterrupt(f"stopped after step {self.done} of {self.total}")

    def close(self) -> None:
        self.batches.close()
        for part in (self.held_out, self.log):
            if part is not None:
                part.close()

    def _epoch(self, epoch: int, interrupt: Interrupt) -> Iterator[Progress]:
        """Train to the epoch's end, step by step."""
        self.module.train()
        world, first = self.fabric.world_size, self.done % self.steps_an_epoch
        sums, micro, started = torch.zeros(4, device=self.fabric.device), 0, time.perf_counter()
        for part, stems, labels in self.batches.epoch(epoch, first):
            if micro == 0:
                self._set_rates()
                self.optimizer.zero_grad()
            # Dropout depends on the step, not on the point where training resumed.
            torch.manual_seed(hash_seed(self.config.seed, self.done, self.fabric.global_rank, micro))
            with self.fabric.no_backward_sync(self.module) if world > 1 and not part.last else nullcontext():
                loss, right = self.module(stems, labels, part.weight)
                self.fabric.backward(loss * (world / part.step_pictures))
            sums[0] += loss.detach() / part.step_pictures
            sums[1] += right / part.step_pictures
            micro += 1
            if not part.last:
                continue
            if self.config.clip_grad:
                self.fabric.clip_gradients(self.module, self.optimizer, max_norm=self.config.clip_grad)
            self.optimizer.step()
            self.done += 1
            self.objective.after_step(self.done / self.total, self._sum)
            overdue = 0 < self.checkpoint_seconds <= time.monotonic() - self.saved
            sums[2], sums[3] = float(interrupt.requested), float(overdue)
            reported = self._sum(sums).tolist()
            interrupt.everywhere, self.overdue = reported[2] > 0, reported[3] > 0
            seconds = time.perf_counter() - started
            step = (self.done - 1) % self.steps_an_epoch + 1
            rate = self.optimizer.param_groups[0]["lr"]
            yield Progress(
                epoch + 1, step, self.steps_an_epoch, reported[0], reported[1], rate, part.step_pictures, seconds
            )
            sums, micro, started = torch.zeros_like(sums), 0, time.perf_counter()

    def _set_rates(self) -> None:
        for group, decayed in zip(self.optimizer.param_groups, self.decayed, strict=True):
            group["lr"] = self.config.learning_rate_at(self.done, self.steps_an_epoch)
            if decayed:
                group["weight_decay"] = self.config.weight_decay_at(self.done, self.steps_an_epoch)

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        reduced = self.fabric.all_reduce(values, reduce_op="sum")
        assert isinstance(reduced, torch.Tensor)
        return reduced

    def _measure(self, epoch: int, report_epoch: Callable[[int, Probe, Probe], None] | None) -> None:
        assert self.held_out is not None
        plain, adapted = self.held_out.measure(self.objective.result())
        if self.log is not None:
            values = {
                f"{kind}_{name}": getattr(probe, name)
                for kind, probe in (("plain", plain), ("adapted", adapted))
                for name in ("overlap_area", "auroc", "linear_probe")
            }
            self.log.epoch(self.done, epoch + 1, **values)
        if report_epoch is not None:
            report_epoch(epoch + 1, plain, adapted)

    def _save(self) -> None:
        """Save a checkpoint: the first process writes it, and all raise if it can't."""
        failed = None
        if self.checkpoints is not None and self.fabric.is_global_zero:
            if self.log is not None:
                self.log.flush()
            tensors = {**self.objective.state_dict(), **flatten_optimizer(self.optimizer.optimizer)}
            try:
                self.checkpoints.save(self.done, tensors, {"precision": self.fabric.strategy.precision.state_dict()})
            except OSError as error:
                failed = error
        failed = self.fabric.broadcast(failed)
        if failed is not None:
            raise failed
        self.saved = time.monotonic()

    def _restore(self) -> int:
        """Load the newest valid checkpoint; returns the number of steps done."""
        if self.checkpoints is None:
            return 0
        checkpoint = self.checkpoints.latest()
        step = checkpoint.step if checkpoint is not None else 0
        check_same(self.fabric, {f"newest checkpoint in {self.checkpoints.folder}": step})
        if checkpoint is None:
            return 0
        state = {name: value for name, value in checkpoint.tensors.items() if not name.startswith("optimizer.")}
        self.objective.load_state_dict(state)
        restore_optimizer(self.optimizer.optimizer, checkpoint.tensors)
        if checkpoint.extra["precision"]:  # empty without a gradient scaler, as on a CPU
            self.fabric.strategy.precision.load_state_dict(checkpoint.extra["precision"])
        log.info("resuming after step %d of %d", step, self.total)
        return step
