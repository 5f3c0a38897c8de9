"""What this GPU does at best, measured here and now: products in each precision, and copies in its memory."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator

import torch

from tools.bench import harness
from tools.gpu.device import extra_of, name_of, times_ms
from tools.gpu.report import Report, Setting

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
SIZES = {"cuda": (4096, 8192), "cpu": (64,)}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**20}


@contextlib.contextmanager
def products_in(kind: str) -> Iterator[None]:
    """float32 products on the tensor cores ("tf32"), or not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.inference_mode()
def gemm_times(kind: str, device: str, size: int, repeats: int = 10) -> list[float]:
    """Milliseconds of products of two random (size, size) matrices: random, as zeros draw less power."""
    generator = torch.Generator(device=device).manual_seed(0)
    shape = (size, size)
    left, right = (torch.randn(shape, device=device, generator=generator).to(DTYPES[kind]) for _ in range(2))
    out = torch.empty(shape, dtype=DTYPES[kind], device=device)
    with products_in(kind):
        return times_ms(lambda: torch.mm(left, right, out=out), repeats, device)


def gemm_flops(kind: str, device: str, repeats: int = 10) -> float:
    """FLOP/s of the best product, at the size that this GPU likes best."""
    return max(2.0 * size**3 / (min(gemm_times(kind, device, size, repeats)) * 1e-3) for size in SIZES[device])


@torch.inference_mode()
def copy_times(device: str, n_bytes: int, repeats: int = 10) -> list[float]:
    source = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return times_ms(lambda: target.copy_(source), repeats, device)


def run(report: Report, setting: Setting) -> None:
    device = setting.device
    kinds = [kind for kind in DTYPES if device == "cpu" or kind not in ("bf16", "tf32") or at_least_ampere()]
    for kind in set(DTYPES) - set(kinds):
        report.skip(f"products in {kind}: this GPU has none")
    for kind in kinds:
        for size in SIZES[device]:
            times, flop = gemm_times(kind, device, size), 2.0 * size**3
            report.add_rows(
                harness.rows(
                    "gpu-ceiling",
                    f"gemm-{size}",
                    {f"gemm-{kind}": times},
                    rivals=(),
                    threads=1,
                    precision=kind,
                    flops=flop,
                    packages=("torch",),
                    device=name_of(device),
                    extra=extra_of({f"gemm-{kind}": 0}, best_tflops=round(flop / (min(times) * 1e-3) / 1e12, 2)),
                )
            )
    n_bytes = COPY_BYTES[device]
    times = copy_times(device, n_bytes)
    report.add_rows(
        harness.rows(
            "gpu-ceiling",
            f"copy-{n_bytes >> 20}-mib",
            {"copy": times},
            rivals=(),
            threads=1,
            precision="bytes",
            rates={"copy": 2 * n_bytes / (statistics.median(times) * 1e-3) / 1e9},
            rate_unit="GB/s",
            packages=("torch",),
            device=name_of(device),
            extra=extra_of({"copy": 0}, best_gb_s=round(2 * n_bytes / (min(times) * 1e-3) / 1e9, 1)),
        )
    )


def at_least_ampere() -> bool:
    return torch.cuda.get_device_capability() >= (8, 0)
