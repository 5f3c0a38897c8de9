"""`iosr-fast evaluate demo --task labels`: the demo's pictures pasted two to an image, each image with two labels.

An image shows pictures of two concepts, left and right or one above the other, on white, and is encoded by the demo's
CLIP. Rivals know one label an image, or none:

    one label       auto on the same images, each given twice, once a label
    zero-shot       cosines of images and texts
    OneVsRest       scikit-learn's OneVsRestClassifier(LogisticRegression), with the best of five C on the test images
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from rich.console import Console

from iosr_fast.clip.demo.pictures import POOL, Pictures, held_out, only
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.evaluation.selection import Options, method_names
from iosr_fast.evaluation.table import Row, percent, print_table
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.multi_label import fit_multi_label, multi_label_reason
from iosr_fast.methods.multi_label_set import MultiLabelSet
from iosr_fast.methods.support_set import make_support_set
from iosr_fast.methods.tuning.binary_loss import sigmoid
from iosr_fast.methods.tuning.tune import tune_auto
from iosr_fast.scoring.reference import softmax
from iosr_fast.scoring.score import score
from iosr_fast.utils.ranking import mean_average_precision
from iosr_fast.utils.require import require

CONCEPTS, QUERIES = 100, 8  # of a seed; test images of each concept
SHOTS = (2, 4, 8)
METHODS = ("auto", "tip-adapter++", "proker++")
ONE_LABEL, ZERO_SHOT, ONE_VS_REST = "one label", "zero-shot", "OneVsRest"
RIVALS = (ONE_LABEL, ZERO_SHOT, ONE_VS_REST, f"{ONE_VS_REST}++")
_CS = (1.0, 10.0, 100.0, 1e3, 1e4)
HEADS = ("method", "shots", "mAP", "left-out mAP", "log-loss", "predicted / true labels", "F1 of images", "F1 at 0.5")


@dataclass(frozen=True)
class Pasted:
    """The images of one seed: support images of the most shots, sorted so that the first shots * C / 2 are those of
    fewer, and test images with their labels (B, C)."""

    support: MultiLabelSet
    queries: Embeddings
    labels: np.ndarray

    def shots(self, shots: int) -> MultiLabelSet:
        rows = np.arange(shots * self.support.n_classes // 2)
        return MultiLabelSet(
            self.support.embeddings[rows], self.support.labels[rows], self.support.text, self.support.tau
        )


class PastedSource:
    """The tasks of each seed, encoded at the first use."""

    name = "demo, two to an image"

    def __init__(self, shots: Sequence[int], seeds: Sequence[int], adapter: Any = "auto") -> None:
        if min(shots) < 1:
            raise IosrFastError(f"expected --shots of at least 1, got {list(shots)}")
        self.shots, self.seeds, self._adapter = tuple(shots), tuple(seeds), adapter

    @cached_property
    def _encoder(self) -> tuple[Any, Callable[[np.ndarray], Embeddings]]:
        from iosr_fast.clip.load import load_clip
        from iosr_fast.evaluation.demo import torch_encoder
        from iosr_fast.export.pretrained import choose_adapter

        clip = load_clip("demo")
        return clip, torch_encoder(clip, choose_adapter(clip, self._adapter))

    def draw(self, seed: int) -> Pasted:
        from iosr_fast.clip.prompts import embed_classes
        from iosr_fast.evaluation.demo import BATCH

        rng = np.random.default_rng(seed)
        pictures, _ = held_out()
        chosen = np.zeros(len(pictures.names), bool)
        chosen[rng.permutation(len(chosen))[:CONCEPTS]] = True
        pictures = only(pictures, chosen)
        rows = [rng.permutation(np.flatnonzero(pictures.concepts == c)) for c in range(CONCEPTS)]
        clip, run = self._encoder
        parts = []
        for of_concepts, times in (([r[:POOL] for r in rows], max(self.shots)), ([r[POOL:] for r in rows], QUERIES)):
            images, labels = paste_pairs(pictures, of_concepts, times, rng)
            encoded = [run(some) for some in np.array_split(images, -(-len(images) // BATCH))]
            parts.append((Embeddings.concatenate(encoded), labels))
        support = MultiLabelSet(*parts[0], embed_classes(clip, pictures.names), clip.logit_scale)
        return Pasted(support, *parts[1])


def paste_pairs(
    pictures: Pictures, rows: Sequence[np.ndarray], times: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Images (times * C / 2, S, S, 3) uint8 and labels (times * C / 2, C) bool: each of an even number C of concepts is
    in `times` images, beside a random other one. `rows` are the pictures of each concept, which are taken in turn."""
    images, labels = [], []
    for turn in range(times):
        for pair in rng.permutation(len(rows)).reshape(-1, 2):
            one, other = (pictures.images[rows[c][turn % len(rows[c])]] for c in pair)
            images.append(paste(one, other, bool(rng.integers(2))))
            labels.append(np.isin(np.arange(len(rows)), pair))
    return np.stack(images), np.stack(labels)


