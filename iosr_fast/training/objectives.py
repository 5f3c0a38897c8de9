"""What a training minimises: cross entropy of labels, or DINO without labels. Both train the adapter of a frozen CLIP.

An objective has the training loop's five calls: `views` (pictures to batches for the frozen stem), the module's own
call (the stem's outputs to the sum of the losses), `begin_epoch`, `after_step` and `result` (the trained adapter).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from iosr_fast.backbones.adapter import Adapter
from iosr_fast.exceptions import IosrFastError
from iosr_fast.training.adapted_encoder import AdaptedEncoder
from iosr_fast.training.augment import augment_batch
from iosr_fast.training.config import DinoConfig
from iosr_fast.utils.require import require

GLOBAL = 2
Stem = tuple[torch.Tensor, torch.Tensor]
Reduce = Callable[[torch.Tensor], torch.Tensor]


class Supervised(nn.Module):
    """Cross entropy of head(tail(adapter, stem)), a linear head on the un-normalised embedding, against the labels.

    `views` turns pictures (B, 3, S, S) in [0, 1] into the batches for the frozen stem. Calling the module on the stem's
    outputs returns the sum of the losses over the B pictures and the number of them that `metric` counts as right, both
    times `weight`.
    """

    metric = "accuracy"

    def __init__(self, encoder: AdaptedEncoder, adapter: Adapter, classes: int) -> None:
        super().__init__()
        self.encoder = encoder  # not an nn.Module, so the frozen CLIP is neither saved nor synchronised
        self.adapter = adapter
        self.head = nn.Linear(encoder.output_dim, classes)

    def views(self, images: torch.Tensor, drawn: torch.Tensor | None) -> list[torch.Tensor]:
        return [images if drawn is None else augment_batch(images, drawn)]

    def forward(
        self, stems: Sequence[Stem], labels: torch.Tensor, weight: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.head(self.encoder.tail(self.adapter, *stems[0]))
        return weight * F.cross_entropy(logits, labels, reduction="sum"), weight * (logits.argmax(1) == labels).sum()

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [*self.adapter.parameters(), *self.head.parameters()]}]

    def begin_epoch(self, epoch: int) -> None:
        pass

    def after_step(self, share: float, reduce_sum: Reduce) -> None:
        pass

    def result(self) -> Adapter:
        return self.adapter


class ProjectionHead(nn.Module):
    """DINO's head: three linear layers with GELU, L2 normalisation, cosines with `out_dim` prototypes."""

    def __init__(self, width: int, config: DinoConfig) -> None:
        super().__init__()
        hidden, bottleneck = config.hidden, config.head_bottleneck
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.empty(config.out_dim, bottleneck))
        nn.init.kaiming_uniform_(self.prototypes, a=5**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.normalize(self.mlp(x), dim=-1), F.normalize(self.prototypes, dim=-1))


