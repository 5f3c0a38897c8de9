"""How far results on a GPU are from the truth: the encoder in each precision, and the scoring kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any, get_args

import torch

from iosr_fast.benchmarks import encoder_gpu, score
from iosr_fast.benchmarks.ceilings import exact_products
from iosr_fast.benchmarks.devices import Device
from iosr_fast.clip.dual_config import Precision as EncoderPrecision
from iosr_fast.clip.inference_form import attention_priority
from iosr_fast.scoring import dispatch
from iosr_fast.scoring.precision import PRECISIONS, Precision
from iosr_fast.utils.machine import usable_threads

MODELS = ("demo", "ViT-B-16")
# Ordinary sizes first, in case time runs out.
SHAPES = ("q64-k1600-d512-c100", "q256-k16000-d512-c1000", "q3-k50001-d768-c7", "q252-k507-d123-c31", "q7-k123-d33-c5")
TINY = ("q3-k40-d16-c5",)
KERNELS = ("triton", "cuda")


PARTS = ("scoring", "encoder")


def run(
    device: str = "cuda",
    save: Callable[[dict[str, Any]], None] = lambda result: None,
    shapes: Sequence[str] = (),
    precision: Precision | None = None,
    parts: Sequence[str] = PARTS,
) -> dict[str, Any]:
    """{"facts", "tables"}: a line a scoring implementation, shape and precision, and one an encoder and precision.

    `shapes` are scored by KERNELS alone in place of SHAPES and score.SMALL_CASES, in this process and without the
    encoders, for a run under compute-sanitizer or ncu; with a `precision` of the keys, by Triton alone. `save` gets the
    result so far after each line, as compiling may outlast the time limit. A wrong line is printed and begins with
    "WRONG: ".
    """
    target = Device(device)
    implementations = {entry.name: entry.unavailable_reason() for entry in dispatch.REGISTRY}
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in parts}
    result: dict[str, Any] = {"facts": {"implementations": implementations}, "tables": tables}
    with exact_products():
        for name in PARTS if not shapes else PARTS[:1]:
            if name not in parts:
                continue
            for line in scoring(target, shapes, precision) if name == "scoring" else encoders(target):
                tables[name].append(line)
                if not line["right"]:
                    print(f"WRONG: {' '.join(f'{key} {value}' for key, value in line.items() if key != 'right')}")
                save(result)
    return result


def encoders(device: Device) -> Iterator[dict[str, Any]]:
    """Against two literal passes in float32 on the CPU."""
    for model in MODELS if device.name == "cuda" else MODELS[:1]:
        for precision in get_args(EncoderPrecision):
            loaded = encoder_gpu.load(model, device, precision)
            for name, module in loaded.modules.items():
                with torch.inference_mode(), attention_priority():
                    errors = loaded.errors(module(loaded.batch(encoder_gpu.CHECKED, device)))
                line = {"model": model, "impl": name, "precision": precision}
                yield {**line, **errors, "right": encoder_gpu.right(errors, precision)}


def scoring(device: Device, shapes: Sequence[str], precision: Precision | None) -> Iterator[dict[str, Any]]:
    """Against the float64 reference. On a GPU, without `shapes`, each shape and precision has a process of its own:
    Triton compiles on every core, into the cache that later parts read, and a failed launch spoils no other line."""
    precisions = PRECISIONS if precision is None else (precision,)
    if device.name != "cuda":
        shapes = shapes or TINY
    if shapes:
        kernels = KERNELS[:1] if precision is not None else KERNELS if device.name == "cuda" else ()
        for text in shapes:
            yield from scoring_lines(device, text, precisions, kernels)
        return
    shapes = (*SHAPES, *score.SMALL_CASES)
    yield from scoring_in_processes(device, [(text, one) for text in shapes for one in precisions])


def scoring_in_processes(device: Device, jobs: Sequence[tuple[str, Precision]]) -> Iterator[dict[str, Any]]:
    with ProcessPoolExecutor(usable_threads(), get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = {pool.submit(_collect, device, text, one): (text, one) for text, one in jobs}
        for future in as_completed(futures):  # one that hangs costs its own lines only
            text, one = futures[future]
            try:
                yield from future.result()
            except Exception as error:  # also that a process was killed
                yield {"case": text, "impl": "", "precision": one, "error": score.describe(text, error), "right": False}


def _collect(device: Device, text: str, precision: Precision) -> list[dict[str, Any]]:
    with exact_products():
        return list(scoring_lines(device, text, [precision]))


def scoring_lines(
    device: Device, text: str, precisions: Sequence[Precision], names: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """The lines of a shape; of implementations that begin with one of `names`, or all."""
    case = score.Case.parse(text)
    plan, embeddings = case.build(case.balance)
    for name, candidate in score.ours(plan, embeddings, device, precisions).items():
        if names and not name.startswith(tuple(names)):
            continue
        line = {"case": text, "impl": name, "precision": candidate.precision}
        try:
            error = score.error_of(candidate, embeddings)
            yield {**line, "error": error, "right": error <= score.GPU_TOLERANCES[candidate.precision]}
        except Exception as error:  # of a compiler or a launch
            yield {**line, "error": score.describe(name, error), "right": False}
