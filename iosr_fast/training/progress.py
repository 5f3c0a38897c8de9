"""The progress bar of a training: images per second, time left, and the measures after each epoch."""

from __future__ import annotations

import time

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from iosr_fast.training.config import TrainConfig
from iosr_fast.training.train import StepReport

# The weight of the newest step in the displayed rate.
SMOOTHING = 0.1


class TrainingBar:
    """Shows the reports of `train_adapter` on the terminal if `shown`, which one process of a training sets."""

    def __init__(self, config: TrainConfig, pictures: int, shown: bool = True) -> None:
        self.config, self.shown = config, shown
        self.steps = config.epochs * -(-pictures // config.batch)
        self.metric = "agreement" if config.dino is not None else "right"
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            disable=not shown,
        )
        self.task = self.bar.add_task("train", total=self.steps, epoch=f"1/{config.epochs}", status="")
        self.rate: float | None = None
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def __enter__(self) -> TrainingBar:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def say(self, message: str) -> None:
        if self.shown:
            self.bar.console.print(message, soft_wrap=True, highlight=False)

    def step(self, step: StepReport) -> None:
        now = step.pictures / step.seconds
        self.rate = now if self.rate is None else (1 - SMOOTHING) * self.rate + SMOOTHING * now
        self.bar.update(
            self.task,
            completed=(step.epoch - 1) * step.steps_an_epoch + step.step,
            epoch=f"{step.epoch}/{self.config.epochs}",
            status=f"loss {step.loss:.2f}, {100 * step.accuracy:.0f}% {self.metric}, {self.rate:.0f} images/s",
        )

    def epoch(self, epoch: int, plain: float, adapted: float) -> None:
        self.say(f"epoch {epoch}: overlap of held-out pictures {plain:.3f} plain, {adapted:.3f} adapted")