def paste(one: np.ndarray, other: np.ndarray, beside: bool) -> np.ndarray:
    """Two pictures (S, S, 3) on one of that size: beside each other, or the first above the other, on white."""
    from PIL import Image

    size = len(one)
    canvas = np.full((2 * size, 2 * size, 3), 255, np.uint8)
    half = slice(size // 2, size // 2 + size)
    for picture, place in ((one, slice(0, size)), (other, slice(size, 2 * size))):
        canvas[(half, place) if beside else (place, half)] = picture
    return np.asarray(Image.fromarray(canvas).resize((size, size), Image.Resampling.BICUBIC))


def run(sources: Sequence[PastedSource], options: Options, out: Console) -> list[dict[str, Any]]:
    """Print a table, and return its rows: one a method and number of shots."""
    names = method_names(options.methods or (*METHODS, *RIVALS), {"rivals": RIVALS})
    for name in names:
        if name not in RIVALS and (reason := multi_label_reason(name)) is not None:
            raise IosrFastError(reason)
    if options.reducers or options.tune == "validation":
        raise IosrFastError("expected neither --reducers nor --tune validation with --task labels, got one")
    rows: list[dict[str, Any]] = []
    for source in sources:
        tasks = [(seed, source.draw(seed)) for seed in source.seeds]
        for name in names:
            for shots in source.shots:
                draws = [{"seed": seed, **measure(name, task, shots)} for seed, task in tasks]
                rows.append(_row(source, name, shots, draws))
                options.report(f"{source.name}: {name}, shots {shots}: mAP {100 * rows[-1]['map']:.1f}")
    _print(out, rows)
    return rows


def measure(name: str, task: Pasted, shots: int) -> dict[str, Any]:
    """One method on the test images: the mean average precision `map` and, of a method with probabilities of its own,
    log-loss, the number of predicted labels over that of true ones, and the mean F1 of the images' sets of labels."""
    support, labels = task.shots(shots), task.labels
    if name not in RIVALS or name == ZERO_SHOT:
        fit = fit_multi_label(support, name)
        logits = score(fit.plan, task.queries).astype(np.float64)
        found = {"map": mean_average_precision(labels, logits)}
        if name == ZERO_SHOT:  # cosines know no threshold
            return found
        probabilities = sigmoid(logits)
        members = probabilities >= fit.thresholds
        return {
            **found,
            "left_out_map": fit.average_precision,
            "log_loss": float((np.logaddexp(0.0, logits) - labels * logits).mean()),
            "expected_labels": float(probabilities.sum() / labels.sum()),
            "predicted_labels": float(members.sum() / labels.sum()),
            "f1": image_f1(labels, members),
            "f1_at_half": image_f1(labels, probabilities >= 0.5),
        }
    if name == ONE_LABEL:
        rows, classes = np.nonzero(support.labels)
        twice = make_support_set(support.embeddings[rows], classes, support.text, support.tau)
        logits = score(tune_auto(twice).compile(twice), task.queries)
        return {"map": max(mean_average_precision(labels, values) for values in (logits, softmax(logits)))}
    which = "adapted" if name.endswith("++") else "plain"
    rows_of = [getattr(embeddings, which) for embeddings in (support.embeddings, task.queries)]
    linear, many = require("sklearn.linear_model", "sklearn"), require("sklearn.multiclass", "sklearn")
    best = 0.0
    for c in _CS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fitted = many.OneVsRestClassifier(linear.LogisticRegression(C=c, max_iter=300))
            fitted.fit(rows_of[0], support.labels.astype(int))
        best = max(best, mean_average_precision(labels, fitted.decision_function(rows_of[1])))
    return {"map": best}


def image_f1(labels: np.ndarray, members: np.ndarray) -> float:
    """The mean over images of 2 |true and predicted| / (|true| + |predicted|); each image has a label."""
    return float((2 * (labels & members).sum(1) / (labels.sum(1) + members.sum(1))).mean())


def _row(source: PastedSource, name: str, shots: int, draws: list[dict[str, Any]]) -> dict[str, Any]:
    names = [key for key in draws[0] if key != "seed"]
    return {
        "bench": "labels",
        "data": source.name,
        "method": name,
        "shots": shots,
        "classes": CONCEPTS,
        "images": QUERIES * CONCEPTS // 2,
        "seeds": list(source.seeds),
        **{key: float(np.mean([draw[key] for draw in draws])) for key in names},
        "map_std": float(np.std([draw["map"] for draw in draws], ddof=1)) if len(draws) > 1 else 0.0,
        "draws": draws,
    }


def _print(out: Console, rows: Sequence[Row]) -> None:
    first = rows[0]
    out.print(
        f"{first['data']}: mean average precision in % over {first['classes']} concepts on {first['images']} images, "
        f"mean ± standard deviation over {len(first['seeds'])} seeds, each with other concepts. Shots: images of each "
        f"concept. {ONE_VS_REST}: the best of {len(_CS)} C on the test images; {ONE_LABEL}: by logits or by softmax, "
        "whichever is better",
        soft_wrap=True,
    )
    print_table(out, HEADS, [_cells(row) for row in rows], left=1)


def _cells(row: Row) -> list[str]:
    cells = [row["method"], str(row["shots"]), percent(row["map"], row["map_std"])]
    if "f1" not in row:
        return [*cells, *[""] * 5]
    ratios = f"{row['predicted_labels']:.2f}"
    return [
        *cells,
        f"{100 * row['left_out_map']:.1f}",
        f"{row['log_loss']:.4f}",
        *(ratios, f"{100 * row['f1']:.1f}", f"{100 * row['f1_at_half']:.1f}"),
    ]
