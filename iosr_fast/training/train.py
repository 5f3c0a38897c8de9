"""Train the adapter of a frozen CLIP, supervised or by DINO, on one process or many, resumable at any step.

`train_adapter` reads from top to bottom: config, source, batches, step, report, checkpoint. The blocks before the first
adapter run without autograd (or once, with `cached_views`), and the last block computes only the CLS token where the
embedding reads no other, as the compiled encoder does.

Every random draw is a function of the seed, the epoch, the step and the process, and the order of the pictures does not
depend on the number of processes. So, on a CPU, a killed training that resumes from its last checkpoint ends with
exactly the weights of an uninterrupted one.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from iosr_fast.backbones.adapter import Adapter, check_belongs
from iosr_fast.backbones.load import LoadedModel
from iosr_fast.exceptions import IosrFastError
from iosr_fast.training.adapted_encoder import AdaptedEncoder
from iosr_fast.training.batches import Batches, MicroBatch, hash_seed, part_size
from iosr_fast.training.checkpoints import Checkpoint, Checkpoints, flatten_optimizer, restore_optimizer
from iosr_fast.training.config import TrainConfig
from iosr_fast.training.objectives import Dino, Stem, Supervised
from iosr_fast.training.overlap import HeldOutOverlap
from iosr_fast.training.pictures import PictureSource
from iosr_fast.training.processes import Interrupt, check_same, in_first_process, make_fabric, on_device
from iosr_fast.utils.require import require, require_installed

if TYPE_CHECKING:
    from lightning_fabric import Fabric

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReport:
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
    clip: LoadedModel,
    adapter: Adapter,
    source: PictureSource,
    config: TrainConfig,
    folder: Path | None = None,
    report: Callable[[StepReport], None] | None = None,
    *,
    held_out: PictureSource | None = None,
    report_epoch: Callable[[int, float, float], None] | None = None,
    checkpoint_minutes: float = 0.0,
    tensorboard: bool = False,
    fabric: Fabric | None = None,
) -> Adapter:
    """Train `adapter` and return the result on the CPU, in evaluation mode, with the training's facts in its config.

    Without `config.dino` training is supervised (cross entropy of a linear head on the un-normalised adapted embedding)
    and returns `adapter` itself; with it training is self-supervised and returns the teacher's adapter.

    `folder` receives checkpoints (at the end of each epoch, and every `checkpoint_minutes` if above 0) and the log: a
    metrics.csv in log/version_N for each run, with `tensorboard` its events too. Training resumes from the newest whole
    checkpoint in it. Without a folder nothing is written. `held_out` pictures are encoded after each epoch: the areas
    by which their embeddings overlap, plain and adapted, go to `report_epoch` as (epoch, plain, adapted) and into the
    log.

    `fabric` has precision, devices and processes (default: `make_fabric`). All processes make the same call; the first
    one reports, writes and reads checkpoints.

    Raises ValueError for an adapter of another CLIP, fewer than two classes (supervised), a batch that the processes
    can't share, cached views that don't fit into memory, a process with other pictures or another config, or
    checkpoints of another training; KeyboardInterrupt after SIGINT or SIGTERM, once the current step is done and saved;
    OSError if the disk is full, with earlier checkpoints untouched.
    """
    check_belongs(adapter, clip)
    classes = len(source.class_names)
    if config.dino is None and classes < 2:
        raise IosrFastError(f"expected at least two classes to train on, got {classes}: {source.class_names}")
    if not len(source.labels):
        raise IosrFastError("expected pictures to train on, got none")
    fabric = fabric or make_fabric(config.precision)
    part_size(config, fabric.world_size)
    shape = [
        adapter.config.first_adapted_block,
        adapter.config.bottleneck,
        adapter.config.scale,
        adapter.config.dropout,
    ]
    key = {**asdict(config), "clip": clip.fingerprint, "source": source.fingerprint, "adapter": shape}
    check_same(fabric, key)
    checkpoints = Checkpoints(folder / "checkpoints", key) if folder is not None else None

    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(on_device(fabric.device, clip))
        torch.manual_seed(config.seed)
        encoder = AdaptedEncoder(clip, adapter.config.first_adapted_block)
        objective: Supervised | Dino = (
            Supervised(encoder, adapter.requires_grad_(True), classes)
            if config.dino is None
            else Dino(encoder, adapter.requires_grad_(True), config.dino, config.epochs)
        )
        steps_an_epoch = math.ceil(len(source.labels) / config.batch)
        stepper = _Stepper(objective, config, fabric, steps_an_epoch)
        if checkpoints is not None:
            stepper.restore(in_first_process(fabric, checkpoints.latest))
        batches = Batches(clip, encoder, source, config, objective, fabric)
        overlap, loggers = None, []
        if held_out is not None and fabric.is_global_zero and stepper.done < stepper.total:
            overlap = HeldOutOverlap(clip, encoder, held_out, fabric)
        if folder is not None and fabric.is_global_zero:
            loggers = _make_loggers(folder, stepper.done, tensorboard)
            for logger in loggers:
                stack.callback(logger.finalize, "finished")

        interrupt = stack.enter_context(Interrupt())
        saved = time.monotonic()
        for epoch in range(stepper.done // steps_an_epoch, config.epochs):
            objective.begin_epoch(epoch)
            stepper.module.train()
            first = stepper.done % steps_an_epoch
            for _ in batches.prepare(epoch):  # all steps so far are saved
                if any(stepper.any_process(interrupt.requested)):
                    raise stepper.stopped()
            micro_batches = batches.epoch(epoch, first)
            for step in range(first + 1, steps_an_epoch + 1):
                started = time.perf_counter()
                # Step: the outputs of the frozen blocks, loss, gradient, weights.
                loss, accuracy, pictures = stepper.step(micro_batches)
                rate, seconds = stepper.optimizer.param_groups[0]["lr"], time.perf_counter() - started
                overdue = 0 < 60 * checkpoint_minutes <= time.monotonic() - saved
                stop, save = stepper.any_process(interrupt.requested, overdue or step == steps_an_epoch)
                # Report: to the caller, and after an epoch what held-out pictures say; then to the log.
                values = {"epoch": epoch + 1, "loss": loss, objective.metric: accuracy, "learning_rate": rate}
                if report is not None and fabric.is_global_zero:
                    report(StepReport(epoch + 1, step, steps_an_epoch, loss, accuracy, rate, pictures, seconds))
                if step == steps_an_epoch and overlap is not None:
                    adapted = overlap.measure(objective.result())
                    values |= {"plain_overlap_area": overlap.plain, "adapted_overlap_area": adapted}
                    if report_epoch is not None:
                        report_epoch(epoch + 1, overlap.plain, adapted)
                for logger in loggers:
                    logger.log_metrics(values, stepper.done)
                # Checkpoint: after the log, so that a resumed training lacks no line.
                if checkpoints is not None and (stop or save):
                    in_first_process(fabric, partial(checkpoints.save, *stepper.state()))
                    saved = time.monotonic()
                if stop:
                    raise stepper.stopped()
        trained = objective.result().to("cpu")
    facts = {**asdict(config), "pictures": len(source.labels), "classes": classes}
    trained.config = replace(adapter.config, training=facts)
    return trained.eval().requires_grad_(False)


class _Stepper:
    """Takes optimizer steps on one process of a training; `done` of `total` are taken."""

    def __init__(self, objective: Supervised | Dino, config: TrainConfig, fabric: Fabric, steps_an_epoch: int) -> None:
        self.objective, self.config, self.fabric = objective, config, fabric
        self.steps_an_epoch, self.total, self.done = steps_an_epoch, config.epochs * steps_an_epoch, 0
        optimizer = torch.optim.AdamW(
            objective.parameter_groups(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.decayed = [group["weight_decay"] > 0 for group in optimizer.param_groups]
        self.module, self.optimizer = fabric.setup(objective, optimizer)

    def step(self, micro_batches: Iterator[tuple[MicroBatch, list[Stem], torch.Tensor]]) -> tuple[float, float, int]:
        """Take one step, on micro-batches up to the next last one: (loss, accuracy, pictures) over all processes."""
        fabric, world = self.fabric, self.fabric.world_size
        for group, decayed in zip(self.optimizer.param_groups, self.decayed, strict=True):
            group["lr"] = self.config.learning_rate_at(self.done, self.steps_an_epoch)
            if decayed:
                group["weight_decay"] = self.config.weight_decay_at(self.done, self.steps_an_epoch)
        self.optimizer.zero_grad()
        sums, micro, last = torch.zeros(2, device=fabric.device), 0, False
        while not last:
            part, stems, labels = next(micro_batches)
            last = part.last
            # Dropout depends on the step, not on the point where training resumed.
            torch.manual_seed(hash_seed(self.config.seed, self.done, fabric.global_rank, micro))
            with fabric.no_backward_sync(self.module) if world > 1 and not last else nullcontext():
                loss, right = self.module(stems, labels, part.weight)
                fabric.backward(loss * (world / part.step_pictures))
            sums += torch.stack([loss.detach(), right]) / part.step_pictures
            micro += 1
        if self.config.clip_grad:
            fabric.clip_gradients(self.module, self.optimizer, max_norm=self.config.clip_grad)
        self.optimizer.step()
        self.done += 1
        self.objective.after_step(self.done / self.total, self._sum)
        mean_loss, accuracy = self._sum(sums).tolist()
        return mean_loss, accuracy, part.step_pictures

    def any_process(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set in any process."""
        return (self._sum(torch.tensor(flags, dtype=torch.float32, device=self.fabric.device)) > 0).tolist()

    def stopped(self) -> KeyboardInterrupt:
        return KeyboardInterrupt(f"stopped after step {self.done} of {self.total}")

    def state(self) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]]:
        """The arguments of `Checkpoints.save`."""
        tensors = {**self.objective.state_dict(), **flatten_optimizer(self.optimizer.optimizer)}
        return self.done, tensors, {"precision": self.fabric.strategy.precision.state_dict()}

    def restore(self, checkpoint: Checkpoint | None) -> None:
        if checkpoint is None:
            return
        state = {name: value for name, value in checkpoint.tensors.items() if not name.startswith("optimizer.")}
        self.objective.load_state_dict(state)
        restore_optimizer(self.optimizer.optimizer, checkpoint.tensors)
        if checkpoint.extra["precision"]:  # empty without a gradient scaler, as on a CPU
            self.fabric.strategy.precision.load_state_dict(checkpoint.extra["precision"])
        self.done = checkpoint.step
        log.info("resuming after step %d of %d", self.done, self.total)

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        reduced = self.fabric.all_reduce(values, reduce_op="sum")
        assert isinstance(reduced, torch.Tensor)
        return reduced


def _make_loggers(folder: Path, done: int, tensorboard: bool) -> list[Any]:
    """Fabric's loggers of one run: a line of log/version_N/metrics.csv for each step, and TensorBoard's events."""
    loggers = require("lightning_fabric.loggers", "train")
    made = [loggers.CSVLogger(folder, name="log", flush_logs_every_n_steps=1)]
    if tensorboard:
        require_installed("tensorboard", "train")
        # TensorBoard discards the steps of an interrupted run that are repeated.
        made.append(loggers.TensorBoardLogger(folder, name="log", version=made[0].version, purge_step=done + 1))
    return made
