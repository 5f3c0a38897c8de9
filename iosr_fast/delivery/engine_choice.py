"""The candidates that were tried for a classifier's engine, what was measured of each, and the rule that chose one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import numpy as np
from msgspec import Meta

from iosr_fast.encoders.engine_folder import ONNX_RUNTIMES, PRECISIONS, EnginePrecision, unavailable_reason
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.paired_tests import lost_and_won, sign_test
from iosr_fast.sealed.schema import Above0, Name, Natural, Share, Size, Strict, text_of
from iosr_fast.utils.machine import cpu_model, processors

EngineGoal = Literal["latency", "throughput", "size"]
Outcome = Literal["chosen", "accepted", "not judged", "rejected", "failed", "left out"]
LEAST_COSINE = 0.99
SIGNIFICANT = 0.15
LEVEL = 0.05  # candidates whose times differ by at most this share are equally fast
_Cosine = Annotated[float, Meta(ge=-1.001, le=1.001)]


@dataclass(frozen=True)
class OptimizeOptions:
    """What to optimize, and how many points of accuracy it may cost; `runtime` and `precision` restrict the
    candidates. With `smaller_images`, engines for such are candidates, too."""

    objective: EngineGoal = "latency"
    tolerance: float = 0.5
    runtime: str = "auto"
    precision: str = "auto"
    smaller_images: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        if self.objective not in get_args(EngineGoal):
            raise IosrFastError(f"expected an objective of {', '.join(get_args(EngineGoal))}, got {self.objective!r}")
        if not 0 <= self.tolerance <= 100:
            raise IosrFastError(f"expected a tolerance of 0 to 100 points of accuracy, got {self.tolerance}")


class EngineCandidate(Strict, frozen=True, kw_only=True):
    """An engine that was tried.

    `ms_one` and `ms_batch` are the median milliseconds of one picture and of a batch (EngineChoice.batch); `bytes` is
    the size of its files; `cosines` has the smallest and the mean cosine to the reference by embedding ("plain",
    "adapted"); `products` counts the matrix products of a quantised engine that are quantised, and all; `agreement` is
    the share of labels that are the reference's, and `accuracy` that of right ones, both of left-out support images.
    None where it was not measured; `reason` says why it was not chosen. `tokens` has the "image_size"
    of an engine for smaller images.
    """

    runtime: Name
    precision: EnginePrecision
    verdict: Outcome
    reason: Annotated[str, text_of(512)] = ""
    tokens: dict[str, Size] | None = None
    ms_one: Above0 | None = None
    ms_batch: Above0 | None = None
    bytes: Natural | None = None
    cosines: dict[str, tuple[_Cosine, _Cosine]] | None = None
    products: tuple[Natural, Natural] | None = None
    agreement: Share | None = None
    accuracy: Share | None = None

    def cost(self, objective: EngineGoal) -> float | None:
        """What the objective makes small; None if it was not measured."""
        return {"latency": self.ms_one, "throughput": self.ms_batch, "size": self.bytes}[objective]

    @property
    def quantised(self) -> str:
        """The matrix products in words."""
        return "" if self.products is None else "{} of {} products in {}".format(*self.products, self.precision)

    def cells(self) -> list[str]:
        """The row of the table."""
        shown = [self.precision, *(f"{size} pixels" for size in (self.tokens or {}).values())]
        least = None if self.cosines is None else min(low for low, _ in self.cosines.values())
        megabytes = None if self.bytes is None else self.bytes / 1e6
        numbers = {"{:,.2f} ms": self.ms_one, "{:,.2f} ms ": self.ms_batch, "{:,.1f} MB": megabytes}
        numbers |= {"{:.4f}": least, "{:.1%}": self.agreement}
        verdict = "not taken" if self.verdict == "rejected" else self.verdict  # no fault of the user's
        end = "; ".join(filter(None, (f"{verdict}{self.reason and ': '}{self.reason}", self.quantised)))
        values = ("" if value is None else form.format(value).strip() for form, value in numbers.items())
        return [self.runtime, " ".join(shown), *values, end]


class EngineChoice(Strict, frozen=True, kw_only=True):
    """The table of candidates, the chosen one first, and how it was made.

    `tolerance` is in points of accuracy; `judged` images were left out, `calibrated` ones gave the ranges of int8;
    `processor` is where the times were measured, a GPU included.
    """

    objective: EngineGoal
    tolerance: Annotated[float, Meta(ge=0, le=100)]
    batch: Size
    judged: Natural
    calibrated: Natural
    processor: Name
    seconds: Annotated[float, Meta(ge=0)]
    candidates: Annotated[list[EngineCandidate], Meta(min_length=1)]
    note: str = ""

    @property
    def chosen(self) -> EngineCandidate:
        """The engine in use."""
        return self.candidates[0]

    @property
    def runtime(self) -> str:
        """The runtime to open the engine with: the chosen one where it was measured, else "auto"."""
        runtime = self.chosen.runtime
        if runtime in ONNX_RUNTIMES:  # of a CPU: whether there is a GPU is not asked, which would import PyTorch
            return runtime if self.processor.partition(" and ")[0] == cpu_model() else "auto"
        return runtime if self.processor == processors() and unavailable_reason(runtime) is None else "auto"

    def lines(self) -> list[str]:
        """The table as text. `labels` is the share of left-out images whose label is fp32's: the accuracy itself, of
        other weights than the fit's, is `candidates[i].accuracy`."""
        best = self.chosen
        heading = (
            f"engine {best.runtime} {best.precision}, chosen for {self.objective} on {self.processor}; {self.judged} "
            f"left-out images, tolerance {self.tolerance:g} points, {self.seconds:.1f} s"
        )
        titles = ["runtime", "precision", "1 image", f"{self.batch} images", "size", "cosine", "labels", ""]
        rows = [titles, *(one.cells() for one in self.candidates)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["; ".join(filter(None, (heading, best.quantised)))]
        for first, second, *numbers, end in rows:
            aligned = [number.rjust(width) for number, width in zip(numbers, widths[2:], strict=False)]
            lines.append("  " + "  ".join([first.ljust(widths[0]), second.ljust(widths[1]), *aligned, end]).rstrip())
        return [*lines, *filter(None, [self.note])]


def rejection_reason(
    reference: np.ndarray,
    right: np.ndarray,
    cosines: dict[str, tuple[float, float]],
    tolerance: float,
    smaller_images: bool = False,
) -> str:
    """Why a candidate is rejected; "" if it is not.

    `reference` and `right` (V,) bool say which of the same left-out images fp32 and the candidate get right. A
    candidate is rejected if a cosine is below LEAST_COSINE, or if it loses more than `tolerance` points of accuracy and
    the loss is no accident: with `lost` images that only fp32 gets right and `won` that only the candidate does, the
    chance that at least `lost` of them fall that way, were both equally good, is below SIGNIFICANT (an exact one-sided
    sign test). So one flip of 40 images, 2.5 points, rejects nothing; three flips against none do. Where the images are
    few, the cosine is what refuses: by the test alone a real loss of 3 points passes at 40 images nearly always.

    Embeddings of `smaller_images` are others, so their cosines say nothing: any loss above `tolerance` rejects
    them, and so does it if no image was left out.

    >>> rejection_reason(np.ones(40, bool), np.arange(40) > 2, {"plain": (0.995, 0.999)}, tolerance=0.5)
    'accuracy falls by 7.5 points (3 images lost, 0 won, chance 0.12; tolerance 0.5 points)'
    """
    lost, won = lost_and_won(reference, right)
    loss = 100 * (lost - won) / len(right) if len(right) else 0.0
    if smaller_images:
        if len(right) and loss <= tolerance:
            return ""
        fall = f"falls by {loss:.1f} points" if len(right) else "was not compared"
        return f"accuracy {fall} (with smaller images any loss above {tolerance:g} points rejects)"
    least = {name: low for name, (low, _) in cosines.items() if not low >= LEAST_COSINE}
    if least:
        return ", ".join(f"cosine of {name} embeddings {low:.3f} < {LEAST_COSINE}" for name, low in least.items())
    chance = sign_test(lost, won)
    if loss <= tolerance or chance >= SIGNIFICANT:
        return ""
    return (
        f"accuracy falls by {loss:.1f} points ({lost} images lost, {won} won, chance {chance:.2g}; tolerance "
        f"{tolerance:g} points)"
    )


def best_of(candidates: Sequence[EngineCandidate], objective: EngineGoal) -> EngineCandidate:
    """The candidate of the smallest cost. Costs within LEVEL of it are equal: among those full size wins, then the more
    exact precision, then the smaller time of one picture."""
    costs = [one.cost(objective) or 0.0 for one in candidates]
    equal = [one for one, cost in zip(candidates, costs, strict=True) if cost <= min(costs) * (1 + LEVEL)]
    return min(equal, key=lambda one: (bool(one.tokens), PRECISIONS.index(one.precision), one.ms_one or 0.0))
