"""The fastest engine for a fitted classifier, chosen by measuring on its own support images."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np

from iosr_fast.encoders.encoder import Encoder
from iosr_fast.encoders.opened_clip import OpenedClip
from iosr_fast.exceptions import IosrFastError
from iosr_fast.export.calibration import evenly
from iosr_fast.export.candidates import CandidateBuilder, Tokens, list_candidates, with_smaller_images
from iosr_fast.head.engine_choice import LEVEL, EngineCandidate, EngineChoice, Objective, Verdict, best_of
from iosr_fast.head.engine_judge import CALIBRATED, JUDGED, Judge, sample_rows, time_encoders
from iosr_fast.head.fit import Fit
from iosr_fast.head.reencode import reencode
from iosr_fast.images.preprocess import to_pixels
from iosr_fast.utils.machine import cpu_model
from iosr_fast.utils.progress import progress as bar

_CHEAP_S = 1.0  # a candidate that is slower than the choice is judged all the same if it takes no longer
_MEASURES = {"latency": "ms_one", "throughput": "ms_batch", "size": "bytes"}


@dataclass(frozen=True)
class OptimizeOptions:
    """What to optimize, and how many points of accuracy it may cost; `runtime` and `precision` restrict the
    candidates. With `smaller_images`, engines for such are candidates, too."""

    objective: Objective = "latency"
    tolerance: float = 0.5
    runtime: str = "auto"
    precision: str = "auto"
    smaller_images: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise IosrFastError(f"expected an objective of {', '.join(get_args(Objective))}, got {self.objective!r}")
        if not 0 <= self.tolerance <= 100:
            raise IosrFastError(f"expected a tolerance of 0 to 100 points of accuracy, got {self.tolerance}")


def optimize(
    fit: Fit, images: Sequence[Any], options: OptimizeOptions, version: int, unknown_images: Sequence[Any] = ()
) -> Fit:
    """`fit` on the engine that `choose_engine` chooses. `images` are its support images in the order of
    `fit.head.examples`; if the embeddings change they are encoded again, with `unknown_images`, and the head is of
    this `version`."""
    clip, choice = choose_engine(fit, images, options)
    head = fit.head
    if clip.encoder.fingerprint != fit.clip.encoder.fingerprint:
        encoder = clip.encoder_for(adapted=True)
        head = reencode(head, encoder, images, fit.views, version, options.progress, unknown_images)
    return replace(fit, clip=clip, head=head, engine_choice=choice)


@dataclass
class _Row:
    """A candidate; `encoder` while it may still be chosen, `facts` as far as they were measured."""

    runtime: str
    precision: str
    verdict: Verdict | None = None
    reason: str = ""
    encoder: Encoder | None = None
    tokens: Tokens | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def end(self, verdict: Verdict, reason: str = "") -> None:
        printable = "".join(char if char.isprintable() else " " for char in reason)
        self.verdict, self.reason, self.encoder = verdict, " ".join(printable.split())[:300], None

    def entry(self) -> EngineCandidate:
        names: dict[str, Any] = {"runtime": self.runtime, "precision": self.precision, "verdict": self.verdict}
        names["tokens"] = self.tokens
        return EngineCandidate(**names, reason=self.reason, **self.facts)


def choose_engine(fit: Fit, images: Sequence[Any], options: OptimizeOptions) -> tuple[OpenedClip, EngineChoice]:
    """The best engine by the objective that is not rejected (engine_choice.rejection), and the table of all.

    Every candidate (candidates.list_candidates) is built, calibrated on the images and timed, in the form that the
    method needs: with adapted embeddings or without. Beginning with the best,
    candidates are judged on the images as single views (engine_judge.Judge), by comparison with the present engine, or,
    if that is not in fp32 and the CLIP is at hand, with one in fp32. The present engine is kept if no candidate is
    left. A candidate that fails is a row of the table.
    """
    started = time.perf_counter()
    clip, examples = fit.clip, fit.head.examples
    source = clip.encoder.source
    if source is None:
        raise IosrFastError("expected an encoder that was opened from an engine folder, got one without a folder")
    chosen = sample_rows(examples.class_ids, JUDGED)
    geometry = clip.encoder.geometry
    if options.smaller_images and clip.loaded is None:
        raise IosrFastError("engines for smaller images are exported from the CLIP: name it by pretrained")

    @functools.cache
    def pixels_of(side: int) -> np.ndarray:
        return to_pixels([images[i] for i in chosen], replace(geometry, size=side), fit.views.exif_orientation)

    pixels = pixels_of(geometry.size)
    calibration = evenly(pixels, CALIBRATED)
    builder = CandidateBuilder(source, calibration, clip.loaded, clip.encoder.threads, fit.head.needs_adapted)
    try:
        reference, note = fit.encoder, ""
        if source.manifest["precision"] != "fp32" and clip.loaded is not None:
            with bar("build the engine in fp32", None, shown=options.progress):
                reference = builder.start_in_fp32(clip.encoder.runtime)
        elif source.manifest["precision"] != "fp32":
            note = (
                f"an engine in {source.manifest['precision']} can't be made more exact: only its runtimes were compared"
            )
        restricted = options.runtime, options.precision
        listed = list_candidates(builder.engine, len(pixels), *restricted, clip.loaded is not None)
        if options.smaller_images:
            listed += with_smaller_images(builder.engine, listed)
        table = [
            _Row(one.runtime, one.precision, "left out" if one.left_out else None, one.left_out, None, one.tokens)
            for one in listed
        ]
        batch = 8 if clip.encoder.buckets is None else 32
        _measure(table, builder, reference, batch, options.progress)
        judge = Judge(fit, reference, chosen, pixels_of, options.tolerance)
        best = _choose(table, judge, options)
        if best is None:
            best = _Row(reference.runtime, builder.engine.manifest["precision"], encoder=reference)
            table.append(best)
        assert best.encoder is not None
        encoder, folder = builder.keep(best.runtime, best.precision, best.encoder, best.tokens)
    except BaseException:
        builder.close()
        raise
    best.end("chosen")
    others = sorted((row for row in table if row is not best), key=lambda row: _rank(row, options.objective))
    choice = EngineChoice(
        objective=options.objective,
        tolerance=options.tolerance,
        batch=batch,
        judged=judge.count,
        calibrated=len(calibration),
        processor=cpu_model(),
        seconds=round(time.perf_counter() - started, 2),
        candidates=[row.entry() for row in (best, *others)],
        note="; ".join(filter(None, (note, judge.note))),
    )
    return replace(clip, encoder=encoder, engine=folder), choice


def _measure(table: list[_Row], builder: CandidateBuilder, current: Encoder, batch: int, shown: bool) -> None:
    """Build, open and time the candidates that are not left out."""
    present = (current.runtime, builder.engine.manifest["precision"])
    for row in table:
        if row.verdict is None:
            with bar(f"build {row.runtime} {row.precision}", None, shown=shown):
                try:
                    there = (row.runtime, row.precision) == present and not row.tokens
                    row.encoder = current if there else builder.open(row.runtime, row.precision, row.tokens)
                    row.encoder.warm((1, batch))
                except ArithmeticError as error:
                    row.end("rejected", str(error))
                except Exception as error:
                    row.end("failed", str(error))
    with bar("time the engines", None, shown=shown):
        encoders = {i: row.encoder for i, row in enumerate(table) if row.encoder is not None}
        for i, (one, many) in time_encoders(encoders, batch).items():
            source = encoders[i].source
            assert source is not None
            size = sum(file.size for file in source.files.values())
            table[i].facts |= {"ms_one": one, "ms_batch": many, "bytes": size}
            quantised = source.manifest.get("quantised") or {}
            if "total_products" in quantised:  # engines of earlier versions lack it
                table[i].facts["products"] = (quantised["products"], quantised["total_products"])


def _choose(table: list[_Row], judge: Judge, options: OptimizeOptions) -> _Row | None:
    """The best of the rows that are not rejected; None if there is none. Ends the others."""
    measure = _MEASURES[options.objective]
    accepted: list[_Row] = []
    with bar("judge the engines", None, shown=options.progress):
        for row in sorted((row for row in table if row.encoder is not None), key=lambda row: row.facts[measure]):
            assert row.encoder is not None
            late = accepted and row.facts[measure] > accepted[0].facts[measure] * (1 + LEVEL)
            if late and judge.seconds(row.facts["ms_one"]) > _CHEAP_S:
                row.end("not judged", "it is no better than the choice")
                continue
            try:
                facts, reason = judge(row.encoder, row.precision, bool(row.tokens))
            except Exception as error:
                row.end("failed", str(error))
                continue
            row.facts |= facts
            if reason:
                row.end("rejected", reason)
            else:
                accepted.append(row)
    if not accepted:
        return None
    values, ties = ([row.facts[name] for row in accepted] for name in (measure, "ms_one"))
    best = accepted[best_of(values, [row.precision for row in accepted], ties, [bool(row.tokens) for row in accepted])]
    for row in accepted:
        if row is not best:
            level = row.facts[measure] <= best.facts[measure] * (1 + LEVEL) and row.precision != best.precision
            row.end("accepted", "level with the choice, which is more exact" if level else "")
    return best


def _rank(row: _Row, objective: Objective) -> tuple[bool, float]:
    value = row.facts.get(_MEASURES[objective])
    return value is None, value or 0.0
