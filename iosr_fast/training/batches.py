"""The input of training steps: the frozen stem's outputs, computed or cached, split over processes and accumulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from iosr_fast.clip.load import LoadedClip
from iosr_fast.exceptions import IosrFastError
from iosr_fast.training.activation_cache import ActivationCache
from iosr_fast.training.adapted_encoder import AdaptedEncoder
from iosr_fast.training.augment import draw_augmentation
from iosr_fast.training.data import PictureSource
from iosr_fast.training.dino import Dino
from iosr_fast.training.processes import shielded
from iosr_fast.training.supervised import Stem, Supervised
from iosr_fast.training.train_config import TrainConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric

CACHE_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


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

    With `config.cached_views` V the outputs are cached in a memory-mapped file in `folder`: epochs 0 to V - 1 compute
    one view each, later ones read them in turn. Outputs are rounded equally in both cases and always computed in whole
    batches, so an interrupted training reads the same numbers as an uninterrupted one.
    """

    def __init__(
        self,
        clip: LoadedClip,
        encoder: AdaptedEncoder,
        source: PictureSource,
        config: TrainConfig,
        objective: Supervised | Dino,
        fabric: Fabric,
        folder: Path | None,
    ) -> None:
        self.encoder, self.source, self.config, self.objective = encoder, source, config, objective
        self.fabric, self.device = fabric, fabric.device
        self.count, views = len(source.labels), config.cached_views
        self.normalise = Normalise(clip, config.normalise, self.device)
        self.cache: ActivationCache | None = None
        self.augmentations: torch.Tensor | None = None
        if views:
            assert folder is not None
            if config.augment:
                self.augmentations = torch.stack(
                    [draw_augmentation(self.count, _generator(config.seed, -v - 1)) for v in range(views)]
                )
            key = activation_key(clip, encoder, source, config)
            self.cache = open_cache(folder, key, self.count, views, encoder, config)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[MicroBatch, list[Stem], torch.Tensor]]:
        """(micro-batch, the stem's outputs for each set of views, labels) from the epoch's step `first_step` on."""
        generator = _generator(self.config.seed, epoch)
        order = self.source.order(generator)[first_step * self.config.batch :]
        parts = split_steps(order, self.config, self.fabric.world_size, self.fabric.global_rank)
        rows = [part.rows for part in parts]
        if self.cache is None:
            drawn = draw_augmentation(self.count, generator) if self.config.augment else None
            for part, pixels in zip(parts, read_pixels(self.source, rows), strict=True):
                seed = hash_seed(self.config.seed, epoch, int(part.rows[0]))
                stems = self._stems(pixels, None if drawn is None else drawn[part.rows], seed)
                yield part, stems, self._labels(part)
            return
        view = epoch % self.config.cached_views

        def compute(rows: torch.Tensor, pixels: torch.Tensor) -> Stem:
            drawn = None if self.augmentations is None else self.augmentations[view, rows]
            return self._stems(pixels, drawn, 0)[0]

        cached = read_stems(self.cache, self.source, rows, view, compute, self.device)
        for part, stem in zip(parts, cached, strict=True):
            yield part, [stem], self._labels(part)

    def close(self) -> None:
        if self.cache is not None:
            self.cache.close()

    def _stems(self, pixels: torch.Tensor, drawn: torch.Tensor | None, seed: int) -> list[Stem]:
        images = pixels.to(self.device).float() / 255
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            views = self.objective.views(images, drawn)
        with self.fabric.autocast():
            return [self.encoder.stem(self.normalise(view)) for view in views]

    def _labels(self, part: MicroBatch) -> torch.Tensor:
        return self.source.labels[part.rows].to(self.device)


def read_pixels(source: PictureSource, parts: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The pixels of each part's rows, in one pass over the source. All parts but the last are equally long."""
    if not parts:
        return
    # A short part in the middle (at the end of a step) is impossible: only an epoch's last step is short.
    batches = source.iterate(torch.cat(list(parts)), max(len(rows) for rows in parts))
    for expected, (rows, pixels) in zip(parts, shielded(batches), strict=True):
        assert torch.equal(rows, expected)
        yield pixels


def read_stems(
    cache: ActivationCache,
    source: PictureSource,
    parts: Sequence[torch.Tensor],
    view: int,
    compute: Callable[[torch.Tensor, torch.Tensor], Stem],
    device: torch.device,
) -> Iterator[Stem]:
    """The stem's outputs of each part's rows: read from the cache, or computed from the pixels and written to it."""
    missing = [rows for rows in parts if not cache.contains(rows, view)]
    pixels = read_pixels(source, missing)
    waiting = iter(missing)
    next_missing = next(waiting, None)
    for rows in parts:
        outputs = None if rows is next_missing else cache.read(rows, view)
        if outputs is None:
            if rows is next_missing:
                next_missing = next(waiting, None)
                computed = compute(rows, next(pixels))
            else:  # the cached rows are damaged
                computed = compute(rows, next(read_pixels(source, [rows])))
            outputs = tuple(output.to(cache.dtype).cpu() for output in computed)
            cache.write(rows, view, outputs)
        after_attention, after_mlp = (output.to(device).float() for output in outputs)
        yield after_attention, after_mlp


def open_cache(
    folder: Path, key: dict[str, Any], count: int, views: int, encoder: AdaptedEncoder, config: TrainConfig
) -> ActivationCache:
    """The activation cache of the stem's outputs for `count` pictures in `views` views each."""
    return ActivationCache(folder, key, count, views, encoder.stem_shapes(), CACHE_DTYPES[config.cache_precision])


class Normalise:
    """(x - mean) / std for each channel, or x unless `enabled`."""

    def __init__(self, clip: LoadedClip, enabled: bool, device: torch.device) -> None:
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (clip.mean, clip.std))
        self.mean, self.std = (mean, std) if enabled else (torch.zeros_like(mean), torch.ones_like(std))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return (images - self.mean) / self.std


def activation_key(
    clip: LoadedClip, encoder: AdaptedEncoder, source: PictureSource, config: TrainConfig
) -> dict[str, Any]:
    """All that the stem's outputs depend on."""
    return {
        "clip": clip.fingerprint,
        "source": source.fingerprint,
        "first_adapted_block": encoder.first,
        "normalise": config.normalise,
        "augment_seed": config.seed if config.augment else None,
        "precision": config.precision,
        "cache_precision": config.cache_precision,
    }


def hash_seed(*parts: int) -> int:
    """A seed from integers such as epoch, step and process, the same in every process, run and version."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % (1 << 62)
    return seed


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)
