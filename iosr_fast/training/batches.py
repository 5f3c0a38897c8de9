"""The input of training steps: the frozen stem's outputs, computed or cached, split over processes and accumulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from iosr_fast.backbones.load import LoadedModel
from iosr_fast.exceptions import IosrFastError
from iosr_fast.training.activation_cache import ActivationCache
from iosr_fast.training.adapted_encoder import AdaptedEncoder
from iosr_fast.training.augment import draw_augmentation
from iosr_fast.training.config import TrainConfig
from iosr_fast.training.objectives import Dino, Stem, Supervised
from iosr_fast.training.pictures import PictureSource
from iosr_fast.training.processes import shielded

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

    With `config.cached_views` V the outputs are cached in memory: epochs 0 to V - 1 compute one view each, later ones
    read them in turn. Outputs are rounded equally in both cases.
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
        views = config.cached_views
        self.cache = ActivationCache(len(source.labels), views, (2, *encoder.stem_shape)) if views else None

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[MicroBatch, list[Stem], torch.Tensor]]:
        """(micro-batch, the stem's outputs for each set of views, labels) from the epoch's step `first_step` on."""
        count, seed = len(self.source.labels), self.config.seed
        generator = _generator(seed, epoch)
        order = torch.randperm(count, generator=generator)[first_step * self.config.batch :]
        parts = split_steps(order, self.config, self.fabric.world_size, self.fabric.global_rank)
        view = epoch % max(1, self.config.cached_views)
        if self.cache is not None:
            generator = _generator(seed, -view - 1)
        drawn = draw_augmentation(count, generator) if self.config.augment else None

        def compute(rows: torch.Tensor, pixels: torch.Tensor) -> list[Stem]:
            images = pixels.to(self.device).float() / 255
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(hash_seed(seed, epoch, int(rows[0])))
                views = self.objective.views(images, None if drawn is None else drawn[rows])
            with self.fabric.autocast():
                return [self.encoder.stem(self.normalise(batch)) for batch in views]

        stems = read_stems(self.source, [part.rows for part in parts], compute, self.cache, view, self.device)
        for part, outputs in zip(parts, stems, strict=True):
            yield part, outputs, self.source.labels[part.rows].to(self.device)


def read_stems(
    source: PictureSource,
    parts: Sequence[torch.Tensor],
    compute: Callable[[torch.Tensor, torch.Tensor], list[Stem]],
    cache: ActivationCache | None,
    view: int,
    device: torch.device,
) -> Iterator[list[Stem]]:
    """The stem's outputs of each part's rows: computed from the pixels, or read from the cache where they are there.

    All parts but the last are equally long.
    """
    missing = [rows for rows in parts if cache is None or not cache.contains(rows, view)]
    pixels, unread = read_pixels(source, missing), {id(rows) for rows in missing}
    for rows in parts:
        stems = compute(rows, next(pixels)) if id(rows) in unread else []
        if cache is None:
            yield stems
            continue
        cached = cache.write(rows, view, torch.stack(stems[0])) if stems else cache.read(rows, view)
        after_attention, after_mlp = cached.to(device).float()
        yield [(after_attention, after_mlp)]


def read_pixels(source: PictureSource, parts: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The pixels of each part's rows, in one pass over the source. All parts but the last are equally long."""
    if parts:
        yield from shielded(source.iterate(torch.cat(list(parts)), max(len(rows) for rows in parts)))


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
