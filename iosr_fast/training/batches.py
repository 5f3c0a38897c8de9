"""What goes into a training step: the frozen stem's outputs, computed or kept, cut for processes and accumulation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from iosr_fast.clip.load import LoadedClip
from iosr_fast.training.activation_cache import ActivationCache
from iosr_fast.training.adapted_encoder import AdaptedEncoder
from iosr_fast.training.augment import draw_augmentation
from iosr_fast.training.data import PictureSource
from iosr_fast.training.interrupt import sheltered
from iosr_fast.training.supervised import Objective, Stem
from iosr_fast.training.train_config import TrainConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric

KEPT_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class MicroBatch:
    """A part of a step's pictures. `weight` is 0 for a picture that only keeps this process in step with the others.

    `step_pictures` counts the step's pictures over all processes; `last` says that the step ends here.
    """

    rows: torch.Tensor
    weight: float
    step_pictures: int
    last: bool


def cut(order: torch.Tensor, config: TrainConfig, world: int, rank: int) -> list[MicroBatch]:
    """The micro-batches of process `rank` of `world` for an epoch's order (or what is left of it), in order.

    Each step takes the next `config.batch` pictures, dealt to the processes in turn; a process that the last step has
    none for takes one at weight 0, because the gradients are averaged over all. Raises ValueError where the batch can't
    be shared evenly.
    """
    size = part_size(config, world)
    made = []
    for step in order.split(config.batch):
        mine = step[rank::world]
        parts = (mine if len(mine) else step[:1]).split(size)
        made += [MicroBatch(rows, float(len(mine) > 0), len(step), rows is parts[-1]) for rows in parts]
    return made


def part_size(config: TrainConfig, world: int) -> int:
    """Pictures of a micro-batch. Raises ValueError where `world` processes can't share the batch evenly."""
    size, uneven = divmod(config.batch, world * config.accumulate)
    if uneven:
        raise ValueError(
            f"expected a batch that {world} processes can take in {config.accumulate} equal parts each, got "
            f"{config.batch}; a multiple of {world * config.accumulate} does"
        )
    return size


class Batches:
    """Micro-batches of the stem's outputs with labels, in an order that only the seed and the epoch set.

    With `config.cached_views` V the outputs are kept in a memory-mapped file in `folder`: epochs 0 to V - 1 compute a
    view each, later ones read them in turn. They are rounded alike in both cases, and always computed by whole batches,
    so that it makes no difference to a training whether it was interrupted.
    """

    def __init__(
        self,
        clip: LoadedClip,
        encoder: AdaptedEncoder,
        source: PictureSource,
        config: TrainConfig,
        objective: Objective,
        fabric: Fabric,
        folder: Path | None,
    ) -> None:
        self.encoder, self.source, self.config, self.objective = encoder, source, config, objective
        self.fabric, self.device = fabric, fabric.device
        self.count = len(source.labels)
        self.normalise = Normalise(clip, config.normalise, self.device)
        self.kept: ActivationCache | None = None
        self.views_drawn: torch.Tensor | None = None
        if config.cached_views:
            assert folder is not None
            if config.augment:
                drawn = [
                    draw_augmentation(self.count, _generator(config.seed, -v - 1)) for v in range(config.cached_views)
                ]
                self.views_drawn = torch.stack(drawn)
            self.kept = ActivationCache(
                folder,
                prefix_key(clip, encoder, source, config),
                self.count,
                config.cached_views,
                encoder.stem_shapes(),
                KEPT_DTYPES[config.kept_precision],
            )

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[MicroBatch, list[Stem], torch.Tensor]]:
        """(micro-batch, the stem's outputs for each set of views, labels) from the epoch's step `first_step` on."""
        generator = _generator(self.config.seed, epoch)
        order = self.source.order(generator)[first_step * self.config.batch :]
        parts = cut(order, self.config, self.fabric.world_size, self.fabric.global_rank)
        if self.kept is None:
            drawn = draw_augmentation(self.count, generator) if self.config.augment else None
            for part, pixels in self._pixels(parts):
                seed = hash_seed(self.config.seed, epoch, int(part.rows[0]))
                yield part, self._stems(pixels, None if drawn is None else drawn[part.rows], seed), self._labels(part)
            return
        view = epoch % self.config.cached_views
        missing = [part for part in parts if not self.kept.holds(part.rows, torch.full_like(part.rows, view))]
        computed = self._pixels(missing)
        waiting = iter(missing)
        next_missing = next(waiting, None)
        for part in parts:
            kept: tuple[torch.Tensor, ...] | None = None
            if part is next_missing:
                _, pixels = next(computed)
                next_missing = next(waiting, None)
            else:
                kept = self.kept.read(part.rows, torch.full_like(part.rows, view))
                if kept is None:  # what lay there is damaged
                    _, pixels = next(self._pixels([part]))
            if kept is None:
                drawn = None if self.views_drawn is None else self.views_drawn[view, part.rows]
                outputs = self._stems(pixels, drawn, 0)[0]
                kept = tuple(output.to(self.kept.dtype).cpu() for output in outputs)
                self.kept.write(part.rows, torch.full_like(part.rows, view), kept)
            after_attention, after_mlp = (output.to(self.device).float() for output in kept)
            yield part, [(after_attention, after_mlp)], self._labels(part)

    def close(self) -> None:
        if self.kept is not None:
            self.kept.close()

    def _pixels(self, parts: list[MicroBatch]) -> Iterator[tuple[MicroBatch, torch.Tensor]]:
        if not parts:
            return
        # All are equally large but the last of a short step, so that one split of their rows gives them all.
        order, size = torch.cat([part.rows for part in parts]), max(len(part.rows) for part in parts)
        for part, (rows, images) in zip(parts, sheltered(self.source.iterate(order, size)), strict=True):
            assert torch.equal(rows, part.rows)
            yield part, images

    def _stems(self, pixels: torch.Tensor, drawn: torch.Tensor | None, seed: int) -> list[Stem]:
        images = pixels.to(self.device).float() / 255
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            views = self.objective.views(images, drawn)
        with self.fabric.autocast():
            return [self.encoder.stem(self.normalise(view)) for view in views]

    def _labels(self, part: MicroBatch) -> torch.Tensor:
        return self.source.labels[part.rows].to(self.device)


class Normalise:
    """(x - mean) / std a channel, or x where it is left out at training."""

    def __init__(self, clip: LoadedClip, wanted: bool, device: torch.device) -> None:
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (clip.mean, clip.std))
        self.mean, self.std = (mean, std) if wanted else (torch.zeros_like(mean), torch.ones_like(std))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return (images - self.mean) / self.std


def prefix_key(clip: LoadedClip, encoder: AdaptedEncoder, source: PictureSource, config: TrainConfig) -> dict[str, Any]:
    """All that the stem's outputs depend on."""
    return {
        "clip": clip.fingerprint,
        "source": source.fingerprint,
        "first_adapted_block": encoder.first,
        "normalise": config.normalise,
        "augment_seed": config.seed if config.augment else None,
        "precision": config.precision,
        "kept_precision": config.kept_precision,
    }


def hash_seed(*parts: int) -> int:
    """A seed of whole numbers, such as where training is: the same in every process, run and version."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % (1 << 62)
    return seed


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)
