"""A folder of photographs to labels.

    predict-folder   Classifier.predict_folder: decoding beside the fused encoder, scoring by the compiled kernel, in
                     the runtime that "auto" chooses; -int8 in 8 bits, on a GPU -fp16
    predict, fit     Classifier.predict of the same files, and Classifier.fit of some of them
    encoder-only     the same encoder on decoded pictures, as predict_folder calls it: the ceiling
    obvious-script   the way of the papers' code: PIL, two passes of eager PyTorch in batches of 32, and the formula
                     with its one-hot matrix
    two-pass         the same pictures and formula, the two passes compiled in ONNX Runtime; on a CPU alone

The photographs are made from the demo's pictures (photographs.py), 65 to 80 KB each. Weights are random, which
changes no speed; 8 bits are calibrated on other pictures like them. Labels are compared before anything is timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import encoder_rivals as rivals
from benchmarks.encoder import open_model, pictures_of
from benchmarks.harness import Call, Candidate, Run, ready
from benchmarks.papers import papers_arrays, papers_logits
from benchmarks.photographs import write_photographs
from iosr_fast.classifier import Classifier
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.export.build import write_engine
from iosr_fast.export.source import EngineSource, source_of
from iosr_fast.files.stream import Reader, ReadOptions
from iosr_fast.head.support_images import SupportSettings
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.preprocess import Decode, DecodedBatch, decode_batch, open_image, resize_and_crop
from iosr_fast.scoring.plan import ScoringPlan

RIVALS_BATCH = 32
SUPPORT = 32  # pictures, in half as many classes
# Random weights leave all pictures near one another: keys are centred and weigh more than the texts.
METHOD = {"method": "tip-adapter++", "alpha": 1000.0, "beta": 5.5, "reducer": "centre"}
LABELS_EQUAL = {"fp32": 0.999, "fp16": 0.98, "int8": 0.9}
PACKAGES = ("openvino", "onnxruntime", "torch", "open_clip_torch", "pillow")


def run(run: Run, model: str = "ViT-B-32", pictures: int = 48, first_adapted_block: int | None = None) -> None:
    """Verify and time one model; rows in images/s."""
    clip, adapter = open_model(model, first_adapted_block)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_photographs(folder / "photographs", pictures)
        narrow = "fp16" if run.device.is_gpu else "int8"
        run.say(f"writing engines in fp32 and {narrow}")
        write_engine(source_of(clip, adapter), folder / "fp32")
        if run.device.is_gpu:
            write_engine(source_of(clip, adapter), folder / narrow, precision=narrow)
        else:
            write_engine(EngineSource(folder / "fp32"), folder / narrow, "auto", narrow, pictures=pictures_of(clip)[0])
        classifiers = {precision: fit(model, folder / precision, paths) for precision in ("fp32", narrow)}

        def eager() -> rivals.Embed:
            return rivals.in_torch(rivals.literal_passes(clip, adapter, "fp32"), run.device)

        def compiled() -> rivals.Embed:
            files = {folder / "plain.onnx": None, folder / "adapted.onnx": adapter}
            for path, one in files.items():
                rivals.export_pass(clip, one, path)
            return rivals.in_onnxruntime(list(files), run.threads)

        def script(open_it: Callable[[], rivals.Embed]) -> Call:
            return partial(by_script, open_it(), paths, clip.geometry, classifiers["fp32"].plan_)

        check, timed = Labels().check, partial(Candidate, recorded=False)
        rivals_of = {"obvious-script": eager, **({} if run.device.is_gpu else {"two-pass": compiled})}
        made = {
            name: timed(partial(script, open_it), partial(check, "fp32"), len(paths), "fp32", "encoder-only", True)
            for name, open_it in rivals_of.items()
        }
        for precision, classifier in classifiers.items():
            suffix = "" if precision == "fp32" else f"-{precision}"
            ceiling = f"encoder-only{suffix}"
            predict = partial(labels_of, classifier, folder / "photographs", run.threads)
            encode = partial(encode_files, classifier, paths, run.threads, DecodedOnce())
            in_memory = partial(numbers, classifier.predict, paths)
            again = partial(fit, model, folder / precision, paths)
            for name, call in (("predict-folder", predict), ("predict", in_memory)):
                made[name + suffix] = timed(ready(call), partial(check, precision), len(paths), precision, ceiling)
            made[f"fit{suffix}"] = timed(ready(again), work=SUPPORT, precision=precision)
            made[ceiling] = timed(ready(encode), work=len(paths), precision=precision, ceiling=ceiling)
        case = f"{model.lower()}-{pictures}-photographs-s{adapter.config.first_adapted_block}"
        run.case(case, made, "images/s", PACKAGES, bursts=False)


def fit(model: str, engine: Path, paths: list[Path]) -> Classifier:
    """A tip-adapter++ of the first SUPPORT of the pictures; its class names are numbers."""
    support = paths[:SUPPORT]
    names = [str(i) for i in range(max(2, len(support) // 2))]
    labels = [names[i % len(names)] for i in range(len(support))]
    return Classifier(model, None if model == "demo" else "none", engine=engine, **METHOD).fit(support, labels, names)


class Labels:
    """The labels of the first way, which are the truth for the others."""

    truth: np.ndarray | None = None

    def check(self, precision: str, labels: np.ndarray) -> dict[str, Any]:
        """ArithmeticError unless almost all labels are those of the first way."""
        self.truth = labels if self.truth is None else self.truth
        equal = float((labels == self.truth).mean())
        if equal < LABELS_EQUAL[precision]:
            raise ArithmeticError(f"{equal:.2%} of the labels are right (expected: {LABELS_EQUAL[precision]:.1%})")
        return {"images": len(labels), "labels_equal": round(equal, 4)}


def labels_of(classifier: Classifier, folder: Path, threads: int) -> np.ndarray:
    return numbers(lambda: classifier.predict_folder(folder, threads=threads).labels)


def numbers(predict: Callable[..., np.ndarray], *given: Any) -> np.ndarray:
    """Labels, whose names are numbers."""
    return np.array([int(label) for label in predict(*given).tolist()])


def by_script(embed: rivals.Embed, paths: Sequence[Path], geometry: Geometry, plan: ScoringPlan) -> np.ndarray:
    """By PIL as open_clip's transform does, then by `embed`, one batch after another, and the formula."""
    assert plan.reducer_shift is not None
    parts = []
    for start in range(0, len(paths), RIVALS_BATCH):
        batch = [resize_and_crop(open_image(path), geometry) for path in paths[start : start + RIVALS_BATCH]]
        parts.append([torch.as_tensor(rows).cpu() for rows in embed(np.stack(batch))])
    plain, adapted = map(torch.cat, zip(*parts, strict=True))
    centred = torch.nn.functional.normalize(adapted - torch.tensor(plan.reducer_shift), dim=-1)
    return np.asarray(papers_logits(plain, centred, *papers_arrays(plan)).argmax(1))


def encode_files(classifier: Classifier, paths: Sequence[Path], threads: int, decode: Decode) -> Embeddings:
    """Decoded and encoded as predict_folder does it. Raises BadImageError for the first bad image."""
    reader = Reader(classifier.encoder, classifier.engine_, SupportSettings(), ReadOptions(threads=threads))
    reader.decode = decode
    embeddings = reader.embed(paths)[2]
    assert embeddings is not None
    return embeddings


class DecodedOnce:
    """Keeps every batch, so that a second run over the same ones times the encoder alone."""

    def __init__(self) -> None:
        self.batches: dict[int, DecodedBatch] = {}

    def __call__(self, sources: Sequence[Any], geometry: Geometry, start: int) -> DecodedBatch:
        if start not in self.batches:
            self.batches[start] = decode_batch(sources, geometry, start)
        return self.batches[start]
