"""What the roofline of a GPU allows the benchmarks' cases, from shapes alone, without a GPU.

python -m benchmarks.roofline --gpu a100

A row has the work of one form of a case: FLOP on tensor cores (in float16's: a float32 product is three in TF32 at half
the rate) and on CUDA cores, exponentials, bytes through HBM and through the L2 cache. Its bound is the longest of
their times at the card's rates: no implementation in this form is faster, and a good one is within a factor of two.

Scoring follows the tiles of kernels.affinity_sums: each block of queries reads all keys through L2, and each tile of
keys all queries. An encoder is a sequence of kernels, so its time is a sum: each takes the longer of its product and of
its operands through HBM, once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from typing import Annotated, Any, Literal

import torch
import typer
from torch.overrides import TorchFunctionMode

from benchmarks.score import BATCH, BY_CLASS, DEFAULT_CASES, KEY_BYTES, MANY_KEYS, Case
from iosr_fast.cli.command import run
from iosr_fast.clip.dual_config import DualEncoderConfig
from iosr_fast.clip.dual_encoder import DualEncoder
from iosr_fast.kernels.affinity_sums import tile_of
from iosr_fast.scoring.dispatch import FEW_QUERIES, READS_ALONE
from tools.report import table

TF32X3 = 6  # float32 products by tensor cores: three in TF32, at half of float16's rate
PRODUCT_TILE = 128, 256  # rows and columns of a tile of cuBLAS's products
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}
BLOCKS, ADAPTED = 12, 8  # of ViT-B/16, and the first with an adapter
PICTURES = 128


@dataclass(frozen=True)
class Work:
    """Of one form of a case; of a card, the same a second."""

    tensor: float = 0.0
    cuda: float = 0.0
    exponentials: float = 0.0
    hbm: float = 0.0
    l2: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def bound(self, card: Work) -> tuple[float, str]:
        """Seconds, and what takes them."""
        return max((getattr(self, each.name) / getattr(card, each.name), each.name) for each in fields(Work))


def card(processors: int, clock: float, tensor: float, hbm: float, l2: float) -> Work:
    """A multiprocessor has 128 float32 multiply-adds and 16 exponentials a cycle."""
    return Work(tensor, processors * clock * 256, processors * clock * 16, hbm, l2)


# Tensor cores and HBM of the H100 as products and copies reach them; the others as their makers say; L2 is an estimate.
CARDS = {"h100": card(132, 1.755e9, 798e12, 3.0e12, 5.5e12), "a100": card(108, 1.41e9, 312e12, 2.0e12, 4.0e12)}


def by_triton(case: Case, precision: str) -> Work:
    """kernels.affinity_sums: batches."""
    queries, keys, width, classes = case.queries, case.keys, case.width, case.classes
    tile = tile_of(queries, keys, 0 if case.values else classes, DTYPES[precision], 90)
    blocks, tiles = math.ceil(queries / tile.block_b), math.ceil(keys / tile.block_n)
    query_bytes = 4 if precision == "fp32" else 2
    factor = TF32X3 if precision == "fp32" else 1
    read = blocks * keys * KEY_BYTES[precision] * width + tiles * queries * query_bytes * width
    made = Work(2 * queries * keys * width * factor, 0, queries * keys, _memory(case, precision), read)
    if not case.values:  # members of a tile's classes, of fp32 in three parts
        return made + Work(2 * queries * keys * tile.block_c * (3 if precision == "fp32" else 1))
    product = 2 * queries * keys * classes
    rows, columns = (math.ceil(size / by) for size, by in zip((queries, classes), PRODUCT_TILE, strict=True))
    affinities = queries * keys * query_bytes * (1 + columns)
    through = affinities + rows * keys * classes * query_bytes
    return made + (Work(cuda=product, l2=through) if precision == "fp32" else Work(tensor=product, l2=through))


def by_cuda(case: Case, precision: str) -> Work:
    """csrc/cuda: a few queries, whose products are multiply-adds of float32; each key is read once."""
    once = _memory(case, precision)
    return Work(0, 2 * case.queries * case.keys * case.width, case.queries * case.keys, once, once)


def _memory(case: Case, precision: str) -> float:
    """Bytes of keys, values, queries and logits, each once."""
    rest = case.queries * (4 * case.width + 4 * case.classes)
    return 1e9 * case.gigabytes(precision) + rest


def terms(case: Case, split: bool) -> Work:
    """Texts and linear terms: in float32, or as three float16 products (half_products.add_split_product)."""
    wide = case.width * (3 if case.linear else 1)
    flop, read = 2 * case.queries * case.classes * wide, 4 * wide * (case.queries + case.classes)
    return Work(tensor=3 * flop, hbm=1.5 * read) if split else Work(cuda=flop, hbm=read)


class Kernels(TorchFunctionMode):
    """Each call that computes: its name, FLOP of its product, bytes of operands and result, and the result's width."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float, float, int]] = []

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [one for one in args if isinstance(one, torch.Tensor)]
        name = getattr(function, "__name__", "")
        if isinstance(result, torch.Tensor) and tensors and not name.startswith("__get"):
            in_place = name.endswith("_") and not name.endswith("__")
            flop = flop_of(name, tensors, result)
            made = result is not tensors[0] and not result._is_view()
            if flop or in_place or made:
                self.calls.append((name, flop, _bytes(*tensors, result), result.shape[-1]))
        return result


