"""A folder of photographs to labels, and a new process to its first label (cold_start).

    predict-folder   Classifier.predict_folder: decoding beside the fused encoder, scoring by the compiled kernel, in
                     the runtime that "auto" chooses; -int8 in 8 bits
    encoder-only     the same encoder on decoded pictures, as predict_folder calls it: the ceiling; -int8 in 8 bits
    decode-only      our decoder alone, in as many threads
    obvious-script   the way of the papers' code: PIL, two passes of eager PyTorch in batches of 32, and the formula
                     with its one-hot matrix
    two-pass         the same pictures and formula, the two passes compiled in ONNX Runtime

The photographs are made from the demo's pictures (photographs.py), 65 to 80 KB each. Weights are random, which
changes no speed; 8 bits are calibrated on other pictures like them. Labels are compared before anything is timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import cold_start
from benchmarks import encoder_rivals as rivals
from benchmarks.encoder import late_block, pictures_of
from benchmarks.harness import Call, Candidate, Run, torch_threads
from benchmarks.photographs import write_photographs
from iosr_fast.classifier import Classifier
from iosr_fast.clip.adapter import Adapter, random_adapter
from iosr_fast.clip.load import LoadedClip, load_clip
from iosr_fast.export.build import convert_engine, write_engine
from iosr_fast.files.stream import Stage, batch_sizes, choose_batch, choose_stage
from iosr_fast.images.decode import Decoder
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.preprocess import open_image, resize_and_crop
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.utils.ordered import map_ordered

RIVALS_BATCH = 32
SUPPORT = 32  # pictures, in half as many classes
# Random weights leave all pictures near one another: keys are centred and weigh more than the texts.
METHOD = {"method": "tip-adapter++", "alpha": 1000.0, "beta": 5.5, "reducer": "centre"}
LABELS_EQUAL, LEVELS = {"fp32": 0.999, "int8": 0.9}, 1.0
PACKAGES = ("openvino", "onnxruntime", "torch", "open_clip_torch", "pillow")


def run(run: Run, model: str = "ViT-B-32", pictures: int = 48, first_adapted_block: int | None = None) -> None:
    """Verify and time one model; rows in images/s, those of the first label in ms."""
    clip = load_clip(model, None if model == "demo" else "none")
    first = late_block(clip) if first_adapted_block is None else first_adapted_block
    adapter = random_adapter(clip, first)
    with tempfile.TemporaryDirectory() as name, torch_threads(run.threads):
        folder = Path(name)
        paths = write_photographs(folder / "photographs", pictures)
        run.say("writing engines in fp32 and int8")
        write_engine(clip, adapter, folder / "fp32")
        convert_engine(folder / "fp32", folder / "int8", "auto", "int8", pictures_of(clip)[0])
        classifiers = {precision: fit(model, folder / precision, paths) for precision in ("fp32", "int8")}
        made = Folder(clip, adapter, paths, run, folder)
        case = f"{model.lower()}-{pictures}-photographs-s{first}"
        run.case(case, made.candidates(classifiers), "images/s", PACKAGES, bursts=False)
        starts = cold_start.candidates(clip, adapter, classifiers["fp32"], paths[0], folder)
        run.case(f"{model.lower()}-first-label", starts, packages=PACKAGES, bursts=False)


def fit(model: str, engine: Path, paths: list[Path]) -> Classifier:
    """A tip-adapter++ of the first SUPPORT of the pictures; its class names are numbers."""
    support = paths[:SUPPORT]
    names = [str(i) for i in range(max(2, len(support) // 2))]
    labels = [names[i % len(names)] for i in range(len(support))]
    return Classifier(model, None if model == "demo" else "none", engine=engine, **METHOD).fit(support, labels, names)


class PapersFormula:
    """A tip-adapter++ plan in eager PyTorch, with the (B, N) affinity and the (N, C) one-hot matrix: logits (B, C)."""

    def __init__(self, plan: ScoringPlan) -> None:
        assert plan.text is not None and plan.class_offsets is not None
        self.text, self.keys = (torch.from_numpy(np.array(array)) for array in (plan.text, plan.keys))
        self.shift = None if plan.reducer is None else torch.from_numpy(np.array(plan.reducer.shift))
        labels = np.repeat(np.arange(plan.n_classes), np.diff(plan.class_offsets))
        self.onehot = nn.functional.one_hot(torch.from_numpy(labels), plan.n_classes).float()
        self.tau, self.alpha, self.beta = plan.tau, plan.alpha, plan.beta

    def __call__(self, plain: torch.Tensor, adapted: torch.Tensor) -> torch.Tensor:
        query = adapted if self.shift is None else nn.functional.normalize(adapted - self.shift, dim=-1)
        affinity = ((-1) * (self.beta - self.beta * (query @ self.keys.T))).exp()
        return self.tau * plain @ self.text.T + self.alpha * (affinity @ self.onehot)


class Folder:
    """The ways from one folder of photographs to labels. The labels of the first way are the truth."""

    def __init__(self, clip: LoadedClip, adapter: Adapter, paths: list[Path], run: Run, folder: Path) -> None:
        self.clip, self.adapter, self.paths, self.run, self.folder = clip, adapter, paths, run, folder
        self.truth: np.ndarray | None = None

    def candidates(self, classifiers: dict[str, Classifier]) -> dict[str, Candidate]:
        count, formula = float(len(self.paths)), PapersFormula(classifiers["fp32"].plan_)
        made: dict[str, Candidate] = {}

        def labelling(prepare: Callable[[], Call], precision: str, ceiling: str, rival: bool = False) -> Candidate:
            return Candidate(prepare, partial(self.check, precision), count, precision, ceiling, rival)

        for name, open_it in (("obvious-script", self.eager), ("two-pass", self.compiled)):
            prepare = partial(self.by_script, open_it, formula)
            made[name] = labelling(prepare, "fp32", "encoder-only", rival=True)
        for precision, classifier in classifiers.items():
            suffix = "" if precision == "fp32" else f"-{precision}"
            ceiling = f"encoder-only{suffix}"
            made[f"predict-folder{suffix}"] = labelling(partial(self.predict, classifier), precision, ceiling)
            prepare = partial(self.encoder_only, classifier)
            made[ceiling] = Candidate(prepare, work=count, precision=precision, ceiling=ceiling)
        decode_all = partial(self.decode_all, classifiers["fp32"])
        made["decode-only"] = Candidate(lambda: decode_all, self.check_pixels, count)
        return made

    def check(self, precision: str, labels: np.ndarray) -> dict[str, Any]:
        """ArithmeticError unless almost all labels are those of the first way."""
        self.truth = labels if self.truth is None else self.truth
        equal = float((labels == self.truth).mean())
        if equal < LABELS_EQUAL[precision]:
            raise ArithmeticError(f"{equal:.2%} of the labels are right (expected: {LABELS_EQUAL[precision]:.1%})")
        return {"images": len(labels), "labels_equal": round(equal, 4)}

    def check_pixels(self, decoded: list[np.ndarray]) -> dict[str, Any]:
        """ArithmeticError unless our decoder's pixels are those of the reference, within LEVELS on average."""
        truth = pixels_of(self.paths, self.clip.geometry).astype(int)
        off = float(np.abs(np.concatenate(decoded) - truth).mean())
        if not off <= LEVELS:
            raise ArithmeticError(f"pixels are off by {off:.2f} levels on average (allowed: {LEVELS})")
        return {"levels_off": round(off, 3)}

    def predict(self, classifier: Classifier) -> Call:
        def call() -> np.ndarray:
            results = classifier.predict_folder(self.folder / "photographs", threads=self.run.threads)
            return np.array([int(label) for label in results.labels.tolist()])

        return call

    def eager(self) -> rivals.Embed:
        return rivals.in_torch(rivals.literal_passes(self.clip, self.adapter, "fp32"), self.run.device)

    def compiled(self) -> rivals.Embed:
        passes = []
        for name, adapter in (("plain", None), ("adapted", self.adapter)):
            path = self.folder / f"{name}.onnx"
            rivals.write(rivals.Pass(self.clip, adapter), path)
            passes.append(rivals.in_onnxruntime(path, self.run.threads, spin=False))
        return rivals.in_turn(passes)

    def by_script(self, open_it: Callable[[], rivals.Embed], formula: PapersFormula) -> Call:
        """Files to labels, one batch after another."""
        embed = open_it()

        def call() -> np.ndarray:
            labels = []
            for start in range(0, len(self.paths), RIVALS_BATCH):
                pixels = pixels_of(self.paths[start : start + RIVALS_BATCH], self.clip.geometry)
                plain, adapted = (torch.as_tensor(part) for part in embed(pixels))
                labels.append(formula(plain, adapted).argmax(1).numpy())
            return np.concatenate(labels)

        return call

    def encoder_only(self, classifier: Classifier) -> Call:
        batches, stage = self.decode_all(classifier), self.stage(classifier)

        def call() -> object:
            with closing(map_ordered(batches, stage.encoder.encode, stage.callers, 2 * stage.callers)) as embeddings:
                return list(embeddings)

        return call

    def decode_all(self, classifier: Classifier) -> list[np.ndarray]:
        """The pictures in batches as predict_folder makes them. Raises BadImageError for the first bad image."""
        ends = accumulate(batch_sizes(len(self.paths), self.batch(classifier), self.stage(classifier).callers))
        groups = [self.paths[start:end] for start, end in pairwise([0, *ends])]

        def decode(paths: list[Path]) -> np.ndarray:
            decoded = Decoder().decode(paths, self.clip.geometry)
            for error in decoded.errors:
                if error is not None:
                    raise error
            return np.asarray(decoded.pixels)

        with closing(map_ordered(groups, decode, self.run.threads, 2 * self.run.threads)) as batches:
            return list(batches)

    def batch(self, classifier: Classifier) -> int:
        return choose_batch(classifier.encoder, None)

    def stage(self, classifier: Classifier) -> Stage:
        arguments = (classifier.encoder, classifier.engine_, len(self.paths), self.batch(classifier))
        return choose_stage(*arguments, self.run.threads)


def pixels_of(paths: Sequence[Path], geometry: Geometry) -> np.ndarray:
    """(N, S, S, 3) uint8 by PIL, as open_clip's transform resizes and crops."""
    return np.stack([resize_and_crop(open_image(path), geometry) for path in paths])
