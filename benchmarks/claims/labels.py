"""Are several labels of a picture learnt? The demo's pictures are pasted two to an image, of 100 held-out concepts.

map            mean average precision over the concepts on the test images, eight of each concept
expected       the same as expected by left-out support images
f1, predicted  mean F1 of the images' sets of labels; predicted labels over true ones

The rival is scikit-learn's OneVsRestClassifier(LogisticRegression) with the best of five C on the test images.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.multiclass import OneVsRestClassifier

from benchmarks.claims.claim import Claim, Draws, Task, fit, rows_of
from iosr_fast.clip.demo.pictures import POOL, held_out, only
from iosr_fast.clip.load import load_clip
from iosr_fast.clip.prompts import embed_classes
from iosr_fast.evaluation.demo import torch_encoder
from iosr_fast.export.pretrained import choose_adapter
from iosr_fast.utils.ranking import mean_average_precision

CONCEPTS, QUERIES = 100, 8


def pasted(_: Sequence[str], shots: Sequence[int] | None, seeds: int | None) -> list[Any]:
    """The demo as a data set of images with two labels each; each seed has other concepts."""
    clip, every = load_clip("demo"), held_out()[0]
    run = torch_encoder(clip, choose_adapter(clip, "auto"))

    def draw(k: int, seed: int) -> Any:
        rng = np.random.default_rng(seed)
        chosen = rng.permutation(len(every.names))[:CONCEPTS]
        pictures = only(every, np.isin(np.arange(len(every.names)), chosen))
        rows = [rng.permutation(np.flatnonzero(pictures.concepts == c)) for c in range(CONCEPTS)]
        tests, test_labels = paste_pairs(pictures.images, [r[POOL:] for r in rows], QUERIES, rng)
        images, labels = paste_pairs(pictures.images, [r[:POOL] for r in rows], k, rng)
        support = SimpleNamespace(embeddings=run(images), labels=labels, text=embed_classes(clip, pictures.names))
        return SimpleNamespace(support=support, queries=run(tests), labels=test_labels, tau=clip.logit_scale)

    return [SimpleNamespace(name="demo, two to an image", shots=shots or (2, 4, 8), seeds=range(seeds or 3), draw=draw)]


def paste_pairs(pictures: np.ndarray, rows: Sequence[np.ndarray], times: int, rng: Any) -> tuple[np.ndarray, ...]:
    """Images (times * C / 2, S, S, 3) uint8 and labels (times * C / 2, C) bool: each of C concepts is in `times`
    images, left or right of a random other one. `rows` are the pictures of each concept, which are taken in turn."""
    images, labels = [], []
    for turn in range(times):
        for pair in rng.permutation(len(rows)).reshape(-1, 2):
            two = np.hstack([pictures[rows[c][turn % len(rows[c])]] for c in pair])
            height, size = two.shape[:2]
            white = np.full((height // 2, size, 3), 255, np.uint8)
            square = Image.fromarray(np.vstack([white, two, white]))
            images.append(np.asarray(square.resize((height, height), Image.Resampling.BICUBIC)))
            labels.append(np.isin(np.arange(len(rows)), pair))
    return np.stack(images), np.stack(labels)


def draws(task: Task, method: str, seed: int) -> Draws:
    support, queries, labels = task.support, rows_of(task.queries), task.labels
    if method == "auto":
        head = fit(support.embeddings, support.labels.astype(int), support.text, task.tau)
        members = head.predict(queries)
        yield {
            "map": mean_average_precision(labels, head.decision_function(queries)),
            "expected": head.tuned_.average_precision,
            "f1": float(f1_score(labels, members, average="samples")),
            "predicted": float(members.sum() / labels.sum()),
        }
    else:
        rivals = [OneVsRestClassifier(LogisticRegression(C=c, max_iter=300)) for c in (1.0, 10.0, 100.0, 1e3, 1e4)]
        fitted = [rival.fit(rows_of(support.embeddings), support.labels.astype(int)) for rival in rivals]
        yield {"map": max(mean_average_precision(labels, rival.decision_function(queries)) for rival in fitted)}


CLAIM = Claim("labels", __doc__, draws, ("auto", "OneVsRest"), pasted)

if __name__ == "__main__":
    CLAIM.main()
