"""The input of training steps: the frozen stem's outputs, computed or cached, split over processes and accumulation."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from iosr_fast.backbones.load import LoadedModel
from iosr_fast.exceptions import IosrFastError
from iosr_fast.training.adapted_encoder import AdaptedEncoder
from iosr_fast.training.augment import draw_augmentation
from iosr_fast.training.config import TrainConfig
from iosr_fast.training.objectives import Dino, Stem, Supervised
from iosr_fast.training.pictures import PictureSource
from iosr_fast.training.processes import shielded
from iosr_fast.utils.machine import usable_memory

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class MicroBatch:
    """The `rows` of a part of a step's pictures. `last` marks the end of the step.

    `weight` is 0 for a picture that fills the place of a process for which the step has none left. `step_pictures` is
    the number of the step's pictures over all processes.
    """

    rows: torch.Tensor
    weight: float
    step_pictures: int
    last: bool


def split_steps(order: torch.Tensor, config: TrainConfig, world: int, rank: int) -> list[MicroBatch]:
    """The micro-batches of process `rank` of `world` for an epoch's order (or the rest of it), in order.

    Each step takes the next `config.batch` pictures and distributes them to the processes in turn. A process that gets
    none in the last step takes one at weight 0, because gradients are averaged over all processes. Raises ValueError if
    the batch can't be shared evenly.
    """
    size = part_size(config, world)
    batches = []
    for step in order.split(config.batch):
        mine = step[rank::world]
        parts = (mine if len(mine) else step[:1]).split(size)
        batches += [MicroBatch(rows, float(len(mine) > 0), len(step), rows is parts[-1]) for rows in parts]
    return batches


def part_size(config: TrainConfig, world: int) -> int:
    """Pictures of a micro-batch. Raises ValueError if `world` processes can't share the batch evenly."""
    size, uneven = divmod(config.batch, world * config.accumulate)
    if uneven:
        raise IosrFastError(
            f"expected a batch that {world} processes can take in {config.accumulate} equal parts each, got "
            f"{config.batch}; choose a multiple of {world * config.accumulate}"
        )
    return size


class Batches:
    """Micro-batches of the stem's outputs with labels, in an order that depends only on the seed and the epoch.

    With `config.cached_views` V each process keeps the outputs for V views of each picture in memory, in float16.
    Epochs 0 to V - 1 compute a view each, later ones read the views in turn. `prepare` computes them in parts that do
    not depend on the epoch, so that a resumed training reads the same numbers as an uninterrupted one. Raises
    ValueError if the views don't fit into the memory.
    """

    def __init__(
        self,
        clip: LoadedModel,
        encoder: AdaptedEncoder,
        source: PictureSource,
        config: TrainConfig,
        objective: Supervised | Dino,
        fabric: Fabric,
    ) -> None:
        self.encoder, self.source, self.config, self.objective = encoder, source, config, objective
        self.fabric, self.device = fabric, fabric.device
        self.normalise = Normalise(clip, config.normalise, self.device)
        self.cached: dict[int, torch.Tensor] = {}  # by view: (N, 2, tokens, width), the stem's two outputs
        shape = (len(source.labels), 2, *encoder.stem_shape)
        needed = 2 * config.cached_views * math.prod(shape) * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if needed > (there := usable_memory()):
            raise IosrFastError(
                f"expected memory for the cached views, {needed / 1e9:,.3f} GB, got a machine with {there / 1e9:,.3f} "
                "GB; cache fewer views, or none"
            )

    def prepare(self, epoch: int) -> Iterator[None]:
        """Cache the epoch's view of all pictures if there are to be cached views; yields after each shared part."""
        count, fabric = len(self.source.labels), self.fabric
        if not self.config.cached_views or (view := epoch % self.config.cached_views) in self.cached:
            return
        size, world = part_size(self.config, fabric.world_size), fabric.world_size
        rows = torch.arange(-(-count // (size * world)) * size * world) % count  # equally many for each process
        parts = list(rows.view(-1, world, size)[:, fabric.global_rank])
        cached = torch.empty(count, 2, *self.encoder.stem_shape, dtype=torch.float16)
        for i, (stem,) in enumerate(self._computed(parts, epoch, _generator(self.config.seed, -view - 1))):
            rounded = torch.stack(stem, 1).half()
            if not bool(rounded.isfinite().all()):
                raise IosrFastError(
                    "expected outputs of the stem that are finite in float16, got up to "
                    f"{max(float(output.abs().max()) for output in stem):g}; train without cached views"
                )
            together = fabric.all_gather(rounded)
            assert isinstance(together, torch.Tensor)
            place = cached[i * size * world : (i + 1) * size * world]
            place.copy_(together.reshape(-1, *place.shape[1:])[: len(place)])
            yield
        self.cached[view] = cached

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[MicroBatch, list[Stem], torch.Tensor]]:
        """(micro-batch, the stem's outputs for each set of views, labels) from the epoch's step `first_step` on."""
        generator = _generator(self.config.seed, epoch)
        order = torch.randperm(len(self.source.labels), generator=generator)[first_step * self.config.batch :]
        parts = split_steps(order, self.config, self.fabric.world_size, self.fabric.global_rank)
        rows = [part.rows for part in parts]
        stems = self._read(rows, epoch) if self.config.cached_views else self._computed(rows, epoch, generator)
        for part, outputs in zip(parts, stems, strict=True):
            yield part, outputs, self.source.labels[part.rows].to(self.device)

    def _read(self, parts: Sequence[torch.Tensor], epoch: int) -> Iterator[list[Stem]]:
        cached = self.cached[epoch % self.config.cached_views]
        for rows in parts:
            after_attention, after_mlp = cached[rows].to(self.device).float().unbind(1)
            yield [(after_attention, after_mlp)]

    def _computed(self, parts: Sequence[torch.Tensor], epoch: int, generator: torch.Generator) -> Iterator[list[Stem]]:
        """The outputs for each part's rows, in one pass over the source. All parts but the last are equally long."""
        drawn = draw_augmentation(len(self.source.labels), generator) if self.config.augment else None
        pixels = self.source.iterate(torch.cat(list(parts)), len(parts[0])) if parts else iter(())
        for rows, part in zip(parts, shielded(pixels), strict=True):
            images = part.to(self.device).float() / 255
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(hash_seed(self.config.seed, epoch, int(rows[0])))
                views = self.objective.views(images, None if drawn is None else drawn[rows])
            with self.fabric.autocast():
                yield [self.encoder.stem(self.normalise(batch)) for batch in views]


class Normalise:
    """(x - mean) / std for each channel, or x unless `enabled`."""

    def __init__(self, clip: LoadedModel, enabled: bool, device: torch.device) -> None:
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (clip.mean, clip.std))
        self.mean, self.std = (mean, std) if enabled else (torch.zeros_like(mean), torch.ones_like(std))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return (images - self.mean) / self.std


def hash_seed(*parts: int) -> int:
    """A seed from integers such as epoch, step and process, the same in every process, run and version."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % (1 << 62)
    return seed


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)
