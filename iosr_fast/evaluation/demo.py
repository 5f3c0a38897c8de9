"""The demo's held-out concepts as sources: test and validation, with all styles on both sides or a shift of styles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.clip.demo.pictures import POOL, Pictures, held_out
from iosr_fast.clip.load import LoadedClip
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.evaluation.accuracy import Result, evaluate
from iosr_fast.evaluation.tasks import SUPPORT_STYLES, Encoded, Source, Task, split_styles
from iosr_fast.exceptions import IosrFastError

BATCH = 64
SHOTS = (1, 2, 4)
# Styles by one designer: a query in one of them is hardly shifted if the other is in the support.
SIBLINGS = (("noto", "noto-v1"), ("fluent", "fluent-flat"))
Encode = Callable[[np.ndarray], Embeddings]


def encode(run: Encode, clip: LoadedClip, pictures: Pictures, text: np.ndarray | None = None) -> Encoded:
    """Every picture, by `run` in batches, and the concepts' names (unless `text` is given)."""
    from iosr_fast.clip.prompts import embed_classes
    from iosr_fast.export.projections import clip_projections

    parts = [run(rows) for rows in np.array_split(pictures.images, -(-len(pictures.images) // BATCH))]
    text = embed_classes(clip, pictures.names) if text is None else text
    embeddings, projections = Embeddings.concatenate(parts), clip_projections(clip)
    return Encoded(embeddings, pictures.concepts, text, clip.logit_scale, pictures.styles, projections)


def torch_encoder(clip: LoadedClip, adapter: Any) -> Encode:
    """The dual encoder in PyTorch, without an export."""
    import torch

    from iosr_fast.clip.fuse import build_dual_encoder

    encoder = build_dual_encoder(clip, adapter).eval()

    @torch.inference_mode()
    def run(pixels: np.ndarray) -> Embeddings:
        return Embeddings(*(output.numpy() for output in encoder(torch.from_numpy(pixels.copy()))))

    return run


def encode_test(adapter: str | Path = "auto") -> tuple[Encoded, tuple[str, ...]]:
    """The test concepts with the shipped adapter (or a file's), and the styles' names."""
    from iosr_fast.clip.load import load_clip
    from iosr_fast.export.pretrained import choose_adapter

    clip = load_clip("demo")
    pictures, _ = held_out()
    return encode(torch_encoder(clip, choose_adapter(clip, adapter)), clip, pictures), tuple(pictures.style_names)


def in_domain(encoded: Encoded, shots: Sequence[int], seeds: Sequence[int]) -> Source:
    """Support and queries from all styles, never the same picture."""
    return Source("demo", tuple(shots), tuple(seeds), encoded.task, encoded.embeddings, encoded.labels)


def evaluate_few_shot(
    encoded: Encoded, method: str, reducer: str, shots: Sequence[int], seeds: Sequence[int]
) -> dict[int, Result]:
    """A Result for each number of shots, parameters chosen by leave-one-out on each support set."""
    results = evaluate(in_domain(encoded, shots, seeds), [(method, reducer)], "loo")
    return {result.shots: result for result in results}


def shifted(
    encoded: Encoded, styles: Sequence[str], shots: Sequence[int], seeds: Sequence[int]
) -> tuple[Source, Source]:
    """The same concepts in-domain, and with support from SUPPORT_STYLES of the styles and queries from the others.

    Each seed has its own split of the styles and, at every number of shots, the concepts that have enough pictures.
    """
    most = max(shots)
    siblings = [[styles.index(name) for name in group if name in styles] for group in SIBLINGS]
    splits = {
        seed: split_styles(encoded, most, seed, siblings=[group for group in siblings if group]) for seed in seeds
    }
    subsets = {seed: encoded.only(encoded.enough(most, split)) for seed, split in splits.items()}

    def inside(k: int, seed: int) -> Task:
        return subsets[seed].task(k, seed)

    def across(k: int, seed: int) -> Task:
        return subsets[seed].shifted_task(k, splits[seed], seed)

    notes = []
    for seed in seeds:
        support, queries = (
            ", ".join(name for name, one in zip(styles, splits[seed], strict=True) if bool(one) is side)
            for side in (True, False)
        )
        notes.append(
            f"seed {seed}: support from {support}; queries from {queries}: {len(subsets[seed].text)} of "
            f"{len(encoded.text)} concepts have the pictures, {len(across(most, seed).queries)} queries "
            f"(in-domain {len(inside(most, seed).queries)})"
        )
    first = Source("demo, in-domain", tuple(shots), tuple(seeds), inside, encoded.embeddings, encoded.labels)
    return first, replace(first, name="demo, shifted", draw=across, notes=tuple(notes))


def check_shots(shots: Sequence[int]) -> None:
    most = min(POOL, SUPPORT_STYLES)
    if not shots or min(shots) < 1 or max(shots) > most:
        raise IosrFastError(f"expected --shots from 1 to {most} on the demo's pictures, got {list(shots)}")
