"""Attention of one block by each of PyTorch's kernels: which belongs first in clip.inference_form.ATTENTION."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from iosr_fast.benchmarks import harness
from iosr_fast.benchmarks.devices import Device
from iosr_fast.clip.dual_config import DualEncoderConfig
from iosr_fast.clip.inference_form import ATTENTION

TOLERANCE = 0.01  # of the largest value: float16 rounds to 0.0005


def rows(case: str, config: DualEncoderConfig, batch: int, repeats: int, target: Device) -> list[dict[str, Any]]:
    """One row a kernel, verified and interleaved: cudnn, flash, efficient, math. Kernels that don't take the inputs are
    left out, which standard output says."""
    streams = 1 if config.first_adapted_block is None else 2
    heads = _heads(streams * batch, config, target)
    exact = _attend(SDPBackend.MATH, *(part[:1].double() for part in heads))
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    extra = {}
    for backend in ATTENTION:
        name = backend.name.partition("_")[0].lower()
        try:
            call, launch = target.record(torch.inference_mode()(partial(_attend, backend, *heads)))
            error = float((call()[:1] - exact).abs().max() / exact.abs().max())
        except RuntimeError as reason:
            print(f"left out: {case}: attention by {name}: {str(reason).splitlines()[0]}")
            continue
        if not error <= TOLERANCE:
            print(f"WRONG: {case}: attention by {name} is off by {error:.2g} of the largest value; not timed")
            continue
        calls[name], extra[name] = call, {"launch": launch, "max_relative_error": error}
    flop = 4 * streams * batch * config.tokens**2 * config.width
    return harness.rows(
        "encoder",
        f"{case}-attention",
        target.measure(calls, repeats),
        rivals=("math",),
        threads=1,
        precision="fp16",
        work=flop / 1e9,
        packages=("numpy", "torch"),
        device=target.description,
        extra=extra,
    )


def _heads(pictures: int, config: DualEncoderConfig, target: Device) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values as the encoder has them: float16 views of one product's output."""
    generator = torch.Generator(target.torch).manual_seed(0)
    shape = (pictures, config.tokens, 3 * config.heads, config.head_width)
    values = torch.randn(shape, generator=generator, device=target.torch, dtype=torch.float16)
    values[:, :, : config.heads] *= config.head_width**-0.5  # of the queries
    return values.transpose(1, 2).chunk(3, dim=1)


def _attend(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)
