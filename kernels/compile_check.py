"""Compile every kernel without a GPU: its registers, shared memory, spills and tensor-core instructions.

    python -m iosr_fast.kernels.compile_check --json table.json

compiles with the default launch configurations and prints a table. Needs Triton and no GPU.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import typer

from iosr_fast.exceptions import IosrFastError
from iosr_fast.kernels.launch import PRECISIONS, Config, Load, config_for, dense_config
from iosr_fast.utils.machine import package_version
from iosr_fast.utils.require import require

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TMA_ARCHITECTURES = (90, 100)  # of them; the others take pointers
WIDTH = 512
SHOTS = 16  # per class

_POINTERS = {
    "logits": "*fp32",
    "out": "*fp32",
    "partial": "*fp32",
    "plain": "*fp32",
    "text": "*fp16",
    "feature": "*fp32",
    "linear": "*fp16",
    "bias": "*fp32",
    "weights": "*fp32",
    "key_scales": "*fp32",
    "query_scales": "*fp32",
    "scales": "*fp32",
    "digits": "*i8",
    "class_offsets": "*i32",
    "items": "*i32",
    "cut": "*i32",
}
_FLOATS = ("alpha", "scale", "text_scale", "linear_scale")
_KEYS = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*bf16", "int8": "*i8"}
_QUERY = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*bf16", "int8": "*fp16"}
_VALUES = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*fp32", "int8": "*fp16"}
# Tensor-core instructions of the PTX, newest first.
_TENSOR_CORE_PTX = (
    ("tcgen05.mma", r"\btcgen05\.mma\b"),
    ("wgmma", r"\bwgmma\.mma_async\b"),
    ("mma.sync", r"\bmma\.sync\b"),
)


def kernel_names() -> list[str]:
    """The kernels of compile_ahead: path and load ("dense/many"), or path and way of loading ("aligned/tma",
    "aligned/pointers"); few has the cache term alone, few-terms all terms; "merge", "digits"
    and "parts" have no product.

    dense has float16 values with float16 and int8 keys; dense-float has float32 ones, as plans do.
    """
    loads = [f"{name}/{load}" for name in ("affine", "dense", "dense-float") for load in ("few", "many")]
    ways = [f"{name}/{way}" for name in ("aligned", "ragged") for way in ("tma", "pointers")]
    return ["few", "few-terms", *ways, *loads, "merge", "digits", "parts"]


def compile_ahead(
    arch: int, kernels: Sequence[str] | None = None, precisions: Sequence[str] = PRECISIONS
) -> list[dict[str, Any]]:
    """Compile kernels for compute capability arch / 10 and report each one's resources, with D = 512.

    Returns rows of

    kernel, precision, arch, triton (its version)
    registers                per thread
    spills                   bytes of local memory and stack per thread
    shared_bytes             per block
    tensor_core_instruction  "mma.sync HMMA.16816.F32": of the PTX and of the machine code; "" for none

    Kernels with descriptors have rows for TMA_ARCHITECTURES only. affine is for float32 and float16 queries,
    dense-float for float16 and int8 keys; merge, digits and parts are float32 only. Raises ImportError without Triton,
    ValueError for an unknown kernel, precision or architecture, RuntimeError under TRITON_INTERPRET, which compiles
    nothing.
    """
    require("triton", "gpu")
    from triton import knobs

    if knobs.runtime.interpret:
        raise RuntimeError("expected TRITON_INTERPRET unset to compile, got it set; the interpreter compiles nothing")
    chosen = kernel_names() if kernels is None else list(kernels)
    for what, names, allowed in (
        ("a kernel", chosen, kernel_names()),
        ("a precision", precisions, PRECISIONS),
        ("an architecture", [arch], ARCHITECTURES),
    ):
        for name in names:
            if name not in allowed:
                raise IosrFastError(f"expected {what} of {', '.join(map(str, allowed))}, got {name!r}")
    rows = []
    version = package_version("triton")
    for kernel in chosen:
        if kernel.endswith("/tma") and arch not in TMA_ARCHITECTURES:
            continue
        for precision in _precisions(kernel, precisions):
            row = {"kernel": kernel, "precision": precision, "arch": arch, "triton": version}
            rows.append(row | _compile(kernel, precision, arch))
    return rows


def _precisions(kernel: str, precisions: Sequence[str]) -> Sequence[str]:
    only = {"affine": ("fp32", "fp16"), "dense-float": ("fp16", "int8"), "merge": (), "digits": (), "parts": ()}
    name = kernel.partition("/")[0]
    if name in only and not only[name]:
        return ("fp32",)
    return [precision for precision in precisions if precision in only.get(name, PRECISIONS)]


@dataclass(frozen=True)
class _Specification:
    """A kernel with its constexpr arguments, the compiler's options among them, as in the launches of cache_score; its
    tile, the queries' type, the arguments that are descriptors."""

    function: Any
    constants: dict[str, Any]
    config: Config | None = None
    query: str = ""
    descriptors: tuple[str, ...] = ()


