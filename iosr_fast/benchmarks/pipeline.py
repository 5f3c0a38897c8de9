"""A folder of photographs to labels: files are read, decoded, encoded and scored.

    predict-folder   Classifier.predict_folder: decoding beside the fused encoder, scoring by the compiled kernel, in
                     the runtime that "auto" chooses; -int8 in 8 bits
    encoder-only     the same encoder on decoded pictures, by the faster of our two ways to call it: the ceiling; -int8
                     in 8 bits
    decode-only      our decoder alone, in as many threads
    obvious-script   the way of the papers' code: PIL and open_clip's transform, then two passes of eager PyTorch in
                     batches of 32, and the formula with its one-hot matrix
    two-pass         the same transform and formula, the two passes compiled in ONNX Runtime

The photographs are made from the demo's pictures (photographs.py), 65 to 80 KB each. Weights are random, which
changes no speed; 8 bits are calibrated on other pictures like them. Labels are compared before anything is timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from iosr_fast.benchmarks import harness
from iosr_fast.benchmarks.encoder_rivals import open_session, write_passes
from iosr_fast.benchmarks.photographs import write_photographs
from iosr_fast.benchmarks.precision import pictures_of
from iosr_fast.benchmarks.random_weights import fit
from iosr_fast.classifier import Classifier
from iosr_fast.clip.adapter import Adapter, encode_adapted, encode_plain
from iosr_fast.clip.load import LoadedClip, load_clip
from iosr_fast.export.convert import convert_engine
from iosr_fast.export.export import random_adapter, write_engine
from iosr_fast.images.decode import CpuDecoder
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.pixels import FORMATS
from iosr_fast.images.preprocess import open_image, resize_and_crop
from iosr_fast.pipeline.stream import Stage, batch_sizes, choose_batch, choose_stage
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.utils.machine import usable_threads
from iosr_fast.utils.ordered import map_ordered

RIVALS = ("obvious-script", "two-pass", "encoder-only")
SUFFIXES = {"fp32": "", "int8": "-int8"}
RIVALS_BATCH = 32
LABELS_EQUAL, LEVELS = {"fp32": 0.999, "int8": 0.98}, 1.0
Embed = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
Label = Callable[[], np.ndarray]


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


@torch.inference_mode()
def by_script(paths: list[Path], clip: LoadedClip, embed: Embed, formula: PapersFormula) -> np.ndarray:
    """Files to labels one batch after another: PIL and open_clip's transform, `embed`, the papers' formula."""
    import open_clip
    from PIL import Image

    geometry = clip.geometry
    transform = open_clip.image_transform(
        geometry.size,
        is_train=False,
        mean=clip.mean,
        std=clip.std,
        resize_mode=geometry.resize_mode,
        interpolation=geometry.interpolation,
        fill_color=geometry.fill,
    )
    labels = []
    for start in range(0, len(paths), RIVALS_BATCH):
        pixels = torch.stack([transform(Image.open(p, formats=FORMATS)) for p in paths[start : start + RIVALS_BATCH]])
        labels.append(formula(*embed(pixels)).argmax(1).numpy())
    return np.concatenate(labels)


def eager(clip: LoadedClip, adapter: Adapter) -> Embed:
    """The public way: open_clip's own forward, then the forward with the adapter."""

    def embed(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        plain, adapted = encode_plain(clip, pixels), encode_adapted(clip, adapter, pixels)
        return nn.functional.normalize(plain, dim=-1), nn.functional.normalize(adapted, dim=-1)

    return embed


def compiled(clip: LoadedClip, adapter: Adapter, threads: int, folder: Path) -> Embed:
    """Two passes in ONNX Runtime. The modules normalise by themselves, so the transform's floats go back to uint8."""
    # They and PyTorch take turns, so their threads don't spin.
    sessions = [open_session(path, threads, spin=False) for path in write_passes(clip, adapter, folder)]
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (clip.mean, clip.std))

    def embed(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        levels = ((pixels * std + mean) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
        plain, adapted = (torch.from_numpy(session.run(None, {"pixels": levels})[0]) for session in sessions)
        return plain, adapted

    return embed


def verify_labels(labels: Mapping[str, np.ndarray], truth: str) -> None:
    """Raise ArithmeticError unless LABELS_EQUAL of all labels are those of the implementation `truth`."""
    for name, each in labels.items():
        equal, expected = float((each == labels[truth]).mean()), LABELS_EQUAL[precision_of(name)]
        if equal < expected:
            raise ArithmeticError(f"{name}: {equal:.2%} of the labels are right (expected: {expected:.1%}); not timed")


def precision_of(impl: str) -> str:
    return "int8" if impl.endswith(SUFFIXES["int8"]) else "fp32"


def decode(paths: list[Path], geometry: Geometry) -> np.ndarray:
    """By the decoder of predict_folder. Raises BadImageError for the first bad image."""
    decoded = CpuDecoder().decode(paths, geometry)
    for error in decoded.errors:
        if error is not None:
            raise error
    assert isinstance(decoded.pixels, np.ndarray)
    return decoded.pixels


def verify_pixels(paths: list[Path], geometry: Geometry) -> None:
    """Raise ArithmeticError unless our decoder's pixels are those of the reference, within LEVELS on average."""
    off = [
        np.abs(a.astype(int) - resize_and_crop(open_image(b), geometry)).mean()
        for a, b in zip(decode(paths, geometry), paths, strict=True)
    ]
    if not np.mean(off) <= LEVELS:
        raise ArithmeticError(f"pixels are off by {np.mean(off):.2f} levels on average (allowed: {LEVELS}); not timed")


def encoder_only(stage: Stage, whole: Any, batches: list[np.ndarray]) -> Callable[[], object]:
    """The faster of two ways to encode decoded pictures: one call on all cores, or callers of one core each."""

    def one(batches: list[np.ndarray] = batches) -> object:
        return [whole.encode(batch) for batch in batches]

    def many(batches: list[np.ndarray] = batches) -> object:
        with closing(map_ordered(batches, stage.encoder.encode, stage.callers, 2 * stage.callers)) as embeddings:
            return list(embeddings)

    if stage.callers == 1:
        return one
    few = batches[: 2 * stage.callers]
    times = {way: min(harness.measure({"": partial(way, few)}, 2)[""]) for way in (one, many)}
    return min(times, key=lambda way: times[way])


def run(
    model: str = "ViT-B-32",
    pictures: int = 500,
    first_adapted_block: int = 8,
    threads: int | None = None,
    repeats: int = 3,
) -> list[dict[str, Any]]:
    """Verify and time one case, interleaved; one row an implementation, in images/s and of encoder-only's rate.

    The first run of each checks its labels and measures its memory.
    """
    threads = threads or usable_threads()
    clip = load_clip(model, None if model == "demo" else "none")
    adapter = random_adapter(clip, first_adapted_block)
    with tempfile.TemporaryDirectory() as name, harness.torch_threads(threads):
        folder = Path(name)
        paths = write_photographs(folder / "photographs", pictures)
        write_engine(clip, adapter, folder / "fp32")
        convert_engine(folder / "fp32", folder / "int8", "auto", "int8", pictures_of(clip)[0])
        classifiers = {precision: fit(folder / precision, paths, threads) for precision in SUFFIXES}
        formula = PapersFormula(classifiers["fp32"].plan_)
        geometry = clip.geometry
        encoder, engine = classifiers["fp32"].encoder, classifiers["fp32"].engine_
        batch = choose_batch(encoder, None)
        callers = choose_stage(encoder, engine, CpuDecoder(), pictures, batch, threads).callers
        ends = list(accumulate(batch_sizes(pictures, batch, callers)))
        groups = [paths[start:end] for start, end in pairwise([0, *ends])]

        def decoded() -> list[np.ndarray]:
            with closing(map_ordered(groups, lambda group: decode(group, geometry), threads, 2 * threads)) as batches:
                return list(batches)

        def ours(classifier: Classifier) -> np.ndarray:
            results = classifier.predict_folder(folder / "photographs", threads=threads)
            return np.array([int(label.split()[1]) for label in results.labels.tolist()])

        def alone(classifier: Classifier) -> Callable[[], object]:
            stage = choose_stage(classifier.encoder, classifier.engine_, CpuDecoder(), pictures, batch, threads)
            return encoder_only(stage, classifier.encoder, batches)

        labelling: dict[str, Label] = {
            **{f"predict-folder{SUFFIXES[precision]}": partial(ours, each) for precision, each in classifiers.items()},
            "obvious-script": partial(by_script, paths, clip, eager(clip, adapter), formula),
            "two-pass": partial(by_script, paths, clip, compiled(clip, adapter, threads, folder), formula),
        }
        labels: dict[str, np.ndarray] = {}

        def keep(impl: str, label: Label) -> None:
            labels[impl] = label()

        memory_mb = {impl: harness.extra_memory_mb(partial(keep, impl, label)) for impl, label in labelling.items()}
        verify_labels(labels, "obvious-script")
        verify_pixels(paths[:50], geometry)
        batches = decoded()
        impls: dict[str, Callable[[], object]] = {
            **labelling,
            **{f"encoder-only{SUFFIXES[precision]}": alone(each) for precision, each in classifiers.items()},
            "decode-only": decoded,
        }
        runtimes_ms = harness.measure(impls, repeats, bursts=False)
    rates = {impl: pictures / float(np.median(times)) * 1e3 for impl, times in runtimes_ms.items()}
    extra = {
        impl: {"images": pictures, "images_per_s": round(rate, 2), "memory_mb": memory_mb.get(impl)}
        | ({"runtime": encoder.runtime} if impl.startswith(("predict-folder", "encoder-only")) else {})
        for impl, rate in rates.items()
    }
    return harness.rows(
        "pipeline",
        f"{model.lower()}-{pictures}-photographs-s{first_adapted_block}",
        runtimes_ms,
        rivals=RIVALS,
        threads=threads,
        work=pictures,
        rate_unit="images/s",
        precision={impl: precision_of(impl) for impl in rates},
        ceiling={impl: rates[f"encoder-only{SUFFIXES[precision_of(impl)]}"] for impl in rates if impl != "decode-only"},
        packages=("openvino", "onnxruntime", "torch", "open_clip_torch", "pillow"),
        extra=extra,
    )
