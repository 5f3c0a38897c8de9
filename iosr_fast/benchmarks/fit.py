"""JPEG files to a fitted classifier.

    encode-once        the pictures to embeddings, as predict_folder decodes and encodes them: what no fit can avoid
    fit                Classifier.fit with method "auto": decoding, encoding, texts, tuning
    tuning             its search for method and parameters
    texts              its class names to embeddings
    public-way         open_clip's transform and encoder in eager PyTorch, scikit-learn's LogisticRegression

The photographs are made from the demo's pictures (photographs.py). Weights are random, which changes no speed, and so
are labels. The engine is built before; the first build and the first save of a classifier stand in further fields.
Embeddings are compared before anything is timed.
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
import torch

from iosr_fast.benchmarks import harness
from iosr_fast.benchmarks.photographs import write_photographs
from iosr_fast.classifier import Classifier
from iosr_fast.clip.load import load_clip
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.images.decode import CpuDecoder
from iosr_fast.images.preprocess import open_image, resize_and_crop
from iosr_fast.pipeline.stream import batch_sizes, choose_batch, choose_stage, encode_batches
from iosr_fast.utils.machine import usable_threads
from iosr_fast.utils.require import require

RIVALS = ("encode-once", "public-way")
PUBLIC_BATCH = 32
MIN_COSINE = 0.999


def public_embeddings(clip: Any, paths: list[Path]) -> np.ndarray:
    """(N, D) float32 by open_clip's own encoder, in batches of 32."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (clip.mean, clip.std))
    rows = []
    with torch.inference_mode():
        for start in range(0, len(paths), PUBLIC_BATCH):
            pixels = [resize_and_crop(open_image(path), clip.geometry) for path in paths[start : start + PUBLIC_BATCH]]
            batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float().div(255)
            rows.append(clip.model.encode_image((batch - mean) / std, normalize=True))
    embeddings: np.ndarray = torch.cat(rows).numpy()
    return embeddings


def check(name: str, rows: np.ndarray, expected: np.ndarray) -> None:
    """Raise RuntimeError if one of the embeddings is another picture's, or rounded too coarsely."""
    cosine = float((rows * expected).sum(1).min())
    if rows.shape != expected.shape or cosine < MIN_COSINE:
        raise RuntimeError(f"expected embeddings of {name} with cosines of at least {MIN_COSINE}, got {cosine:.4f}")


def run(
    model: str = "ViT-B-32", pictures: int = 800, classes: int = 100, threads: int | None = None, repeats: int = 1
) -> list[dict[str, Any]]:
    """Verify and time one case; one row an implementation, in images/s."""
    threads = threads or usable_threads()
    classes = min(classes, pictures // 2)
    linear_model = require("sklearn.linear_model", "cpu")
    pretrained = None if model == "demo" else "none"
    with tempfile.TemporaryDirectory() as name, harness.torch_threads(threads):
        folder = Path(name)
        paths = write_photographs(folder / "photographs", pictures)
        labels = np.repeat(np.arange(classes), -(-pictures // classes))[:pictures]
        names = [f"class {c}" for c in range(classes)]
        os.environ["IOSR_FAST_CACHE"] = str(folder / "cache")  # the first build is timed
        start = time.perf_counter()
        classifier = Classifier(model, pretrained, method="auto")
        encoder = classifier.encoder
        build_ms = (time.perf_counter() - start) * 1e3
        fitted: list[Classifier] = []
        tuning_ms: list[float] = []

        def fit() -> None:
            fitted[:] = [classifier.fit(paths, labels, names)]
            assert classifier.tuned_ is not None
            tuning_ms.append(classifier.tuned_.seconds * 1e3)

        def encode_once() -> Embeddings:
            batch = choose_batch(encoder, None)
            stage = choose_stage(encoder, classifier.engine_, CpuDecoder(exact=True), pictures, batch, threads)
            ends = [0, *accumulate(batch_sizes(pictures, batch, stage.callers))]
            batches = [(begin, paths[begin:end]) for begin, end in pairwise(ends)]
            with closing(encode_batches(stage, CpuDecoder(exact=True), batches, Embeddings.to_numpy)) as results:
                return Embeddings.concatenate([rows for _, rows in results if rows is not None])

        clip = load_clip(model, pretrained)

        def public_way() -> object:
            return linear_model.LogisticRegression(max_iter=1000).fit(public_embeddings(clip, paths), labels)

        fit()
        check("the fit", classifier.support_.embeddings.plain, encode_once().plain)
        few = slice(PUBLIC_BATCH)
        check("the public way", public_embeddings(clip, paths[few]), classifier.support_.embeddings.plain[few])
        start = time.perf_counter()
        classifier.save(folder / "saved")
        save_ms = (time.perf_counter() - start) * 1e3
        tuning_ms.clear()
        impls = {"encode-once": encode_once, "fit": fit, "public-way": public_way}
        runtimes_ms = harness.measure(impls, repeats, bursts=False)
        start = time.perf_counter()
        text = fitted[0]._open().text
        assert text is not None
        text.embed_classes(names)
        runtimes_ms |= {"tuning": tuning_ms, "texts": [(time.perf_counter() - start) * 1e3]}
    facts = {
        "runtime": encoder.runtime,
        "method": classifier.method_,
        "first_build_ms": build_ms,
        "first_save_ms": save_ms,
    }
    return harness.rows(
        "fit",
        f"{model.lower()}-{pictures}-photographs-c{classes}",
        runtimes_ms,
        rivals=RIVALS,
        threads=threads,
        work={impl: float(pictures) for impl in ("encode-once", "fit", "public-way")},
        rate_unit="images/s",
        packages=("openvino", "onnxruntime", "torch", "open_clip_torch", "scikit-learn"),
        extra={"fit": facts},
    )
