"""An epoch of supervised adapter training with its evaluation: ours against the recipe of the papers' public code.

    ours            blocks before the first adapter without autograd, their outputs cached on disk in fp16; CLS-only
                    last block; held-out pictures share the frozen part between both embeddings
    ours-unkept     the same without the cache
    public-recipe   the whole encoder under autograd, from the first block's MLP on, as where every block has an adapter
                    (the public code's only way), then two whole encodings of each held-out picture
    pruned-graph    the public recipe where autograd begins at the first adapter, which PyTorch finds by itself

Cases: `first-epoch` (ours computes and writes the cache) and `later-epochs` (ours reads it). All train one adapter
on the same pictures with the same optimizer; pictures are in memory, decoding is not measured. Losses and gradients of
one batch are compared before anything is timed.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from iosr_fast.benchmarks import harness
from iosr_fast.clip.adapter import Adapter, encode_adapted, encode_plain, init_adapter
from iosr_fast.clip.load import LoadedClip, load_clip
from iosr_fast.clip.vision_tower import vision_tower
from iosr_fast.exceptions import IosrFastError
from iosr_fast.export.export import random_adapter
from iosr_fast.training.adapted_encoder import AdaptedEncoder
from iosr_fast.training.data import TensorPictures
from iosr_fast.training.probe import probe
from iosr_fast.training.supervised import Supervised
from iosr_fast.training.train import train_adapter
from iosr_fast.training.train_config import TrainConfig
from iosr_fast.utils.machine import usable_threads

RIVALS = ("public-recipe", "pruned-graph")
CLASSES = 4
# Of gradients, relative to the largest one. The cache is rounded to fp16.
TOLERANCE, CACHED_TOLERANCE = 1e-4, 2e-2


class PublicRecipe:
    """The public code's supervised loop on our adapter; `everywhere`: the graph begins where block 0's adapter adds."""

    def __init__(self, clip: LoadedClip, adapter: Adapter, head: nn.Linear, everywhere: bool) -> None:
        self.clip, self.adapter, self.head, self.everywhere = clip, adapter, head, everywhere
        self.mean, self.std = (torch.tensor(value).view(1, 3, 1, 1) for value in (clip.mean, clip.std))

    def loss(self, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # An adapter in block 0 would have its sum with the MLP's output be the first tensor that needs a gradient.
        mlp = vision_tower(self.clip.model.visual).blocks[0].block.mlp
        hook = mlp.register_forward_hook(lambda module, inputs, output: output.requires_grad_(self.everywhere))
        try:
            features = encode_adapted(self.clip, self.adapter, self._normalise(pixels))
        finally:
            hook.remove()
        return F.cross_entropy(self.head(features), labels)

    def epoch(self, train: TensorPictures, held_out: TensorPictures, config: TrainConfig) -> None:
        parameters = [*self.adapter.requires_grad_(True).parameters(), *self.head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.adapter.train()
        order = train.order(torch.Generator().manual_seed(config.seed))
        for rows, pixels in train.iterate(order, config.batch):
            optimizer.zero_grad()
            loss = self.loss(pixels, train.labels[rows])
            loss.backward()
            optimizer.step()
        self.evaluate(held_out, config.batch)

    @torch.no_grad()
    def evaluate(self, held_out: TensorPictures, batch: int) -> None:
        self.adapter.eval()
        encodings: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
            lambda images: encode_plain(self.clip, images),
            lambda images: encode_adapted(self.clip, self.adapter, images),
        )
        for encode in encodings:
            parts = [
                F.normalize(encode(self._normalise(pixels)), dim=-1).numpy()
                for _, pixels in held_out.iterate(torch.arange(len(held_out.labels)), batch)
            ]
            probe(np.concatenate(parts), held_out.labels.numpy())

    def _normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels.float() / 255 - self.mean) / self.std


def pictures(clip: LoadedClip, count: int, seed: int) -> TensorPictures:
    """Random pixels: they change no speed."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, clip.image_size, clip.image_size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return TensorPictures(images, torch.arange(count) % CLASSES, [str(i) for i in range(CLASSES)])


