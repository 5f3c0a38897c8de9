"""Compile the kernels without a GPU: its registers, shared memory, spills and tensor-core instructions.

    python -m iosr_fast.kernels.compile_check --json table.json

compiles them as they are launched and prints a table. Needs Triton and no GPU.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import typer

from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.machine import package_version
from iosr_fast.utils.require import require

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
WIDTH = 512
# Queries, keys and classes of a launch; 0 classes: affinities of keys with values.
KERNELS = {
    "classes/few": (16, 1600, 100),
    "classes/some": (64, 8192, 1000),
    "classes/many": (1024, 16_000, 1000),
    "classes/one key each": (1024, 8192, 8192),
    "affinities/few": (16, 1600, 0),
    "affinities/some": (64, 8192, 0),
    "affinities/many": (1024, 8192, 0),
}
# Tensor-core instructions of the PTX, newest first.
_TENSOR_CORE_PTX = (
    ("tcgen05.mma", r"\btcgen05\.mma\b"),
    ("wgmma", r"\bwgmma\.mma_async\b"),
    ("mma.sync", r"\bmma\.sync\b"),
)


def compile_ahead(
    arch: int, kernels: Sequence[str] = tuple(KERNELS), precisions: Sequence[str] = PRECISIONS
) -> list[dict[str, Any]]:
    """Compile each of KERNELS for compute capability arch / 10, with weights and D = 512, and for each precision of the
    keys.

    Returns rows of

    kernel, precision, arch, triton (its version)
    tile                     queries x keys x channels x columns
    registers                per thread
    spills                   bytes of local memory and stack per thread
    shared_bytes             per block
    tensor_core_instruction  "mma.sync HMMA.16816.F32": of the PTX and of the machine code; "" for none

    Raises MissingPackageError without Triton, IosrFastError for an unknown kernel, precision or architecture,
    RuntimeError under TRITON_INTERPRET, which compiles nothing.
    """
    require("triton", "gpu")
    from triton import knobs

    if knobs.runtime.interpret:
        raise RuntimeError("expected TRITON_INTERPRET unset to compile, got it set; the interpreter compiles nothing")
    for what, names, allowed in (
        ("a kernel", kernels, tuple(KERNELS)),
        ("a precision", precisions, PRECISIONS),
        ("an architecture", [arch], ARCHITECTURES),
    ):
        for name in names:
            if name not in allowed:
                raise IosrFastError(f"expected {what} of {', '.join(map(str, allowed))}, got {name!r}")
    facts = {"arch": arch, "triton": package_version("triton")}
    return [
        {"kernel": kernel, "precision": precision} | facts | _compile(kernel, precision, arch)
        for kernel in kernels
        for precision in precisions
    ]


def _compile(kernel: str, precision: str, arch: int) -> dict[str, Any]:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from iosr_fast.kernels.affinity_sums import affinities_kernel, class_sums_kernel, product_precision, tile_of

    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
    batch, n_keys, n_classes = KERNELS[kernel]
    function = class_sums_kernel if n_classes else affinities_kernel
    tile = tile_of(batch, n_keys, n_classes, dtypes[precision], arch)
    options = tile.options()
    constants: dict[str, Any] = {"WIDTH": WIDTH, "PRECISION": product_precision(arch)}
    constants |= {name: options.pop(name) for name in list(options) if name.isupper()}
    pointers = {
        "queries": "fp16" if precision == "int8" else precision,
        "keys": "i8" if precision == "int8" else precision,
        "key_scales": "fp32" if precision == "int8" else "",
        "weights": "fp32",
        "class_offsets": "i32",
        "items": "i32",
        "sums": "fp32",
        "affinities": "fp32" if precision in ("fp32", "bf16") else "fp16",  # as with_key_precision stores values
    }
    constants |= {name: None for name, dtype in pointers.items() if not dtype}
    signature, attributes = {}, {}
    for position, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = f"*{pointers[name]}"
            attributes[(position,)] = [["tt.divisibility", 16]]  # as torch aligns memory
        else:
            signature[name] = "fp32" if name in ("scale", "shift", "alpha") else "i32"
    source = ASTSource(function, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    sizes = f"{tile.block_b}x{tile.block_n}x{tile.block_d}x{tile.block_c}"
    resources = inspect_cubin(compiled.asm["cubin"], compiled.asm["ptx"])
    return {"tile": sizes, **resources, "shared_bytes": compiled.metadata.shared}


def inspect_cubin(cubin: bytes, ptx: str) -> dict[str, Any]:
    """Registers and spills from cuobjdump, tensor-core instructions from the PTX and the disassembly.

    A kernel counts as having such an instruction only if both have it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "--dump-resource-usage", str(path))
        code = _tool("nvdisasm", "-c", str(path))
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    missing = {"REG", "STACK", "LOCAL"} - set(resources)
    if missing:
        raise RuntimeError(f"expected REG, STACK and LOCAL in cuobjdump's output, got {usage!r}")
    # LDL and STL move registers to local memory and back: spills, even if no stack is reported.
    local_moves = len(re.findall(r"\b(?:LDL|STL)\b", code))
    instruction = next((name for name, pattern in _TENSOR_CORE_PTX if re.search(pattern, ptx)), "")
    machine = sorted(set(re.findall(r"\b((?:[HIQ]G?MMA|UTC[A-Z]*MMA|OMMA)(?:\.[\w.]+)?)", code)))
    return {
        "registers": resources["REG"],
        "spills": resources["STACK"] + resources["LOCAL"] + local_moves,
        "tensor_core_instruction": f"{instruction} {', '.join(machine)}" if instruction and machine else "",
    }


@functools.cache
def _tools() -> Path:
    import triton.backends.nvidia

    return Path(triton.backends.nvidia.__path__[0]) / "bin"


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_tools() / name, *arguments], capture_output=True, text=True, check=True).stdout


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown."""
    names = ("kernel", "precision", "arch", "tile", "registers", "spills", "shared_bytes", "tensor_core_instruction")
    cells = [names, *(tuple(str(row[name]) for name in names) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(names))]
    cells.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    )


def main(
    json_file: Path | None = typer.Option(None, "--json", help="Write the rows to this file too."),
    arch: list[int] = typer.Option(list(ARCHITECTURES), help="Compute capability times 10; repeat for several."),
    precision: list[str] = typer.Option(list(PRECISIONS), help="Key precision; repeat for several."),
) -> None:
    """Compile the kernel for each architecture and print registers, spills, shared memory and tensor-core use."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(compile_ahead, one, [kernel], precision) for one in arch for kernel in KERNELS]
        rows = [row for job in jobs for row in job.result()]
    print(format_rows(rows))
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
