"""The demo's pictures: emoji. A concept is a class; a style, the font that draws it, is a domain."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from iosr_fast.exceptions import IosrFastError

FOLDER = Path(__file__).parent / "data"
# Pictures of a concept that support sets are drawn from; the others are queries, the same for every number of shots.
POOL = 4
Split = Literal["generic", "held-out"]


@dataclass(frozen=True)
class Pictures:
    """Pictures of one split, ordered by concept and then by style."""

    images: np.ndarray  # (N, 64, 64, 3) uint8
    concepts: np.ndarray  # (N,) int64, index into names
    styles: np.ndarray  # (N,) int64, index into style_names
    names: list[str]
    style_names: list[str]


def load_index() -> dict[str, Any]:
    """index.json: geometry of the sheets; source and licence of each style; name, words, split and styles of each
    concept."""
    return json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))


def load_pictures(split: Split, min_styles: int = 4) -> Pictures:
    """Decode the sheets and cut out the pictures of one split.

    Concepts drawn in fewer than `min_styles` styles are omitted, so that few-shot tasks have pictures to classify.
    """
    from PIL import Image

    if split not in ("generic", "held-out"):
        raise IosrFastError(f"expected split 'generic' or 'held-out', got {split!r}")
    index = load_index()
    tile, columns, style_names = index["tile"], index["columns"], list(index["styles"])
    sheets = {
        style: np.asarray(Image.open(FOLDER / f"{style}.webp", formats=["WEBP"]).convert("RGB"))
        for style in style_names
    }
    images: list[np.ndarray] = []
    concepts: list[int] = []
    styles: list[int] = []
    names: list[str] = []
    for position, concept in enumerate(index["concepts"]):
        if concept["split"] != split or len(concept["styles"]) < min_styles:
            continue
        y, x = position // columns * tile, position % columns * tile
        for style in concept["styles"]:
            images.append(sheets[style][y : y + tile, x : x + tile])
            concepts.append(len(names))
            styles.append(style_names.index(style))
        names.append(concept["name"])
    return Pictures(np.stack(images), np.array(concepts), np.array(styles), names, style_names)


def held_out() -> tuple[Pictures, Pictures]:
    """Test concepts, drawn in more than POOL styles, and validation concepts, drawn in exactly POOL."""
    pictures = load_pictures("held-out")
    spare = np.bincount(pictures.concepts) > POOL
    return only(pictures, spare), only(pictures, ~spare)


def only(pictures: Pictures, chosen: np.ndarray) -> Pictures:
    """The pictures of the chosen concepts (a mask over names), renumbered."""
    rows = chosen[pictures.concepts]
    number = np.cumsum(chosen) - 1
    names = [name for name, keep in zip(pictures.names, chosen, strict=True) if keep]
    concepts = number[pictures.concepts[rows]]
    return Pictures(pictures.images[rows], concepts, pictures.styles[rows], names, pictures.style_names)
