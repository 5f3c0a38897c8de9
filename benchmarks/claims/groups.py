"""What does leave-one-out say of bursts? Four crops, turns and lights stand for each of the demo's held-out pictures.

expected, accuracy  by left-out support images, and on bursts of other pictures of the same concepts
covered             the share of label sets that have the label, of 90% promised
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from benchmarks.claims.claim import Claim, Draws, Task, fit, rows_of
from iosr_fast.clip.demo.pictures import POOL, held_out, only
from iosr_fast.clip.load import load_clip
from iosr_fast.clip.prompts import embed_classes
from iosr_fast.evaluation.demo import torch_encoder
from iosr_fast.export.pretrained import choose_adapter

CONCEPTS, BURST = 100, 4


def bursts(_: Sequence[str], shots: Sequence[int] | None, seeds: int | None) -> list[Any]:
    """The demo as a data set of bursts; each seed has other concepts."""
    clip, every = load_clip("demo"), held_out()[0]
    run = torch_encoder(clip, choose_adapter(clip, "auto"))

    def draw(k: int, seed: int) -> Any:
        rng = np.random.default_rng(seed)
        pictures = only(every, np.isin(np.arange(len(every.names)), rng.permutation(len(every.names))[:CONCEPTS]))
        rows = [rng.permutation(np.flatnonzero(pictures.concepts == c)) for c in range(CONCEPTS)]
        groups, tests = (np.repeat(np.concatenate([r[p] for r in rows]), BURST) for p in (slice(k), slice(POOL, None)))
        images, queries = (run(np.stack([variant(pictures.images[i], rng) for i in part])) for part in (groups, tests))
        known = {"text": embed_classes(clip, pictures.names), "tau": clip.logit_scale, "groups": groups}
        support = SimpleNamespace(embeddings=images, labels=pictures.concepts[groups], **known)
        return SimpleNamespace(support=support, queries=queries, labels=pictures.concepts[tests])

    return [SimpleNamespace(name="demo, bursts of 4", shots=shots or (2, 4), seeds=range(seeds or 3), draw=draw)]


def variant(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A picture turned by up to 15 degrees, with 80 to 100% of its sides, and as much as a third lighter or darker."""
    image = Image.fromarray(picture).rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, fillcolor=(255, 255, 255))
    size = image.width * rng.uniform(0.8, 1.0)
    left, top = rng.uniform(0, image.width - size, 2)
    crop = image.resize(image.size, Image.Resampling.BICUBIC, (left, top, left + size, top + size))
    return np.asarray(ImageEnhance.Brightness(crop).enhance(rng.uniform(0.67, 1.33)))


def draws(task: Task, method: str, seed: int) -> Draws:
    support, queries = task.support, rows_of(task.queries)
    for of, groups in (("without groups", None), ("bursts as groups", support.groups)):
        head = fit(support.embeddings, support.labels, support.text, support.tau, method, groups)
        sets = head.predict_sets(queries, 0.9)
        covered = float(np.mean([label in one for label, one in zip(task.labels, sets, strict=True)]))
        accuracy = float((head.predict(queries) == task.labels).mean())
        yield {"of": of, "expected": head.tuned_.accuracy, "accuracy": accuracy, "covered": covered}


CLAIM = Claim("groups", __doc__, draws, sources=bursts)

if __name__ == "__main__":
    CLAIM.main()
