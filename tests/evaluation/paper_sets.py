"""Small data sets for the tests of `evaluate.py paper`: five concepts of the demo."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from iosr_fast.clip.demo.pictures import load_pictures
from iosr_fast.evaluation.paper.model import Model
from iosr_fast.evaluation.paper.store import Wanted
from iosr_fast.evaluation.sets import EvaluationSet
from iosr_fast.images.geometry import Geometry

CLASSES, TRAIN, FIRST = 5, 3, 140
CLIP: Any = SimpleNamespace(
    name="ViT-B-16", fingerprint="clip", image_size=64, geometry=Geometry(64), logit_scale=100.0
)
held_out = lru_cache(load_pictures)  # decoding the demo's sheets takes long


class Pictures:
    """A split in memory. Pictures of the rows in `bad` can't be read."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, keys: list[str], bad: tuple[int, ...] = ()) -> None:
        self.images, self.labels, self.keys, self.bad = images, labels, keys, bad

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, row: int) -> Any:
        if row in self.bad:
            raise OSError("cut off")
        return Image.fromarray(self.images[row])

    def rows(self, rows: Any) -> Pictures:
        return Pictures(self.images[rows], self.labels[rows], [self.keys[row] for row in rows])


def tiny(name: str = "tiny", validation: bool = True, first: int = FIRST) -> EvaluationSet:
    """Five concepts: three pictures of each to train, one to validate, the others to test."""
    pictures = held_out("held-out", min_styles=6)
    rows: dict[str, list[int]] = {"train": [], "val": [], "test": []} if validation else {"train": [], "test": []}
    for c in range(first, first + CLASSES):
        of_class = np.flatnonzero(pictures.concepts == c)
        rows["train"] += of_class[:TRAIN].tolist()
        if validation:
            rows["val"] += of_class[TRAIN : TRAIN + 1].tolist()
        rows["test"] += of_class[TRAIN + 1 :].tolist()
    splits: dict[str, Any] = {
        split: Pictures(
            pictures.images[chosen], pictures.concepts[chosen] - first, [f"{split}/{row}.png" for row in chosen]
        )
        for split, chosen in rows.items()
    }
    names = pictures.names[first : first + CLASSES]
    return EvaluationSet(name, names, ["{}", "a picture of {}"], splits, f"made of {first} {validation}")


def without(data: EvaluationSet, *splits: str) -> EvaluationSet:
    return replace(data, splits={name: split for name, split in data.splits.items() if name not in splits})


def write_dtd(root: Path, suffix: str = "bmp") -> Path:
    """DTD in CoOp's layout, of tiny's pictures; as bitmaps all files have one size."""
    parts: dict[str, list[list[Any]]] = {}
    for split, pictures in tiny().splits.items():
        parts[split] = []
        for row, label in enumerate(pictures.labels.tolist()):
            place = f"class{label}/{split}{row}.{suffix}"
            (root / "dtd/images" / place).parent.mkdir(parents=True, exist_ok=True)
            pictures.image(row).save(root / "dtd/images" / place)
            parts[split].append([place, label, f"class {label}"])
    (root / "dtd/split_zhou_DescribableTextures.json").write_text(json.dumps(parts))
    return root


def model(adapter: str | None = "adapter", engine: str = "engine", **clip: Any) -> Model:
    """A model that encodes nothing."""
    source = ("ViT-B-16", "openai", None, "torch")
    return Model(SimpleNamespace(**{**vars(CLIP), **clip}), adapter, engine, source)


def wanted(views: int = 3, **more: Any) -> Wanted:
    arguments = {"data": tiny(), "split": "train", "rows": np.arange(6), "views": views, "mirror": True, "seed": 1}
    return Wanted(**{**arguments, **more})