def _specification(kernel: str, precision: str) -> _Specification:
    from iosr_fast.kernels import cache_kernels

    if kernel == "merge":
        return _Specification(cache_kernels.merge_kernel, {"BLOCK_B": 128})
    if kernel in ("digits", "parts"):
        function = cache_kernels.digits_kernel if kernel == "digits" else cache_kernels.parts_kernel
        return _Specification(function, {"WIDTH": WIDTH, "BLOCK_D": WIDTH}, query="*fp32")
    name, _, way = kernel.partition("/")
    load: Load = "few" if "few" in (name, way) or name == "few-terms" else "many"
    parts = 2 if name == "affine" and precision == "fp32" and load == "many" else 1
    terms = {"PITCH": 2 * WIDTH, "QUERY_PARTS": parts}
    terms |= {"HAS_TEXT": True, "HAS_LINEAR": name != "affine", "HAS_BIAS": True}
    has = {"WIDTH": WIDTH, "HAS_WEIGHTS": True, "HAS_SCALES": precision == "int8"}
    if name == "affine":
        config = config_for("default", "affine", "fp32", load)
        return _Specification(cache_kernels.affine_kernel, {"WIDTH": WIDTH} | terms | config.meta(), config)
    if name.startswith("dense"):
        config = dense_config("default", precision, load, name == "dense-float")
        return _Specification(cache_kernels.dense_kernel, has | config.meta("block_v"), config)
    few, tma = load == "few", way == "tma"
    path = "few" if few else name
    config = config_for("default", f"{path}-tma" if tma else path, precision, load)
    constants = (
        has
        | (terms if name == "few-terms" else dict.fromkeys(terms, False) | {"PITCH": 0, "QUERY_PARTS": 1})
        | config.meta()
    )
    constants.pop("SWAP")
    constants |= {"SHOTS": SHOTS if name == "aligned" else 0, "SPLIT": name != "aligned", "FEW": few, "TMA": tma}
    constants["BLOCK_C"] = config.block_n // SHOTS if name == "aligned" else 16
    descriptors = ("query", "keys") if tma else ()
    query = "*i8" if precision == "int8" else "*fp32" if few else _QUERY[precision]
    return _Specification(cache_kernels.cache_kernel, constants, config, query, descriptors)


def _compile(kernel: str, precision: str, arch: int) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    made = _specification(kernel, precision)
    constants = dict(made.constants)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    values = "*fp32" if kernel.startswith("dense-float") else _VALUES[precision]
    rows = "*fp16" if made.constants.get("QUERY_PARTS") == 2 or precision == "fp16" else "*fp32"
    parts = {"parts": "*fp16"} | dict.fromkeys(("plain", "feature"), rows)
    special = parts | {"query": made.query or _QUERY[precision], "keys": _KEYS[precision], "values": values}
    signature, attributes = {}, {}
    for position, name in enumerate(made.function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in _FLOATS:
            signature[name] = "fp32"
        elif name in made.descriptors:
            assert made.config is not None
            block = made.config.block_b if name == "query" else made.config.block_n
            signature[name] = f"tensordesc<{special[name][1:]}[{block}, {made.config.block_d}]>"
        else:
            signature[name] = (_POINTERS | special).get(name, "i32")
            # As in launches: torch aligns memory to at least 16 bytes, and C = 1000 or V = 1000 isn't divisible.
            if signature[name].startswith("*"):
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(made.function, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return inspect_cubin(compiled.asm["cubin"], compiled.asm["ptx"]) | {"shared_bytes": compiled.metadata.shared}


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


def compile_many(
    jobs: Sequence[tuple[int, Sequence[str], Sequence[str]]], workers: int | None = None
) -> Iterator[dict[str, Any]]:
    """compile_ahead() of each (arch, kernels, precisions), in a process per core; rows in order."""
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(compile_ahead, *job) for job in jobs]
        for future in futures:
            yield from future.result()


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown."""
    names = ("kernel", "precision", "arch", "registers", "spills", "shared_bytes", "tensor_core_instruction")
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
    """Compile every kernel for each architecture and print registers, spills, shared memory and tensor-core use."""
    rows = list(compile_many([(one, [kernel], precision) for one in arch for kernel in kernel_names()]))
    print(format_rows(rows))
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