def verify(clip: LoadedClip, first_adapted_block: int, train: TensorPictures, batch: int) -> None:
    """Raise ArithmeticError unless ours and the public recipe have the same loss and gradients on one batch."""
    adapter = random_adapter(clip, first_adapted_block).eval().requires_grad_(True)
    encoder = AdaptedEncoder(clip, first_adapted_block)
    objective = Supervised(encoder, adapter, CLASSES).eval()
    public = PublicRecipe(clip, adapter, objective.head, everywhere=True)
    pixels, labels = train.images[:batch], train.labels[:batch]

    def gradients(loss: torch.Tensor) -> torch.Tensor:
        grads = torch.autograd.grad(loss, list(objective.parameters()))
        return torch.cat([loss.detach().reshape(1), *(grad.flatten() for grad in grads)])

    truth = gradients(public.loss(pixels, labels))
    stem = encoder.stem(public._normalise(pixels))
    for cached, tolerance in ((False, TOLERANCE), (True, CACHED_TOLERANCE)):
        outputs = (stem[0].half().float(), stem[1].half().float()) if cached else stem
        got = gradients(objective([outputs], labels)[0] / len(labels))
        error = float((got - truth).abs().max() / truth.abs().max())
        if not error <= tolerance:
            raise ArithmeticError(f"ours{' (cached)' * cached} is off by {error:.2g} (allowed: {tolerance}); not timed")


def time_ours(
    clip: LoadedClip, adapter: Adapter, train: TensorPictures, held_out: TensorPictures, config: TrainConfig
) -> list[float]:
    """Milliseconds of each epoch, the first one with all that comes before it."""
    with tempfile.TemporaryDirectory() as folder:
        ends = [time.perf_counter()]
        train_adapter(
            clip,
            adapter,
            train,
            config,
            Path(folder),
            held_out=held_out,
            report_epoch=lambda epoch, plain, adapted: ends.append(time.perf_counter()),
        )
    return [1e3 * (end - start) for start, end in pairwise(ends)]


def run(
    model: str = "ViT-B-16",
    batch: int = 16,
    first_adapted_block: int = 8,
    count: int = 48,
    threads: int | None = None,
    repeats: int = 3,
) -> list[dict[str, Any]]:
    """Verify, then time all, interleaved; one row an implementation and case. `count` pictures an epoch, and a quarter
    as many held out."""
    if count < batch or repeats < 1:
        raise IosrFastError(
            f"expected at least one batch of {batch} pictures and one repeat, got {count} and {repeats}"
        )
    threads = threads or usable_threads()
    clip = load_clip(model, None if model == "demo" else "none")
    train, held_out = pictures(clip, count, 0), pictures(clip, max(4 * CLASSES, count // 4), 1)
    config = TrainConfig(epochs=2, batch=batch, cached_views=1)
    uncached = TrainConfig(epochs=1, batch=batch)
    times: dict[str, dict[str, list[float]]] = {case: {} for case in ("first-epoch", "later-epochs")}

    def fresh() -> Adapter:
        return init_adapter(clip, first_adapted_block)

    with harness.torch_threads(threads):
        verify(clip, first_adapted_block, train, batch)
        for _ in range(repeats):
            first, later = time_ours(clip, fresh(), train, held_out, config)
            epochs_ms = {"ours": (first, later)}
            epochs_ms["ours-unkept"] = (time_ours(clip, fresh(), train, held_out, uncached)[0],) * 2
            for name in RIVALS:
                head = nn.Linear(vision_tower(clip.model.visual).embedding_width, CLASSES)
                recipe = PublicRecipe(clip, fresh(), head, everywhere=name == "public-recipe")
                started = time.perf_counter()
                recipe.epoch(train, held_out, uncached)
                epochs_ms[name] = (1e3 * (time.perf_counter() - started),) * 2
            for name, milliseconds in epochs_ms.items():
                for case, each in zip(times, milliseconds, strict=True):
                    times[case].setdefault(name, []).append(each)
    rows = []
    for case, runtimes_ms in times.items():
        rows += harness.rows(
            "train", case, runtimes_ms, rivals=RIVALS, threads=threads, packages=("torch", "open_clip_torch")
        )
    for row in rows:
        row |= {
            "model": model,
            "batch": batch,
            "first_adapted_block": first_adapted_block,
            "pictures": count,
            "held_out_pictures": len(held_out.labels),
            "images_per_s": round(count / (statistics.median(times[row["case"]][row["impl"]]) * 1e-3), 3),
        }
    return rows
