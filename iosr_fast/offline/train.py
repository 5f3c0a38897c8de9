"""Supervised training of the adapter: frozen CLIP, a linear head on the un-normalised adapted embedding, cross entropy.

Nothing is done twice: what lies before the first adapter runs without autograd (or once, with `cached_views`), and the
last block computes only the CLS token, as the compiled encoder does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from iosr_fast.offline.adapter import Adapter, check_belongs, vision_blocks
from iosr_fast.offline.augment import augment_batch
from iosr_fast.offline.clip import LoadedClip
from iosr_fast.offline.data import PictureSource


@dataclass(frozen=True)
class TrainConfig:
    """Hyper-parameters. The defaults are the paper's (its supervised variant).

    `normalise`: subtract CLIP's mean and divide by its std at training too. The paper's public code leaves this out at
    training and does it at inference; here it is done unless asked otherwise.
    `cached_views`: compute the frozen part once for this many augmented views of each picture and train on those;
    0 computes it anew each time (no memory, endless augmentation).
    """

    epochs: int = 1
    batch: int = 128
    learning_rate: float = 8e-3
    weight_decay: float = 0.01
    schedule: Literal["constant", "cosine"] = "constant"
    augment: bool = False
    normalise: bool = True
    cached_views: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Progress:
    """After each step: epochs are counted from 1; `loss` and `accuracy` are those of the step's batch."""

    epoch: int
    step: int
    steps_an_epoch: int
    loss: float
    accuracy: float


