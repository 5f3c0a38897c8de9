"""The fastest engine for a fitted classifier, chosen on its own support images: build candidates, time them, judge them
by labels, choose one, and encode the support images with it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from msgspec.structs import replace as changed

from iosr_fast.delivery.engine_choice import LEVEL, EngineCandidate, EngineChoice, OptimizeOptions, Outcome, best_of
from iosr_fast.delivery.engine_judge import JUDGED, Judge, pixels_by_side, sample_rows, time_encoders
from iosr_fast.delivery.fitted import FittedClassifier
from iosr_fast.encoders.encoder import Encoder
from iosr_fast.encoders.opened_model import OpenedModel
from iosr_fast.exceptions import IosrFastError
from iosr_fast.export.candidates import Candidate, CandidateBuilder, list_candidates, with_smaller_images
from iosr_fast.export.quantize.calibration import evenly
from iosr_fast.head.support_images import encode_images
from iosr_fast.utils.machine import processors
from iosr_fast.utils.progress import progress as bar
from iosr_fast.utils.text import abbreviate

_CALIBRATED = 128
_SAME = 0.999  # least cosine of a key with the key of the same image; fp32 differs by rounding, int8 between runtimes
_CHEAP_S = 1.0  # a candidate that is slower than the choice is judged all the same if it takes no longer
_log = logging.getLogger("iosr_fast")


def optimize(
    fit: FittedClassifier,
    images: Sequence[Any],
    options: OptimizeOptions,
    version: int,
    unknown_images: Sequence[Any] = (),
) -> FittedClassifier:
    """`fit` on the engine that `choose_engine` chooses. `images` are its support images in the order of
    `fit.head.examples`; if the embeddings change they are encoded again, with `unknown_images`, the reducer is fitted
    again, and the head is of this `version`. Classes, texts, ids, thumbnails, method and parameters stay."""
    head, token = fit.head, fit.token
    clip, choice = choose_engine(fit, images, options)
    if clip.encoder.fingerprint != fit.clip.encoder.fingerprint:
        total = len(images) + len(unknown_images)
        settings = replace(fit.settings, thumbnail=0)
        rows = np.searchsorted(np.array(head.uids), head.examples.class_ids)
        with bar("encode with the chosen engine", total, shown=options.progress) as step:
            sources = images, settings, rows, head.class_names, unknown_images
            encoded, unknown, _ = encode_images(clip.encoder_for(adapted=True), *sources, step=step)
        examples = replace(head.examples, embeddings=encoded.embeddings, queries=None)
        reducer = head.config.fit_reducer(examples.as_support(head.uids, head.text, head.tau))
        head = replace(head, examples=examples, reducer=reducer, version=version, unknown_images=unknown).compiled()
        token = object()
    return replace(fit, clip=clip, head=head, engine_choice=choice, token=token)


@dataclass
class _Trial:
    """A candidate of the table, and its encoder while it may still be chosen."""

    found: EngineCandidate
    encoder: Encoder | None = None

    def note(self, **facts: Any) -> None:
        self.found = changed(self.found, **facts)

    def end(self, verdict: Outcome, reason: str = "") -> None:
        printable = "".join(char if char.isprintable() else " " for char in reason)
        self.note(verdict=verdict, reason=" ".join(printable.split())[:300])
        self.encoder = None


def choose_engine(
    fit: FittedClassifier, images: Sequence[Any], options: OptimizeOptions
) -> tuple[OpenedModel, EngineChoice]:
    """The best engine by the objective that is not rejected (engine_choice.rejection_reason), and the table of all.

    Every candidate is built, calibrated on the images and timed, in the form that the method needs: with adapted
    embeddings or without. Beginning with the best, candidates are judged on the images, by comparison with the
    present engine, or, if that is not in fp32 and the CLIP is at hand, with one in fp32. The present engine is
    kept if no candidate is left. A candidate that fails is a row of the table.
    """
    started = time.perf_counter()
    clip = fit.clip
    source = fit.clip.encoder.source
    if source is None:
        raise IosrFastError("expected an encoder that was opened from an engine folder, got one without a folder")
    if options.smaller_images and clip.loaded is None:
        raise IosrFastError("engines for smaller images are exported from the CLIP: name it by pretrained")
    chosen = sample_rows(fit.head.examples.class_ids, JUDGED)
    pixels_of = pixels_by_side(fit, images, chosen)
    calibration = evenly(pixels_of(clip.encoder.image_size), _CALIBRATED)
    batch = min(8 if clip.encoder.buckets is None else 32, clip.encoder.max_batch)
    builder = CandidateBuilder(source, calibration, clip.loaded, clip.encoder.threads, fit.head.needs_adapted)
    try:
        reference = fit.encoder
        note = ""
        if (precision := source.manifest["precision"]) != "fp32" and clip.loaded is not None:
            with bar("build the engine in fp32", None, shown=options.progress):
                reference = builder.start_in_fp32(clip.encoder.runtime)
        elif precision != "fp32":
            note = f"an engine in {precision} can't be made more exact: only its runtimes were compared"
        listed = list_candidates(
            builder.engine, len(chosen), options.runtime, options.precision, clip.loaded is not None
        )
        if options.smaller_images:
            listed += with_smaller_images(builder.engine, listed)
        table = [_open(builder, one, reference, batch, options.progress) for one in listed]
        _time(table, batch, options.progress)
        judge = Judge(fit, reference, chosen, pixels_of, options.tolerance)
        best = _choose(table, judge, options)
        if best is None:
            present = {"runtime": reference.runtime, "precision": builder.engine.manifest["precision"]}
            best = _Trial(EngineCandidate(**present, verdict="chosen"), reference)
            table.append(best)
        assert best.encoder is not None
        clip = replace(clip, encoder=best.encoder, engine=builder.keep(best.encoder))
    except BaseException:
        builder.close()
        raise
    best.end("chosen")
    table.sort(key=lambda row: (row is not best, row.found.cost(options.objective) or np.inf))
    choice = EngineChoice(
        objective=options.objective,
        tolerance=options.tolerance,
        batch=batch,
        judged=judge.count,
        calibrated=len(calibration),
        processor=processors(),
        seconds=round(time.perf_counter() - started, 2),
        candidates=[row.found for row in table],
        note="; ".join(filter(None, (note, judge.note))),
    )
    return clip, choice


def _open(builder: CandidateBuilder, one: Candidate, current: Encoder, batch: int, shown: bool) -> _Trial:
    """The row of a candidate, which is built, opened and warm unless it is left out."""
    names: dict[str, Any] = {"runtime": one.runtime, "precision": one.precision, "tokens": one.tokens}
    row = _Trial(EngineCandidate(**names, verdict="not judged"))
    if one.left_out:
        row.end("left out", one.left_out)
        return row
    present = current.runtime, builder.engine.manifest["precision"], None
    with bar(f"build {one.runtime} {one.precision}", None, shown=shown):
        try:
            encoder = current if (one.runtime, one.precision, one.tokens) == present else builder.open(one)
            encoder.warm((1, batch))
            row.encoder = encoder
        except ArithmeticError as error:
            row.end("rejected", str(error))
        except Exception as error:
            row.end("failed", str(error))
    return row


def _time(table: list[_Trial], batch: int, shown: bool) -> None:
    """Measure the time and the size of the candidates that are open."""
    encoders = {i: row.encoder for i, row in enumerate(table) if row.encoder is not None}
    with bar("time the engines", None, shown=shown):
        times = time_encoders(encoders, batch)
    for i, (one, many) in times.items():
        source = encoders[i].source
        assert source is not None
        table[i].note(ms_one=one, ms_batch=many, bytes=sum(file.size for file in source.files.values()))
        quantised = source.manifest.get("quantised") or {}
        if "total_products" in quantised:  # engines of earlier versions lack it
            table[i].note(products=(quantised["products"], quantised["total_products"]))


def _choose(table: list[_Trial], judge: Judge, options: OptimizeOptions) -> _Trial | None:
    """The best of the open rows that are not rejected; None if there is none. Ends the others."""

    def cost(row: _Trial) -> float:
        return row.found.cost(options.objective) or 0.0

    accepted: list[_Trial] = []
    with bar("judge the engines", None, shown=options.progress):
        for row in sorted((row for row in table if row.encoder is not None), key=cost):
            assert row.encoder is not None
            late = accepted and cost(row) > cost(accepted[0]) * (1 + LEVEL)
            if late and (row.found.ms_one or 0.0) * judge.count / 1e3 > _CHEAP_S:
                row.end("not judged", "it is no better than the choice")
                continue
            try:
                facts, reason = judge(row.encoder, row.found.precision, bool(row.found.tokens))
            except Exception as error:
                row.end("failed", str(error))
                continue
            row.note(**facts)
            if reason:
                row.end("rejected", reason)
            else:
                accepted.append(row)
    if not accepted:
        return None
    chosen = best_of([row.found for row in accepted], options.objective)
    best = next(row for row in accepted if row.found is chosen)
    for row in accepted:
        if row is not best:
            level = cost(row) <= cost(best) * (1 + LEVEL) and row.found.precision != chosen.precision
            row.end("accepted", "level with the choice, which is more exact" if level else "")
    return best


def match_images(fit: FittedClassifier, images: Sequence[Any], labels: Any, shown: bool = False) -> list[Any]:
    """The images of `fit.head.examples` in their order, found by their embeddings among the `images` of their class.

    The same engine gives the same embedding again, up to rounding. Images that match no example are left out with a
    warning; an example without an image is refused.
    """
    head = fit.head
    examples = fit.head.examples
    total = len(images)
    if len(labels) == total:
        present = set(fit.labels.tolist())
        known = [i for i, label in enumerate(labels) if label in present]
        images, labels = [images[i] for i in known], [labels[i] for i in known]
    classes = fit.read_labels(images, labels)
    settings = replace(fit.settings, thumbnail=0)
    with bar("find the support images", len(images), shown=shown) as step:
        encoder = fit.clip.encoder_for(adapted=True)
        encoded = encode_images(encoder, images, settings, classes, head.class_names, step=step).examples
    found = np.full(len(examples), -1)
    for position, uid in enumerate(head.uids):
        rows = np.flatnonzero(examples.class_ids == uid)
        candidates = np.flatnonzero(classes == position)
        similar = examples.as_queries.plain[rows] @ encoded.embeddings.plain[candidates].T
        for row, cosines in zip(rows, similar, strict=True):
            if len(candidates) and cosines[best := int(cosines.argmax())] >= _SAME:
                found[row], similar[:, best] = candidates[best], -1.0  # each image once
    if missing := [head.uids.index(uid) for uid in examples.class_ids[found < 0].tolist()]:
        counts = np.bincount(missing, minlength=len(head.uids))
        named = [f"{head.class_names[c]} ({counts[c]} of {head.counts[c]})" for c in np.flatnonzero(counts)]
        raise IosrFastError(
            f"expected the images of all {len(examples)} examples of this classifier, found none for {len(missing)} of "
            f"them: {abbreviate(named)}; give the images that it was fitted on, one folder for each class, or take "
            "these examples out (remove_examples)"
        )
    if total > len(found):
        _log.warning("left out %d of %d images, which are no examples of this classifier", total - len(found), total)
    return [images[i] for i in found.tolist()]
