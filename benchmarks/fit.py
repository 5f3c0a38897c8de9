"""JPEG files to a fitted classifier.

    encode-once        the pictures to embeddings, as predict_folder decodes and encodes them: what no fit can avoid
    fit                Classifier.fit with method "auto": decoding, encoding, texts, tuning
    public-way         open_clip's transform and encoder in eager PyTorch, scikit-learn's LogisticRegression

The photographs are made from the demo's pictures (photographs.py). Weights are random, which changes no speed, and so
are labels. The engine is built before, which a field of the row of `fit` times.
"""

from __future__ import annotations

import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.encoder_rivals import in_torch, literal_passes
from benchmarks.harness import Candidate, Run, ready
from benchmarks.photographs import write_photographs
from benchmarks.pipeline import RIVALS_BATCH, embed_files, encode_files
from iosr_fast.classifier import Classifier
from iosr_fast.clip.load import load_clip
from iosr_fast.images.decode import Decoder

SHOTS = 8  # pictures a class
MIN_COSINE = 0.999
PACKAGES = ("openvino", "onnxruntime", "torch", "open_clip_torch", "scikit-learn")


def run(run: Run, model: str = "ViT-B-32", pictures: int = 160) -> None:
    """Verify and time one case; one row an implementation, in images/s."""
    classes = max(2, pictures // SHOTS)
    names = [f"class {c}" for c in range(classes)]
    labels = [names[i * classes // pictures] for i in range(pictures)]
    pretrained = None if model == "demo" else "none"
    with tempfile.TemporaryDirectory() as name:
        paths = write_photographs(Path(name) / "photographs", pictures)
        os.environ["IOSR_FAST_CACHE"] = str(Path(name) / "cache")  # so that the engine is built here
        run.say("building the engine")
        start = time.perf_counter()
        classifier = Classifier(model, pretrained, method="auto")
        runtime = classifier.encoder.runtime
        build_ms = round((time.perf_counter() - start) * 1e3, 1)
        clip = load_clip(model, pretrained)
        embed = in_torch(literal_passes(clip, None, "fp32"), run.device)
        truth = embed_files(embed, paths[:RIVALS_BATCH], clip.geometry)[0]

        def public_way() -> np.ndarray:
            from sklearn.linear_model import LogisticRegression

            rows = embed_files(embed, paths, clip.geometry)[0]
            LogisticRegression(max_iter=1000).fit(rows, labels)
            return rows

        def of_fit(fitted: Classifier) -> dict[str, Any]:
            tuned = fitted.tuned_
            facts = {"runtime": runtime, "method": fitted.method_, "first_build_ms": build_ms}
            facts |= compare(fitted.support_.embeddings.plain, truth)
            return facts if tuned is None else facts | {"tuning_ms": round(tuned.seconds * 1e3, 1)}

        fit = partial(classifier.fit, paths, labels, names)
        encode_once = partial(encode_files, classifier, paths, run.threads, Decoder("cpu-exact"))
        ways = {  # fit is the first, because it opens the engine
            "fit": (fit, of_fit),
            "encode-once": (encode_once, lambda rows: compare(rows.plain, truth)),
            "public-way": (public_way, lambda rows: compare(rows, truth)),
        }
        candidates = {
            name: Candidate(ready(call), check, pictures, "fp32", "encode-once", name != "fit")
            for name, (call, check) in ways.items()
        }
        case = f"{model.lower()}-{pictures}-photographs-c{classes}"
        run.case(case, candidates, "images/s", PACKAGES, bursts=False)


def compare(rows: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """`min_cosine` of the first pictures with `truth`; ArithmeticError for another picture's, or coarse rounding."""
    cosine = float((rows[: len(truth)] * truth).sum(1).min())
    if not cosine >= MIN_COSINE:
        raise ArithmeticError(f"expected embeddings with cosines of at least {MIN_COSINE}, got {cosine:.4f}")
    return {"min_cosine": round(cosine, 6)}