class Dino(nn.Module):
    """The self-supervised objective (Caron et al., ICCV 2021), on the adapter alone.

    Student and teacher share the frozen CLIP and differ in adapter and projection head; the teacher's are a moving
    average of the student's. Both see the same two global crops, so the frozen stem runs once for both.

        loss = mean over v != g of - <softmax((teacher(g) - center) / t_teacher), log softmax(student(v) / t_student)>

    g runs over the 2 global crops, v over all crops. The result is the teacher's adapter, as in the public code.
    """

    metric = "agreement"

    def __init__(self, encoder: AdaptedEncoder, adapter: Adapter, config: DinoConfig, epochs: int) -> None:
        super().__init__()
        self.encoder = encoder  # not an nn.Module, so the frozen CLIP is neither saved nor synchronised
        self.config, self.epochs = config, epochs
        self.student, self.student_head = adapter, ProjectionHead(encoder.output_dim, config)
        self.student_head.requires_grad_(config.train_head)
        self.teacher = copy.deepcopy(adapter).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.student_head).requires_grad_(False)
        self.center = nn.Buffer(torch.zeros(config.out_dim))
        self._outputs = nn.Buffer(torch.zeros(config.out_dim + 1), persistent=False)  # sum and count
        self.temperature = config.teacher_temperature[0]
        self.crops = _crops(encoder.image_size, local_size(encoder, config), config)

    def train(self, mode: bool = True) -> Dino:
        super().train(mode)
        self.teacher.eval()  # no dropout in the teacher
        return self

    def views(self, images: torch.Tensor, drawn: torch.Tensor | None) -> list[torch.Tensor]:
        """(2B, 3, S, S) global and (L B, 3, s, s) local crops, crop by crop, drawn by the global random generator."""
        first, second, local = self.crops
        crops = [torch.cat([first(images), second(images)])]
        if self.config.local_crops:
            crops.append(torch.cat([local(images) for _ in range(self.config.local_crops)]))
        return crops

    def forward(
        self, stems: Sequence[Stem], labels: torch.Tensor, weight: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            teacher = self.teacher_head(self.encoder.tail(self.teacher, *stems[0])).float()
            self._outputs.add_(weight * torch.cat([teacher.sum(0), teacher.new_tensor([len(teacher)])]))
            targets = F.softmax((teacher - self.center) / self.temperature, dim=-1).chunk(GLOBAL)
        features = torch.cat([self.encoder.tail(self.student, *stem) for stem in stems])
        student = self.student_head(features).float() / self.config.student_temperature
        logs = F.log_softmax(student, dim=-1).reshape(GLOBAL + self.config.local_crops, len(labels), -1)
        terms = [-(target * logs[v]).sum() for g, target in enumerate(targets) for v in range(len(logs)) if v != g]
        agreement = (targets[0].argmax(1) == logs[1].argmax(1)).sum()
        return weight * torch.stack(terms).sum() / len(terms), weight * agreement

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Weights, then biases, which have no weight decay."""
        trained = [p for p in (*self.student.parameters(), *self.student_head.parameters()) if p.requires_grad]
        return [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def begin_epoch(self, epoch: int) -> None:
        """The teacher's temperature rises linearly over its warm-up epochs. `epoch` counts from 0."""
        low, high = self.config.teacher_temperature
        warmup = min(self.config.teacher_warmup_epochs, self.epochs)
        self.temperature = high if epoch >= warmup else low + (high - low) * epoch / max(1, warmup - 1)

    @torch.no_grad()
    def after_step(self, share: float, reduce_sum: Reduce) -> None:
        """Move teacher and centre. `share` of all steps is done; the momentum rises to 1 along a half cosine."""
        rising = 0.5 * (1 + torch.cos(torch.tensor(share * torch.pi))).item()
        momentum = 1 - (1 - self.config.momentum) * rising
        pairs = ((self.student, self.teacher), (self.student_head, self.teacher_head))
        for student, teacher in pairs:
            for new, old in zip(student.parameters(), teacher.parameters(), strict=True):
                old.lerp_(new, 1 - momentum)
        outputs = reduce_sum(self._outputs.clone())
        self.center.lerp_(outputs[:-1] / outputs[-1], 1 - self.config.center_momentum)
        self._outputs.zero_()

    def result(self) -> Adapter:
        return self.teacher


def local_size(encoder: AdaptedEncoder, config: DinoConfig) -> int:
    """Side of the local crops. Raises ValueError unless it is a multiple of the patch size up to the image size."""
    patch = encoder.patch_size
    size = config.local_size or -(-3 * encoder.image_size // (7 * patch)) * patch
    if size % patch or not patch <= size <= encoder.image_size:
        raise IosrFastError(
            f"expected local_size as a multiple of the patch size {patch} up to {encoder.image_size}, got {size}"
        )
    return size


def _crops(size: int, small: int, config: DinoConfig) -> tuple[Any, Any, Any]:
    """DINO's three augmentations of a batch, each picture with its own draws from the global random generator."""
    v2 = require("torchvision.transforms.v2", "train")

    def crop(side: int, scale: tuple[float, float], blur: float, solarize: float) -> Any:
        cut = v2.RandomResizedCrop(side, scale=scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        change = v2.Compose(
            [
                v2.RandomHorizontalFlip(p=0.5 if config.mirror else 0.0),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                v2.RandomGrayscale(p=0.2),
                v2.RandomApply([v2.GaussianBlur(_odd(side / 10), (0.1, 2.0))], p=blur),
                v2.RandomSolarize(threshold=0.5, p=solarize),
            ]
        )

        @torch.no_grad()
        def augment(images: torch.Tensor) -> torch.Tensor:
            return torch.stack([change(cut(image).clamp(0, 1)) for image in images])  # bicubic resampling overshoots

        return augment

    return (
        crop(size, config.global_scale, blur=1.0, solarize=0.0),
        crop(size, config.global_scale, blur=0.1, solarize=0.2),
        crop(small, config.local_scale, blur=0.5, solarize=0.0),
    )


def _odd(length: float) -> int:
    """The width of a blur's kernel: the odd integer at or above `length`, at least 3."""
    return max(3, 2 * int(length // 2) + 1)
