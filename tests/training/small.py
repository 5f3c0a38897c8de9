"""Small pictures, adapters and folders to train on."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from PIL import Image


def colours(count: int = 30) -> Any:
    """Three classes that differ by a colour."""
    import torch

    from iosr_fast.training.pictures import TensorPictures

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 120, (count, 3, 64, 64), generator=generator, dtype=torch.uint8)
    images[torch.arange(count), labels] += 100
    return TensorPictures(images, labels, ["red", "green", "blue"])


def fresh(clip: Any, first: int = 5, bottleneck: int = 8, **more: Any) -> Any:
    from iosr_fast.backbones.adapter import init_adapter

    return init_adapter(clip, first, bottleneck, **more)


def weights(adapter: Any) -> Any:
    import torch

    return torch.cat([value.flatten() for value in adapter.parameters()])


def write_folder(folder: Path, each: int) -> None:
    for name in ("red", "blue"):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            Image.new("RGB", (80 + i, 70), name).save(folder / name / f"{i}.png")


def logged(folder: Path) -> list[dict[str, str]]:
    """The rows of all runs' metrics.csv, of repeated steps the last, in the order of steps."""
    rows: dict[int, dict[str, str]] = {}
    for path in sorted((folder / "log").glob("version_*/metrics.csv")):
        with path.open(newline="") as file:
            rows |= {int(row["step"]): row for row in csv.DictReader(file)}
    return [rows[step] for step in sorted(rows)]
