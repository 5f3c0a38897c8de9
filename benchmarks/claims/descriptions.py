"""What are descriptions worth beside class names? The demo's held-out concepts, described by their keywords.

A concept has up to three texts, "a picture of KEYWORD", of keywords (Emojibase, MIT) that its name has not; a concept
without any has the words of its group. This form was chosen on the validation concepts, which are not measured here.
Accuracy on the test images of the CLIP's prompts alone (names), with descriptions (both), and of these alone; 0 shots
are the text embeddings alone.
"""

from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.claims.claim import Claim, Draws, Task, fit, rows_of
from iosr_fast.backbones.demo.pictures import held_out, load_index
from iosr_fast.backbones.load import load_clip
from iosr_fast.backbones.prompts import embed_classes
from iosr_fast.evaluation.features import open_sources


def described(_: Sequence[str], shots: Sequence[int] | None, seeds: int | None) -> list[Any]:
    """The demo as a data set that has 0 shots too."""
    (source,) = open_sources(["demo"], seeds=seeds)

    def draw(k: int, seed: int) -> Any:
        return SimpleNamespace(**vars(source.draw(max(k, 1), seed)), shots=k)

    return [SimpleNamespace(name=source.name, shots=shots or (0, 1, 2, 4), seeds=source.seeds, draw=draw)]


def descriptions(concept: dict[str, Any]) -> list[str]:
    words = [word for word in concept["keywords"] if word not in concept["name"].lower().split()]
    return [f"a picture of {word}" for word in words[:3] or [concept["subgroup"]]]


@cache
def texts() -> dict[str, np.ndarray]:
    """Text embeddings (C, D) of the test concepts, by what they are made of."""
    clip, names = load_clip("demo"), held_out()[0].names
    own = {concept["name"]: descriptions(concept) for concept in load_index()["concepts"]}
    made = {"names": (None, None), "both": (None, own), "descriptions": ([], own)}
    return {of: embed_classes(clip, names, *given) for of, given in made.items()}


def draws(task: Task, method: str, seed: int) -> Draws:
    for of, text in texts().items():
        predicted = (task.queries.plain @ text.T).argmax(1)
        if task.shots:
            head = fit(task.support.embeddings, task.support.labels, text, task.support.tau, method)
            predicted = head.predict(rows_of(task.queries))
        yield {"of": of, "accuracy": float((predicted == task.labels).mean())}


CLAIM = Claim("descriptions", __doc__, draws, sources=described)

if __name__ == "__main__":
    CLAIM.main()
