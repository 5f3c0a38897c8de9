"""Choosing parameters on a validation set: our exact search for alpha against the grid of the public code.

Both are verified first: the search by scoring the plan that it chose, and the grid must not find a better one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from iosr_fast.benchmarks import harness
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.support_set import SupportSet, make_support_set
from iosr_fast.methods.tuning.tune import tune
from iosr_fast.methods.tuning.tuned import Tuned
from iosr_fast.scoring.reference import score_reference
from iosr_fast.utils.machine import usable_threads

DEFAULT_CASES = ("tip-adapter", "tip-x")
METHODS = ("tip-adapter", "tip-x")
SIZES = (2500, 100, 16, 512)
RIVAL = "public-grid"
# Samples that float32 may judge differently; of many samples, a thousandth.
ALLOWED_SAMPLES = 2
# Points of the grid that are timed; of more work than this they are timed on some of the images.
TIMED_POINTS = 40
TIMED_FLOPS = 4e12
# Above this number of logits the whole grid's accuracy isn't computed.
MOST_LOGITS = 1e11
# Elements of an array for a chunk of images, and the least number of images that are verified at once.
_CHUNK = 1 << 21
_LEAST_ROWS = 1024


@dataclass(frozen=True)
class Case:
    """v validation images, c classes, s shots, d channels."""

    method: str
    images: int
    classes: int
    shots: int
    width: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """`tip-x`, or with sizes, `tip-x-v2500-c100-s16-d512`."""
        method = next((name for name in METHODS if text == name or text.startswith(f"{name}-v")), "")
        sizes = text.removeprefix(method).removeprefix("-")
        if not method or (not sizes and text != method):
            raise IosrFastError(f"expected a case like {' or '.join(METHODS)}-v2500-c100-s16-d512, got {text!r}")
        numbers = harness.parse_case(sizes, "vcsd", "v2500-c100-s16-d512") if sizes else SIZES
        return cls(method, *numbers)

    def __str__(self) -> str:
        return f"{self.method}-v{self.images}-c{self.classes}-s{self.shots}-d{self.width}"

    def build(self) -> tuple[SupportSet, Embeddings, np.ndarray]:
        """A support set, validation images and their labels: clustered, with the gap between images and texts of a
        CLIP, and texts that are right about half of the time, so that alpha matters."""
        rng = np.random.default_rng(0)

        def spread(n: int) -> np.ndarray:
            rows: np.ndarray = rng.standard_normal((n, self.width), dtype=np.float32)
            rows *= np.float32(self.width**-0.5)
            return rows

        def unit(rows: np.ndarray) -> np.ndarray:
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            return rows

        image_gap, text_gap = unit(spread(2)) * np.array([[3.0], [2.0]], np.float32)
        centres = spread(self.classes)
        text = unit(centres + spread(self.classes) + text_gap)

        def near(labels: np.ndarray) -> np.ndarray:
            rows = spread(len(labels))
            rows *= np.float32(5.0)
            rows += centres[labels]
            rows += image_gap
            return unit(rows)

        own = np.repeat(np.arange(self.classes), self.shots)
        support = make_support_set(Embeddings(near(own)), own, text, 100.0)
        labels = rng.integers(0, self.classes, self.images)
        return support, Embeddings(near(labels)), labels


class PublicGrid:
    """The search of akres001/CLIP_fewshot_imo (run.py), written anew: nested loops over alpha, beta and, for Tip-X,
    gamma. Each point takes in float32 PyTorch the cosines of queries and keys (Tip-X: once for all points), their
    exponentials, the product with the one-hot matrix and argmax over all images. Divergences are computed before the
    loops, as there; here by the collapsed form, and for every image (the public code drops the last part hundred).
    """

    alphas = np.linspace(0, 20, 200)
    betas = np.linspace(0, 20, 20)
    gammas = np.linspace(0, 30, 50)

    def __init__(self, method: str, support: SupportSet, queries: Embeddings, labels: np.ndarray) -> None:
        import torch

        assert support.text is not None
        self.labels, self.offsets = labels, support.class_offsets
        arrays = (queries.plain, support.embeddings.plain, support.text)
        self.query, self.keys, text = (torch.from_numpy(np.array(array)) for array in arrays)
        self.values = torch.nn.functional.one_hot(torch.from_numpy(support.labels), support.n_classes).float()
        self.base = support.tau * self.query @ text.T
        self.axes = {"alpha": self.alphas, "beta": self.betas}
        self.extra: torch.Tensor | None = None  # what gamma multiplies
        if method == "tip-x":
            self.axes["gamma"] = self.gammas
            self.cosines = self.query @ self.keys.T
            s, other = (torch.softmax(rows @ text.T / 0.5, dim=-1) for rows in (self.query, self.keys))
            divergence = (s * s.log()).sum(1, keepdim=True) - s @ other.log().T
            self.extra = (-_scale(divergence, self.cosines)) @ self.values
        self.shape = tuple(map(len, self.axes.values()))
        self.n_points = int(np.prod(self.shape))

    def point(self, index: int) -> dict[str, float]:
        """Parameters in the order of the public loops: alpha is the outermost."""
        at = np.unravel_index(index, self.shape)
        return {name: float(axis[i]) for (name, axis), i in zip(self.axes.items(), at, strict=True)}

    def spread(self, number: int) -> list[dict[str, float]]:
        """Some points, all over the grid."""
        chosen = np.linspace(0, self.n_points - 1, min(number, self.n_points)).astype(int)
        return [self.point(index) for index in chosen]

    def right_at(self, point: dict[str, float]) -> int:
        """Right images at a point, by the public code's formula."""
        import torch

        with torch.inference_mode():
            cosines = self.query @ self.keys.T if self.extra is None else self.cosines
            cache_logits = ((-1) * (point["beta"] - point["beta"] * cosines)).exp() @ self.values
            logits = self.base if self.extra is None else self.base + self.extra * point["gamma"]
            logits = logits + cache_logits * point["alpha"]
            return int((np.argmax(logits.numpy(), axis=1) == self.labels).sum())

    def best(self) -> tuple[float, dict[str, float]]:
        """The best accuracy of the whole grid and its first point, by argmax in float64 with slopes once a beta."""
        right = np.zeros((*self.shape[:2], self.shape[2] if self.extra is not None else 1), np.int64)
        step = max(1, _CHUNK // max(self.values.shape))
        for first in range(0, len(self.labels), step):
            part = slice(first, first + step)
            labels, base = self.labels[part], self.base[part].double().numpy()
            cosines = (self.query[part].double() @ self.keys.double().T).numpy()
            extra = None if self.extra is None else self.extra[part].double().numpy()
            for k, beta in enumerate(self.betas):
                slope = np.add.reduceat(np.exp(beta * (cosines - 1.0)), self.offsets[:-1], axis=1)
                shifts = [base] if extra is None else (base + gamma * extra for gamma in self.gammas)
                for g, shifted in enumerate(shifts):
                    right[:, k, g] += _right_by_alpha(shifted, slope, labels, self.alphas)
        return float(right.max()) / len(self.labels), self.point(int(right.argmax()))


def _right_by_alpha(base: np.ndarray, slope: np.ndarray, labels: np.ndarray, alphas: np.ndarray) -> np.ndarray:
    """(A,) images whose label is argmax of base + alpha * slope, at each alpha; alphas rise.

    A logit is a line over alpha: an image that is right at both ends is right between, one that the same class beats at
    both is nowhere right. Only the others are computed.
    """
    rows = np.arange(len(labels))
    ends = [base + alpha * slope for alpha in alphas[[0, -1]]]
    first, last = (end.argmax(1) == labels for end in ends)
    beaten = np.logical_and(*(end > end[rows, labels][:, None] for end in ends)).any(1)
    counts = np.full(len(alphas), int((first & last).sum()))
    open_rows = np.flatnonzero(~(first & last) & ~beaten)
    base, slope, labels = base[open_rows], slope[open_rows], labels[open_rows]
    for a, alpha in enumerate(alphas):
        counts[a] += int(((base + alpha * slope).argmax(1) == labels).sum())
    return counts


def _scale(x: Any, target: Any) -> Any:
    """x scaled to the range of target, over all queries and keys, as in the public code."""
    return (x - x.min()) / (x.max() - x.min()) * (target.max() - target.min()) + target.min()


def verify(tuned: Tuned, support: SupportSet, queries: Embeddings, labels: np.ndarray) -> None:
    """Raise ArithmeticError unless the chosen plan has, in float64, the accuracy that the search reports."""
    plan = tuned.compile(support)
    step = max(_LEAST_ROWS, _CHUNK // len(support.embeddings))
    right = 0
    for first in range(0, len(labels), step):
        part = slice(first, first + step)
        right += int((score_reference(plan, queries[part]).argmax(1) == labels[part]).sum())
    allowed = max(ALLOWED_SAMPLES, len(labels) // 1000)
    if not abs(right - tuned.search_accuracy * len(labels)) <= allowed:
        raise ArithmeticError(
            f"exact is wrong: its plan has {right} of {len(labels)} images right, and the search gave "
            f"{tuned.search_accuracy * len(labels):.0f} (allowed: {allowed} apart); not timed"
        )


def run(
    cases: Sequence[str] = DEFAULT_CASES, threads: int | None = None, repeats: int = 3, points: int = TIMED_POINTS
) -> list[dict[str, Any]]:
    """Verify and time each case; one row for the search and one for the grid.

    The grid's time is that of `points` of its points, scaled to all; where even those are much work, on the first of
    the images (`extrapolated_from_images`). Its accuracy is that of every point, None where that is too much work.
    """
    threads = threads or usable_threads()
    rows: list[dict[str, Any]] = []
    with harness.torch_threads(threads):
        for text in cases:
            rows += _run_case(Case.parse(text), threads, repeats, points)
    return rows


def _run_case(case: Case, threads: int, repeats: int, points: int) -> list[dict[str, Any]]:
    support, queries, labels = case.build()

    def exact() -> Tuned:
        return tune(case.method, support, queries, labels)

    results: list[Tuned] = []
    memory = {"exact": harness.extra_memory_mb(lambda: results.append(exact()))}
    tuned = results[0]
    verify(tuned, support, queries, labels)
    images = _timed_images(case, points)
    few = slice(None) if images == case.images else slice(images)
    grid = PublicGrid(case.method, support, queries[few], labels[few])
    best: tuple[float, dict[str, float]] | None = None
    if images == case.images and images * case.classes * grid.n_points <= MOST_LOGITS:
        best = grid.best()
        if tuned.search_accuracy < best[0]:
            raise ArithmeticError(
                f"exact found {tuned.search_accuracy:.4f}, the grid {best[0]:.4f} at {best[1]}; not timed"
            )
    else:
        print(f"{case}: the grid's best accuracy is left out, it takes {grid.n_points} argmaxes of all images")
    timed = grid.spread(points)
    memory[RIVAL] = harness.extra_memory_mb(lambda: grid.right_at(timed[-1]))
    calls: dict[str, Callable[[], object]] = {
        "exact": exact,
        RIVAL: lambda: [grid.right_at(point) for point in timed],
    }
    runtimes_ms = harness.measure(calls, repeats, bursts=False)
    factor = grid.n_points / len(timed) * case.images / images
    runtimes_ms[RIVAL] = [factor * ms for ms in runtimes_ms[RIVAL]]
    rows = harness.rows("search", str(case), runtimes_ms, rivals=[RIVAL], threads=threads, packages=("numpy", "torch"))
    ours, theirs = rows
    ours |= {"accuracy": tuned.search_accuracy, "parameters": tuned.parameters, "settings": tuned.settings}
    theirs |= {
        "accuracy": best and best[0],
        "best_accuracy": best and best[0],
        "best_accuracy_by": best and "every point, argmax in float64, slopes once a beta",
        "parameters": best and best[1],
        "grid_points": grid.n_points,
        "extrapolated_from_points": len(timed),
        "extrapolated_from_images": images,
    }
    for row in rows:
        extra = memory[row["impl"]]
        row["extra_memory_mb"] = None if extra is None else round(extra, 1)
    return rows


def _timed_images(case: Case, points: int) -> int:
    """All validation images, or as many as make the timed points TIMED_FLOPS of work."""
    per_image = 2.0 * case.classes * case.shots * (case.width + case.classes) * points
    return max(1, min(case.images, int(TIMED_FLOPS / per_image)))
