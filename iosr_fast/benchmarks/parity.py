"""How far results on a GPU are from the truth: the encoder in each precision, and the scoring kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import torch

from iosr_fast.benchmarks import encoder_gpu, score
from iosr_fast.benchmarks.ceilings import exact_products
from iosr_fast.benchmarks.devices import Device
from iosr_fast.clip.dual_config import Precision
from iosr_fast.scoring import dispatch

MODELS = ("demo", "ViT-B-16")
# Ordinary sizes first: every width is a compilation of Triton's, and time may run out.
SHAPES = ("q64-k1600-d512-c100", "q256-k16000-d512-c1000", "q3-k50001-d768-c7", "q252-k507-d123-c31", "q7-k123-d33-c5")
TINY = ("q3-k40-d16-c5",)
KERNELS = ("triton",)


def run(
    device: str = "cuda",
    save: Callable[[dict[str, Any]], None] = lambda result: None,
    shapes: Sequence[str] = (),
    precision: str | None = None,
) -> dict[str, Any]:
    """{"facts", "tables"}: a line an encoder and precision, and one a scoring implementation, shape and precision.

    `shapes` are scored in place of SHAPES and without the encoders, for a run under compute-sanitizer or ncu; with a
    `precision` of the keys, by Triton alone. `save` gets the result so far after each line, as compiling may outlast
    the time limit. A wrong line is printed and begins with "WRONG: ".
    """
    target = Device(device)
    implementations = {entry.name: entry.unavailable_reason() for entry in dispatch.REGISTRY}
    tables: dict[str, list[dict[str, Any]]] = {"scoring": [], "encoder": []}
    result: dict[str, Any] = {"facts": {"implementations": implementations}, "tables": tables}
    with exact_products():
        tested = {"encoder": iter(()) if shapes else encoders(target), "scoring": scoring(target, shapes, precision)}
        for name, lines in tested.items():
            for line in lines:
                tables[name].append(line)
                if not line["right"]:
                    print(f"WRONG: {' '.join(f'{key} {value}' for key, value in line.items() if key != 'right')}")
                save(result)
    return result


def encoders(device: Device) -> Iterator[dict[str, Any]]:
    """Against two literal passes in float32 on the CPU."""
    for model in MODELS if device.name == "cuda" else MODELS[:1]:
        for precision in get_args(Precision):
            loaded = encoder_gpu.load(model, device, precision)
            for name, module in loaded.modules.items():
                with torch.inference_mode():
                    errors = loaded.errors(module(loaded.batch(encoder_gpu.CHECKED, device)))
                line = {"model": model, "impl": name, "precision": precision}
                yield {**line, **errors, "right": encoder_gpu.right(errors, precision)}


def scoring(device: Device, shapes: Sequence[str], precision: str | None) -> Iterator[dict[str, Any]]:
    """Against the float64 reference."""
    for text in shapes or (SHAPES if device.name == "cuda" else TINY):
        plan, embeddings = score.Case.parse(text).build()
        for name, candidate in score.ours(plan, embeddings, device).items():
            if precision is not None and (candidate.precision != precision or not name.startswith(KERNELS)):
                continue
            error = score.error_of(candidate, embeddings)
            line = {"case": text, "impl": name, "precision": candidate.precision, "error": error}
            yield {**line, "right": error <= score.GPU_TOLERANCE}