def flop_of(name: str, tensors: list[torch.Tensor], result: torch.Tensor) -> float:
    if name == "scaled_dot_product_attention":
        return 4.0 * result.numel() * tensors[1].shape[-2]
    return 2.0 * result.numel() * tensors[0].shape[-1] if name in ("linear", "matmul", "__matmul__") else 0.0


def _bytes(*tensors: torch.Tensor) -> float:
    return float(sum(one.numel() * one.element_size() for one in tensors))


def kernels_of(encoder: DualEncoder, pictures: int) -> Kernels:
    """Those of a run, which computes nothing."""
    size = encoder.image_size
    pixels = torch.empty(pictures, size, size, 3, dtype=torch.uint8, device="meta")
    encoder.to("meta")
    with torch.no_grad(), Kernels() as kernels:
        encoder(pixels)
    return kernels


def vit_b16(precision: Literal["fp32", "fp16"]) -> DualEncoder:
    sizes = {"image_size": 224, "patch_size": 16, "width": 768, "blocks": BLOCKS, "heads": 12, "mlp_width": 3072}
    rest = {"embedding_width": 512, "activation": "quick_gelu", "ln_pre": True, "eps": 1e-5, "precision": precision}
    with torch.device("meta"):
        return DualEncoder(DualEncoderConfig(**sizes, **rest, first_adapted_block=ADAPTED, bottleneck=64))


def encoder_rows(gpu: Work) -> Iterator[tuple[str, str, Work, float, str]]:
    case = f"ViT-B-16, both embeddings, b{PICTURES}, s={ADAPTED}"
    for form, encoder, fused in (
        ("fp32, a kernel a call", vit_b16("fp32"), False),
        ("fp16, a kernel a call", vit_b16("fp16"), False),
        ("fp16, joined for a GPU", vit_b16("fp16").for_gpu(), False),
        ("fp16, joined, activations in products", vit_b16("fp16").for_gpu(), True),
    ):
        work, seconds = Work(), 0.0
        for _, flop, moved, width in kernels_of(encoder, PICTURES).calls:
            if fused and not flop and width == encoder.shapes.mlp_width:
                continue
            one = Work(cuda=flop, hbm=moved) if "fp32" in form else Work(tensor=flop, hbm=moved)
            work, seconds = work + one, seconds + one.bound(gpu)[0]
        yield case, form, work, seconds, "sum"


def score_rows(gpu: Work) -> Iterator[tuple[str, str, Work, float, str]]:
    wide = Case.parse(f"{BATCH}-linear")
    cases: list[tuple[str, str, Work]] = [
        (f"terms of {BATCH}-linear", "fp16 parts" if split else "fp32", terms(wide, split)) for split in (False, True)
    ]
    many = Case.parse(MANY_KEYS)
    for queries in (1, READS_ALONE, FEW_QUERIES):
        few = Case(queries, many.keys, many.width, many.classes)
        for name, form in (("CUDA", by_cuda), ("Triton", by_triton)):
            label = f"q{queries}-k{few.keys}-d{few.width}-c{few.classes}"
            cases += [(label, f"{name} {precision}", form(few, precision)) for precision in DTYPES]
    for text in dict.fromkeys((BATCH, BY_CLASS, *DEFAULT_CASES["cuda"])):
        case = Case.parse(text)
        if case.queries > FEW_QUERIES and not case.linear:
            cases += [(text, f"Triton {precision}", by_triton(case, precision)) for precision in DTYPES]
    for label, form_name, work in cases:
        yield label, form_name, work, *work.bound(gpu)


def rows(gpu: Work) -> list[list[str]]:
    made = []
    for case, form, work, seconds, by in (*encoder_rows(gpu), *score_rows(gpu)):
        scaled = work.tensor / 1e9, work.cuda / 1e9, work.exponentials / 1e6, work.hbm / 1e6, work.l2 / 1e6
        made.append([case, form, *(f"{amount:,.1f}" for amount in scaled), f"{1e6 * seconds:,.1f}", by])
    return made


def main(gpu: Annotated[Literal["h100", "a100"], typer.Option(help="The card.")] = "h100") -> None:
    """Print the table."""
    head = ("case", "form", "tensor GFLOP", "CUDA GFLOP", "million exp", "HBM MB", "L2 MB", "bound, us", "by")
    typer.echo("\n".join(table(head, rows(CARDS[gpu]))))


if __name__ == "__main__":
    run(main)
