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
from contextlib import closing
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.encoder_rivals import in_torch, literal_passes
from benchmarks.harness import Candidate, Run, torch_threads
from benchmarks.photographs import write_photographs
from benchmarks.pipeline import pixels_of
from iosr_fast.classifier import Classifier
from iosr_fast.clip.load import load_clip
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.files.stream import batch_sizes, choose_batch, choose_stage, encode_batches
from iosr_fast.images.decode import Decoder

SHOTS = 8  # pictures a class
PUBLIC_BATCH = 32
MIN_COSINE = 0.999
PACKAGES = ("openvino", "onnxruntime", "torch", "open_clip_torch", "scikit-learn")


def run(run: Run, model: str = "ViT-B-32", pictures: int = 160) -> None:
    """Verify and time one case; one row an implementation, in images/s."""
    classes = max(2, pictures // SHOTS)
    names = [f"class {c}" for c in range(classes)]
    labels = [names[i * classes // pictures] for i in range(pictures)]
    pretrained = None if model == "demo" else "none"
    with tempfile.TemporaryDirectory() as name, torch_threads(run.threads):
        paths = write_photographs(Path(name) / "photographs", pictures)
        os.environ["IOSR_FAST_CACHE"] = str(Path(name) / "cache")  # so that the engine is built here
        run.say("building the engine")
        start = time.perf_counter()
        classifier = Classifier(model, pretrained, method="auto")
        encoder = classifier.encoder
        build_ms = round((time.perf_counter() - start) * 1e3, 1)
        clip = load_clip(model, pretrained)
        embed = in_torch(literal_passes(clip, None, "fp32"), run.device)

        def public_embeddings(paths: list[Path]) -> np.ndarray:
            starts = range(0, len(paths), PUBLIC_BATCH)
            batches = [pixels_of(paths[start : start + PUBLIC_BATCH], clip.geometry) for start in starts]
            return np.concatenate([embed(pixels)[0].numpy() for pixels in batches])

        truth = public_embeddings(paths[:PUBLIC_BATCH])

        def encode_once() -> Embeddings:
            batch = choose_batch(encoder, None)
            stage = choose_stage(encoder, classifier.engine_, pictures, batch, run.threads)
            ends = [0, *accumulate(batch_sizes(pictures, batch, stage.callers))]
            batches = [(begin, paths[begin:end]) for begin, end in pairwise(ends)]
            with closing(encode_batches(stage, Decoder("cpu-exact"), batches, Embeddings.to_numpy)) as results:
                return Embeddings.concatenate([rows for _, rows in results if rows is not None])

        def fit() -> Classifier:
            return classifier.fit(paths, labels, names)

        def public_way() -> np.ndarray:
            from sklearn.linear_model import LogisticRegression

            rows = public_embeddings(paths)
            LogisticRegression(max_iter=1000).fit(rows, labels)
            return rows

        def of_fit(fitted: Classifier) -> dict[str, Any]:
            tuned = fitted.tuned_
            facts = {"runtime": encoder.runtime, "method": fitted.method_, "first_build_ms": build_ms}
            facts |= compare(fitted.support_.embeddings.plain, truth)
            return facts if tuned is None else facts | {"tuning_ms": round(tuned.seconds * 1e3, 1)}

        work = float(pictures)
        candidates = {
            # First, because it is what opens the engine.
            "fit": Candidate(lambda: fit, of_fit, work, ceiling="encode-once"),
            "encode-once": Candidate(
                lambda: encode_once, lambda rows: compare(rows.plain, truth), work, ceiling="encode-once", rival=True
            ),
            "public-way": Candidate(
                lambda: public_way, lambda rows: compare(rows, truth), work, ceiling="encode-once", rival=True
            ),
        }
        case = f"{model.lower()}-{pictures}-photographs-c{classes}"
        run.case(case, candidates, "images/s", PACKAGES, bursts=False)


def compare(rows: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """`min_cosine` of the first pictures with `truth`; ArithmeticError for another picture's, or coarse rounding."""
    cosine = float((rows[: len(truth)] * truth).sum(1).min())
    if not cosine >= MIN_COSINE:
        raise ArithmeticError(f"expected embeddings with cosines of at least {MIN_COSINE}, got {cosine:.4f}")
    return {"min_cosine": round(cosine, 6)}