class AdaptedEncoder:
    """CLIP's image encoder cut at the first adapter: `stem` is frozen, `tail` is what autograd has to see."""

    def __init__(self, clip: LoadedClip, adapter: Adapter) -> None:
        check_belongs(adapter, clip)
        visual = clip.model.visual
        if visual.attn_pool is not None or visual.pool_type != "tok":
            raise ValueError(f"{clip.name} pools its tokens; training needs an encoder that reads its CLS token")
        self.visual, self.adapter = visual, adapter
        self.blocks, self.first = vision_blocks(clip), adapter.config.first_adapted_block
        self.last = len(self.blocks) - 1

    @torch.no_grad()
    def stem(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Up to the first adapter: the stream after attention, and after the MLP too. Both (B, tokens, width)."""
        x = self.visual._embeds(pixels)
        for block in self.blocks[: self.first]:
            x = block(x)
        x = self._attend(self.first, x)
        return x, self._mlp(self.first, x)

    def tail(self, after_attention: torch.Tensor, after_mlp: torch.Tensor) -> torch.Tensor:
        """From the first adapter to the un-normalised embedding (B, D)."""
        x = after_mlp + self.adapter.blocks[str(self.first)](after_attention)
        for i in range(self.first + 1, self.last + 1):
            attended = self._attend(i, x)
            x = self._mlp(i, attended) + self.adapter.blocks[str(i)](attended)
        pooled, _ = self.visual._pool(x)
        projected: torch.Tensor = pooled @ self.visual.proj if self.visual.proj is not None else pooled
        return projected

    def _attend(self, i: int, x: torch.Tensor) -> torch.Tensor:
        block = self.blocks[i]
        normed = block.ln_1(x)
        if i == self.last:  # only the CLS token is read after this block: one query, all keys and values
            x = x[:, :1]
            return x + block.ls_1(block.attn(normed[:, :1], normed, normed, need_weights=False)[0])
        return x + block.ls_1(block.attention(normed))

    def _mlp(self, i: int, x: torch.Tensor) -> torch.Tensor:
        block = self.blocks[i]
        return x + block.ls_2(block.mlp(block.ln_2(x)))


def train_adapter(
    clip: LoadedClip,
    adapter: Adapter,
    source: PictureSource,
    config: TrainConfig,
    checkpoint: Path | None = None,
    report: Callable[[Progress], None] | None = None,
) -> Adapter:
    """Train `adapter` in place and return it in evaluation mode, with the training recorded in its config.

    With `checkpoint` the state is written there after each epoch (atomically), and training goes on from it if it
    exists; an interrupted and resumed training ends with the same weights as an uninterrupted one.

    Raises ValueError for an adapter of another CLIP, fewer than two classes, or a checkpoint of another training.
    """
    classes = len(source.class_names)
    if classes < 2:
        raise ValueError(f"expected at least two classes to train on, got {classes}: {source.class_names}")
    encoder = AdaptedEncoder(clip, adapter)
    torch.manual_seed(config.seed)
    head = nn.Linear(clip.model.visual.output_dim, classes)
    parameters = [*adapter.requires_grad_(True).parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    steps_an_epoch = math.ceil(len(source.labels) / config.batch)
    total = config.epochs * steps_an_epoch
    state = _TrainState(adapter, head, optimizer, config, clip.fingerprint)
    done = state.load(checkpoint) if checkpoint is not None and checkpoint.exists() else 0
    batches = _Batches(clip, encoder, source, config)
    adapter.train()
    for epoch in range(done, config.epochs):
        torch.manual_seed(config.seed * 1_000_003 + epoch + 1)  # dropout does not depend on where training resumed
        for step, (after_attention, after_mlp, labels) in enumerate(batches.epoch(epoch)):
            share = (epoch * steps_an_epoch + step) / total
            if config.schedule == "cosine":
                optimizer.param_groups[0]["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
            logits = head(encoder.tail(after_attention, after_mlp))
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if report is not None:
                accuracy = (logits.argmax(1) == labels).float().mean().item()
                report(Progress(epoch + 1, step + 1, steps_an_epoch, loss.item(), accuracy))
        if checkpoint is not None:
            state.save(checkpoint, epoch + 1)
    facts = {**asdict(config), "pictures": len(source.labels), "classes": classes}
    adapter.config = replace(adapter.config, training=facts)
    return adapter.eval().requires_grad_(False)


class _Batches:
    """The stem's outputs with labels, batch by batch, in an order that depends only on the seed and the epoch."""

    def __init__(self, clip: LoadedClip, encoder: AdaptedEncoder, source: PictureSource, config: TrainConfig) -> None:
        self.encoder, self.source, self.config = encoder, source, config
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (clip.mean, clip.std))
        self.mean, self.std = (mean, std) if config.normalise else (torch.zeros_like(mean), torch.ones_like(std))
        self.cache = self._fill_cache() if config.cached_views else None

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.source.labels), generator=generator)
        if self.cache is not None:
            for rows in order.split(self.config.batch):
                view = torch.randint(self.config.cached_views, (len(rows),), generator=generator)
                after_attention, after_mlp = (part[view, rows].float() for part in self.cache)
                yield after_attention, after_mlp, self.source.labels[rows]
            return
        for rows, pixels in self.source.iterate(order, self.config.batch):
            yield *self._stem(pixels, generator), self.source.labels[rows]

    def _stem(self, pixels: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        images = pixels.float() / 255
        if self.config.augment:
            images = augment_batch(images, generator)
        return self.encoder.stem((images - self.mean) / self.std)

    def _fill_cache(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Two fp16 tensors (views, N, tokens, width)."""
        views, count = self.config.cached_views, len(self.source.labels)
        parts: tuple[torch.Tensor, ...] = ()
        for view in range(views):
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 - view - 1)
            for rows, pixels in self.source.iterate(torch.arange(count), self.config.batch):
                outputs = self._stem(pixels, generator)
                if not parts:
                    _check_memory(sum(o[0].numel() for o in outputs) * 2 * views * count)
                    parts = tuple(torch.empty(views, count, *o.shape[1:], dtype=torch.float16) for o in outputs)
                for part, output in zip(parts, outputs, strict=True):
                    part[view, rows] = output.half()
        return parts[0], parts[1]


def _check_memory(wanted_bytes: int) -> None:
    import os

    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted_bytes > present / 2:
        raise ValueError(
            f"cached_views needs {wanted_bytes / 1e9:.1f} GB for these pictures and this machine has "
            f"{present / 1e9:.1f} GB; use fewer views, or cached_views=0"
        )


class _TrainState:
    """Everything that training goes on from, in one safetensors file."""

    def __init__(
        self, adapter: Adapter, head: nn.Linear, optimizer: torch.optim.Optimizer, config: TrainConfig, clip: str
    ) -> None:
        self.adapter, self.head, self.optimizer = adapter, head, optimizer
        a = adapter.config
        self.key = json.dumps(
            {**asdict(config), "clip": clip, "shape": [a.first_adapted_block, a.bottleneck, a.scale, a.dropout]}
        )

    def save(self, path: Path, epoch: int) -> None:
        from safetensors.torch import save_file

        tensors = {f"adapter.{k}": v.detach().contiguous() for k, v in self.adapter.state_dict().items()}
        tensors |= {f"head.{k}": v.detach().contiguous() for k, v in self.head.state_dict().items()}
        for i, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in entry.items()}
        temporary = path.with_name(path.name + ".tmp")
        save_file(tensors, temporary, metadata={"epoch": str(epoch), "training": self.key})
        temporary.replace(path)

    def load(self, path: Path) -> int:
        """Restore and return the number of epochs done."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise ValueError(f"the checkpoint {path} is damaged ({error}); delete it to start over") from error
        if metadata.get("training") != self.key:
            raise ValueError(
                f"the checkpoint {path} is of another training (expected {self.key}, got {metadata.get('training')}); "
                "delete it, or go on with the settings it was made with"
            )

        def part(prefix: str) -> dict[str, Any]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.adapter.load_state_dict(part("adapter."))
        self.head.load_state_dict(part("head."))
        entries: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in part("optimizer.").items():
            i, name = key.split(".")
            entries.setdefault(int(i), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": entries})
        return int(metadata["epoch"])
