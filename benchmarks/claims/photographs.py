"""How good is "photographs", the encoder without a download, on photographs? `auto` beside scikit-learn's logistic
regression, both on the embeddings of the engine that a fit opens, without texts.

Data sets are NAME=FOLDER, a folder with class folders in train/ and test/. A seed draws support images from train; all
images of test are the test. Parameters are chosen on the support images: by leave-one-out, and of logistic regression
by cross-validation, where a class has two.
"""

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np

from benchmarks.claims.claim import Claim
from benchmarks.claims.texts import draws
from iosr_fast import Classifier, Embeddings, IosrFastError, labelled_images
from iosr_fast.evaluation.tasks import Task, TaskSource
from iosr_fast.images.preprocess import to_pixels
from iosr_fast.methods.support_set import make_support_set

MODEL, BATCH, SHOTS, SEEDS = "photographs", 64, (1, 2, 4, 8, 16), 3
SETS = {
    "groceries": "Grocery Store Dataset (Klasson et al., WACV 2019; MIT)",
    "clothing": "clothing-dataset-small (Grigorev and contributors; CC0)",
}


def sources(words: Sequence[str], shots: Sequence[int] | None, seeds: int | None) -> list[TaskSource]:
    found = []
    for name, _, folder in (word.partition("=") for word in words):
        if not Path(folder, "train").is_dir():
            raise IosrFastError(f"expected NAME=FOLDER with train/ and test/ in FOLDER, got {name}={folder}")
        counts = tuple(shots or SHOTS), tuple(range(seeds or SEEDS))
        found.append(TaskSource(SETS.get(name, name), *counts, partial(draw, Path(folder))))
    return found


def draw(folder: Path, shots: int, seed: int) -> Task:
    """`shots` images of each class of train, in an order that fewer of the same seed share; a smaller class has all."""
    images, labels, names = encoded(folder / "train")
    queries, truth, others = encoded(folder / "test")
    if names != others:
        raise IosrFastError(f"expected the same classes in train/ and test/ of {folder}")
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = np.concatenate([order[labels[order] == c][:shots] for c in range(len(names))])
    return Task(make_support_set(images[chosen], labels[chosen], None, 100.0, len(names)), queries, truth)


@cache
def encoded(folder: Path) -> tuple[Embeddings, np.ndarray, list[str]]:
    """The embeddings of a folder's images, their classes and the names of these."""
    images = labelled_images(folder, nested=True)
    return embedded(images.paths), np.searchsorted(images.class_names, images.labels), images.class_names


def embedded(paths: Sequence[Path]) -> Embeddings:
    encoder, parts = Classifier(MODEL).encoder, [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
    return Embeddings.concatenate([encoder.encode(to_pixels(part, encoder.geometry)) for part in parts])


CLAIM = Claim("photographs", __doc__, draws, ("auto", "LogisticRegression"), sources)

if __name__ == "__main__":
    CLAIM.main()
