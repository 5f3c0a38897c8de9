"""How far results on the GPU are from the truth: the encoder in each precision, scoring kernels, the demo's labels."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any, get_args

import numpy as np
import torch

from iosr_fast.clip.dual_encoder import Precision
from iosr_fast.clip.fuse import build_dual_encoder
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.scoring import dispatch
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.reference import score_reference
from iosr_fast.scoring.score import score
from tools.bench import score as bench
from tools.gpu.device import synced
from tools.gpu.models import MAX_ERROR, MIN_COSINE, WITHOUT_OPEN_CLIP, make
from tools.gpu.report import Report, Setting

MODELS = ("demo", "ViT-B-16")
# Those of ordinary size first: every width is a compilation of Triton's, and time may run out.
SHAPES = ("q64-k1600-d512-c100", "q256-k16000-d512-c1000", "q3-k50001-d768-c7", "q252-k507-d123-c31", "q7-k123-d33-c5")
TINY = ("q3-k40-d16-c5",)
# A label may differ where the two best logits are closer than this share of the largest: rounding decides there.
NEAR_TIE = 1e-4
DEMO_CLASSES, DEMO_SHOTS = 100, 4


def run(report: Report, setting: Setting) -> None:
    steps = {"the encoder's parity": encoders, "the demo's labels": demo_labels, "scoring's parity": scoring}
    report.plan(*steps)
    # Products in float32 are meant: cuDNN would round what goes into a convolution to TF32.
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    for name, step in steps.items():
        step(report, setting)
        report.done(name)


def encoders(report: Report, setting: Setting) -> None:
    """Each precision of the fused encoder, and of two eager passes on the same device, against float32 on the CPU."""
    if find_spec("open_clip") is None:
        report.skip(f"the two eager passes in parity: {WITHOUT_OPEN_CLIP}; truth is the fused encoder on the CPU")
    for name in MODELS[:1] if setting.tiny else MODELS:
        for precision in get_args(Precision):
            models = make(name, setting.device, precision)
            pixels = models.batch(len(models.pixels), setting.device)
            for impl, module in (("fused", models.fused), ("two-pass", models.two)):
                if module is None:
                    continue
                errors = models.errors(synced(partial(module, pixels), setting.device)())
                line = {"model": name, "impl": impl, "precision": precision, "truth": models.verified_against, **errors}
                report.add_table("encoder", [line])
                good = (
                    errors["max_abs_error"] <= MAX_ERROR if precision == "fp32" else errors["min_cosine"] >= MIN_COSINE
                )
                if impl == "fused" and not good:
                    report.fail(f"the fused encoder of {name} in {precision} is wrong: {errors}")


def scoring(report: Report, setting: Setting) -> None:
    """Every implementation here, at each precision of the keys, against float64; errors are of the largest logit."""
    if setting.device == "cuda":
        for entry in dispatch.REGISTRY:
            if "cuda" in entry.devices and (reason := entry.unavailable_reason()) is not None:
                report.skip(f"{entry.name} in scoring's parity: {reason}")
    allowed, cases = bench.TOLERANCES[setting.device], TINY if setting.tiny else SHAPES
    report.plan(*(f"scoring's parity in {text}" for text in cases))
    for text in cases:
        if not report.reaches(f"scoring's parity in {text}", setting, 0 if setting.tiny else 25):
            continue
        plan, embeddings = bench.Case.parse(text).build()
        for name, candidate in bench.ours(plan, embeddings, setting.device).items():
            error = largest_error(candidate, embeddings)
            line = {"case": text, "impl": name, "precision": candidate.precision, "error": error, "allowed": allowed}
            report.add_table("scoring", [line])
            if not error <= allowed:
                report.fail(f"{name} scores {text} wrong by {error:.2g} of the largest logit (allowed: {allowed})")
        report.done(f"scoring's parity in {text}")


def largest_error(candidate: bench.Candidate, embeddings: Embeddings, most: int = 32) -> float:
    """Of the largest logit, over every class of at most `most` queries; infinite for what isn't finite."""
    logits = host(candidate.call())
    rows = np.unique(np.linspace(0, len(embeddings) - 1, most).astype(int))
    truth = score_reference(candidate.plan, embeddings[rows])
    if logits.shape != (len(embeddings), truth.shape[1]) or not np.isfinite(logits).all():
        return float("inf")
    return float(np.abs(logits[rows] - truth).max() / np.abs(truth).max())


def host(logits: Any) -> np.ndarray:
    found: np.ndarray = logits if isinstance(logits, np.ndarray) else logits.float().cpu().numpy()
    return found


def demo_labels(report: Report, setting: Setting) -> None:
    """The shipped CLIP and adapter on held-out pictures: the device's labels against those of the CPU."""
    missing = [name for name in ("open_clip", "PIL", "safetensors") if find_spec(name) is None]
    if missing:
        report.skip(f"the demo's labels: {' and '.join(missing)} not installed")
        return
    from iosr_fast.clip.demo.pictures import load_pictures
    from iosr_fast.clip.load import load_clip
    from iosr_fast.export.pretrained import choose_adapter

    clip = load_clip("demo")
    adapter = choose_adapter(clip, "auto")
    pictures = load_pictures("held-out", min_styles=DEMO_SHOTS + 1)
    classes = np.arange(5 if setting.tiny else DEMO_CLASSES)
    rows = [np.flatnonzero(pictures.concepts == concept) for concept in classes]
    support, asked = (
        np.concatenate([row[part] for row in rows]) for part in (slice(DEMO_SHOTS), slice(DEMO_SHOTS, None))
    )
    images = pictures.images[np.concatenate([support, asked])]
    truth = pictures.concepts[asked]
    support, asked = np.arange(len(support)), np.arange(len(support), len(images))
    exact = embed(build_dual_encoder(clip, adapter, "fp32"), images, "cpu")
    offsets = np.arange(len(classes) + 1) * DEMO_SHOTS
    keys = exact[1][support].numpy()
    plan = ScoringPlan(len(classes), keys=keys, class_offsets=offsets, query="adapted", alpha=1.0, beta=5.5)
    expected = host(score(plan, Embeddings(*(rows[asked].numpy() for rows in exact))))
    best = np.sort(expected, axis=1)[:, -2:]
    tied = best[:, 1] - best[:, 0] < NEAR_TIE * np.abs(expected).max()
    for precision in get_args(Precision):
        encoder = build_dual_encoder(clip, adapter, precision).to(setting.device)
        queries = Embeddings(*(rows[asked] for rows in embed(encoder, images, setting.device)))
        for key_precision in ("fp32", "fp16", "int8"):
            labels = host(score(plan.with_key_precision(key_precision), queries)).argmax(1)
            changed = int((labels != expected.argmax(1)).sum())
            beyond = int(((labels != expected.argmax(1)) & ~tied).sum())
            right = float((labels == truth).mean())
            line = {"encoder": precision, "keys": key_precision, "pictures": len(asked), "changed_labels": changed}
            report.add_table("demo", [{**line, "beyond_near_ties": beyond, "accuracy": round(right, 4)}])
            if precision == key_precision == "fp32" and beyond:
                report.fail(f"{beyond} of the demo's {len(asked)} labels in float32 are not the CPU's")


def embed(encoder: Any, images: np.ndarray, device: str, batch: int = 256) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode():
        parts = [
            encoder(torch.from_numpy(images[first : first + batch].copy()).to(device))
            for first in range(0, len(images), batch)
        ]
        return tuple(torch.cat(outputs) for outputs in zip(*parts, strict=True))
