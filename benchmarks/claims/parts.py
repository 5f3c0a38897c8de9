"""Crop against whole picture: accuracy of the demo's held-out concepts, pasted into scenes.

Support images are whole pictures, 4 of each of 100 concepts; each seed has other ones. A test picture lies at a random
place, its side an eighth to a half of the scene's, on white paper or on a picture of another, generic concept, with a
third one beside it. `box` is the exact box of what is drawn, `jittered` one whose edges are each up to 10% of its sides
off, and the numbers are margins; `square` is the exact box grown to its longer side.
"""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.claims.claim import Claim, Draws, Task, fit, rows_of
from iosr_fast.backbones.demo.pictures import POOL, held_out, load_pictures, only
from iosr_fast.backbones.load import load_clip
from iosr_fast.backbones.prompts import embed_classes
from iosr_fast.evaluation.demo import torch_encoder
from iosr_fast.export.pretrained import choose_adapter
from iosr_fast.images.crop import Box, Crop
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.preprocess import to_pixels

CONCEPTS, SCENE, SIDES, MARGINS, JITTER, INK = 100, 256, (32, 48, 64, 96, 128), (0.0, 0.1, 0.25, 0.5), 0.1, 245


def scenes(_: Sequence[str], shots: Sequence[int] | None, seeds: int | None) -> list[Any]:
    """Test pictures pasted on paper and on pictures, as tasks with queries by what of the scene is looked at."""
    clip, every, others = load_clip("demo"), held_out()[0], load_pictures("generic").images
    run = torch_encoder(clip, choose_adapter(clip, "auto"))

    def drawn_on(backgrounds: np.ndarray | None) -> Any:
        def draw(k: int, seed: int) -> Any:
            rng = np.random.default_rng(seed)
            pictures = only(every, np.isin(np.arange(len(every.names)), rng.permutation(len(every.names))[:CONCEPTS]))
            rows = [rng.permutation(np.flatnonzero(pictures.concepts == c)) for c in range(CONCEPTS)]
            s, q = (np.concatenate([one[part] for one in rows]) for part in (slice(k), slice(POOL, None)))
            parts: dict[str, list[Any]] = {"picture itself": list(pictures.images[q])}
            for picture in pictures.images[q]:
                for name, part in looks(*scene(picture, others, backgrounds, rng), rng):
                    parts.setdefault(name, []).append(part)
            queries = {name: run(to_pixels(images, Geometry(64))) for name, images in parts.items()}
            support = SimpleNamespace(embeddings=run(pictures.images[s]), labels=pictures.concepts[s])
            support.text, support.tau = embed_classes(clip, pictures.names), clip.logit_scale
            return SimpleNamespace(support=support, queries=queries, labels=pictures.concepts[q])

        return draw

    counts = {"shots": shots or (4,), "seeds": range(seeds or 10)}
    named = {"demo, pasted on paper": None, "demo, pasted on pictures": others}
    return [SimpleNamespace(name=name, draw=drawn_on(on), **counts) for name, on in named.items()]


def scene(
    picture: np.ndarray, others: np.ndarray, backgrounds: np.ndarray | None, rng: np.random.Generator
) -> tuple[np.ndarray, Box]:
    """A scene (SCENE, SCENE, 3) uint8 with the picture in it, and the box of what is drawn. Another picture is pasted
    before it, which it may cover."""
    canvas = np.full((SCENE, SCENE, 3), 255, np.uint8)
    if backgrounds is not None:
        canvas = resized(backgrounds[rng.integers(len(backgrounds))], SCENE)
    for one in (others[rng.integers(len(others))], picture):
        side = int(rng.choice(SIDES))
        x, y = rng.integers(SCENE - side + 1, size=2).tolist()
        small = resized(one, side)
        drawn = (small < INK).any(2)
        canvas[y : y + side, x : x + side][drawn] = small[drawn]
    (top, *_, bottom), (left, *_, right) = (np.flatnonzero(drawn.any(axis)).tolist() for axis in (1, 0))
    return canvas, Box(x + left, y + top, right + 1 - left, bottom + 1 - top)


def resized(picture: np.ndarray, side: int) -> np.ndarray:
    return np.array(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))


def looks(image: np.ndarray, box: Box, rng: np.random.Generator) -> Iterator[tuple[str, Any]]:
    """The whole scene and its parts, by name."""
    yield "whole scene", image
    left, top, right, bottom = rng.uniform(-JITTER, JITTER, 4)
    x, y = box.x + left * box.width, box.y + top * box.height
    jittered = Box(x, y, box.width * (1 + right - left), box.height * (1 + bottom - top))
    for name, one in {"box": box, "jittered": jittered}.items():
        for margin in MARGINS:
            yield f"{name}, {margin:g}", Crop(image, one.grown(margin))
    side = max(box.width, box.height)
    yield "square", Crop(image, Box(box.x + (box.width - side) / 2, box.y + (box.height - side) / 2, side, side))


def draws(task: Task, method: str, _: int) -> Draws:
    support = task.support
    head = fit(support.embeddings, support.labels, support.text, support.tau, method)
    for name, queries in task.queries.items():
        yield {"of": name, "accuracy": head.score(rows_of(queries), task.labels)}


CLAIM = Claim("parts", __doc__, draws, sources=scenes)

if __name__ == "__main__":
    CLAIM.main()
