"""What the roofline of a GPU allows the benchmarks' cases, from shapes alone, without a GPU.

python -m benchmarks.roofline --gpu a100

A row has the work of one form of a case and the microseconds that each part takes at the card's rates: FLOP on tensor
cores (in float16's: a float32 product is three in TF32 at half the rate) and on CUDA cores, exponentials, bytes through
HBM and through the L2 cache. The bound is the longest part. It is no prediction: at these rates no implementation in
this form is faster. Launches, shared memory, and how parts overlap are not counted.

Scoring is the cache term, texts and linear terms have rows of their own. It follows the tiles of kernels.affinity_sums:
each block of queries reads all keys through L2, and each tile of keys all queries. An encoder is a sequence of kernels,
so its bound is a sum: each takes the longest of its product, its exponentials and its operands through HBM, once. A
batch whose activations stay in the L2 cache can be faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from torch.overrides import TorchFunctionMode

from benchmarks.score import BATCH, BY_CLASS, DEFAULT_CASES, KEY_BYTES, MANY_KEYS, Case
from benchmarks.show import table
from iosr_fast.backbones.dual_blocks import Norm
from iosr_fast.backbones.dual_config import DualEncoderConfig
from iosr_fast.backbones.dual_encoder import DualEncoder
from iosr_fast.cli.command import run
from iosr_fast.kernels.affinity_sums import BLOCK, PARTIAL_BYTES, tile_of
from iosr_fast.scoring.dispatch import FEW_PRODUCTS, FEW_QUERIES, READS_ALONE

TF32X3 = 6  # float32 products by tensor cores: three in TF32, at half of float16's rate
PRODUCT_TILE = 128, 256  # rows and columns of a tile of cuBLAS's products: its largest, an estimate
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}
BLOCKS, ADAPTED = 12, 8  # of ViT-B/16, and the first with an adapter
PICTURES = 128
NAMES = {"tensor": "tensor cores", "cuda": "CUDA cores", "exponentials": "exponentials", "hbm": "HBM", "l2": "L2"}
EXPONENTIALS = ("sigmoid", "silu", "gelu", "softmax")  # functions with one for each element


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

    def seconds(self, rates: Work) -> dict[str, float]:
        """Of each part."""
        return {each.name: getattr(self, each.name) / getattr(rates, each.name) for each in fields(Work)}

    def bound(self, rates: Work) -> tuple[float, str]:
        """Seconds, and what takes them."""
        return max((seconds, name) for name, seconds in self.seconds(rates).items())


@dataclass(frozen=True)
class Card:
    """Rates, and 10 times the compute capability, which chooses the kernels' tiles."""

    rates: Work
    capability: int


def rates(processors: int, clock: float, tensor: float, hbm: float, l2: float) -> Work:
    """A multiprocessor has 128 float32 multiply-adds and 16 exponentials a cycle."""
    return Work(tensor, processors * clock * 256, processors * clock * 16, hbm, l2)


# Clocks are the highest, of the makers' 67 and 19.5 float32 TFLOP/s. Tensor cores of the H100: 798 that large products
# reach, of nominal 989; its HBM: an estimate of what copies reach, of nominal 3.35. The A100's are nominal. L2:
# estimates. A GPU's ceiling rows (benchmarks.ceilings) replace them when there are some.
CARDS = {
    "h100": Card(rates(132, 1.98e9, 798e12, 3.0e12, 5.5e12), 90),
    "a100": Card(rates(108, 1.41e9, 312e12, 2.0e12, 4.0e12), 80),
}


def by_triton(case: Case, precision: str, capability: int) -> Work:
    """kernels.affinity_sums: batches, in steps of so many queries; each reads the keys again."""
    step = BLOCK if case.values else max(1, PARTIAL_BYTES // (4 * case.classes))
    sizes = [min(step, case.queries - first) for first in range(0, case.queries, step)]
    steps = [_step(replace(case, queries=size), precision, capability) for size in sizes]
    return sum(steps, Work())


def _step(case: Case, precision: str, capability: int) -> Work:
    queries, keys, width, classes = case.queries, case.keys, case.width, case.classes
    tile = tile_of(queries, keys, 0 if case.values else classes, DTYPES[precision], capability)
    # A tile has keys of one block of classes; those of Case.build begin at these keys.
    begins = np.arange(0, classes, tile.block_c) if tile.block_c else np.zeros(1, int)
    lengths = np.diff(np.append(-(-begins * keys // classes), keys))
    blocks, tiles = math.ceil(queries / tile.block_b), int((-(-lengths // tile.block_n)).sum())
    pairs = blocks * tile.block_b * tiles * tile.block_n  # with those beyond the last query and key
    query_bytes, factor, parts = (4, TF32X3, 3) if precision == "fp32" else (2, 1, 1)
    read = blocks * keys * KEY_BYTES[precision] * width + tiles * queries * query_bytes * width
    made = Work(2 * pairs * width * factor, 0, pairs, _memory(case, precision), read)
    if not case.values:  # and members of a tile's classes; sums are cleared, written and added to logits
        return made + Work(2 * pairs * tile.block_c * parts, l2=5 * 4 * queries * classes)
    product = 2 * queries * keys * classes
    rows, columns = (math.ceil(size / by) for size, by in zip((queries, classes), PRODUCT_TILE, strict=True))
    through = query_bytes * keys * (queries * (1 + columns) + rows * classes) + 4 * 4 * queries * classes
    return made + (Work(cuda=product, l2=through) if precision == "fp32" else Work(tensor=product, l2=through))


def by_cuda(case: Case, precision: str, capability: int) -> Work:
    """csrc/cuda: a few queries, whose products are multiply-adds of float32; keys and values are read once."""
    once = _memory(case, precision)
    products = case.queries * case.keys * (case.width + case.classes * case.values)
    return Work(0, 2 * products, case.queries * case.keys, once, once)


def _memory(case: Case, precision: str) -> float:
    """Bytes of keys, values and queries, and of logits, which are read and written."""
    return 1e9 * case.gigabytes(precision) + case.queries * (4 * case.width + 2 * 4 * case.classes)


def terms(case: Case, split: bool) -> Work:
    """Texts and linear terms: in float32, or as three float16 products (half_products.add_split_product)."""
    wide = case.width * (3 if case.linear else 1)
    flop, read = 2 * case.queries * case.classes * wide, 4 * wide * (case.queries + case.classes)
    return Work(tensor=3 * flop, hbm=1.5 * read) if split else Work(cuda=flop, hbm=read)


@dataclass(frozen=True)
class Kernel:
    """A call that computes: FLOP of its product, exponentials, bytes of operands and result, and the result's width."""

    name: str
    flop: float
    exponentials: float
    moved: float
    width: int


class Kernels(TorchFunctionMode):
    """Notes each call that computes."""

    def __init__(self) -> None:
        self.calls: list[Kernel] = []

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        flat = [one for arg in args for one in (arg if isinstance(arg, (list, tuple)) else (arg,))]
        tensors = [one for one in flat if isinstance(one, torch.Tensor)]
        name = getattr(function, "__name__", "")
        if isinstance(result, torch.Tensor) and tensors and not name.startswith("__get"):
            in_place = name.endswith("_") and not name.endswith("__")
            made = result is not tensors[0] and not result._is_view()
            flop, exponentials = _computed(name, tensors, result)
            if flop or in_place or made:  # a product of more axes than two is a view of its result
                moved = float(sum(one.numel() * one.element_size() for one in (*tensors, result)))
                self.calls.append(Kernel(name, flop, exponentials, moved, result.shape[-1]))
        return result


def _computed(name: str, tensors: list[torch.Tensor], result: torch.Tensor) -> tuple[float, float]:
    """FLOP and exponentials."""
    if name == "scaled_dot_product_attention":
        keys, width = tensors[1].shape[-2:]
        return 4.0 * result.numel() * keys, result.numel() / width * keys
    flop = 2.0 * result.numel() * tensors[0].shape[-1] if name in ("linear", "matmul", "__matmul__") else 0.0
    return flop, float(result.numel() * (name in EXPONENTIALS))


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


def with_half_norms(encoder: DualEncoder) -> DualEncoder:
    """A LayerNorm is one kernel, without conversions."""
    for part in encoder.modules():
        if isinstance(part, Norm) and part is not encoder.ln_pre:
            part.half()
    return encoder


Row = tuple[str, str, Work, float, str]  # case, form, work, seconds, what takes them


def encoder_rows(card: Card) -> Iterator[Row]:
    for form, encoder in (
        ("fp32, a kernel a call", vit_b16("fp32")),
        ("fp16, a kernel a call", vit_b16("fp16")),
        ("fp16, a LayerNorm is one kernel", with_half_norms(vit_b16("fp16"))),
        ("fp16, joined for a GPU", vit_b16("fp16").for_gpu()),
    ):
        calls, shapes = kernels_of(encoder, PICTURES).calls, encoder.shapes
        activations = [one for one in calls if not one.flop and one.width == shapes.mlp_width]
        norms = [one for one in calls if one.width == shapes.width and one.name in ("layer_norm", "float", "to")]
        yield _sum(form, calls, card)
        yield _sum(f"{form}: LayerNorms, conversions", norms, card)
        yield _sum(f"{form}: activations", activations, card)
    inside: list[Kernel] = []
    for one in calls:  # the product before writes as much, and takes the exponentials, which it can overlap
        if one in activations:
            inside[-1] = replace(inside[-1], exponentials=one.exponentials)
        else:
            inside.append(one)
    yield _sum("fp16, joined, activations in products", inside, card)


def _sum(form: str, calls: list[Kernel], card: Card) -> Row:
    work, parts = Work(), dict.fromkeys(NAMES, 0.0)
    for call in calls:
        product = Work(cuda=call.flop) if form.startswith("fp32") else Work(tensor=call.flop)
        one = product + Work(exponentials=call.exponentials, hbm=call.moved)
        work, (seconds, name) = work + one, one.bound(card.rates)
        parts[name] += seconds
    total = sum(parts.values())
    seconds, name = max((seconds, name) for name, seconds in parts.items())
    label = f"ViT-B-16, both embeddings, b{PICTURES}, s={ADAPTED}"
    return label, form, work, total, f"sum, {seconds / total:.0%} {NAMES[name]}"


def score_rows(card: Card) -> Iterator[Row]:
    wide, many = Case.parse(f"{BATCH}-linear"), Case.parse(MANY_KEYS)
    for split in (False, True):
        yield _row(f"terms of {BATCH}-linear", "fp16 parts" if split else "fp32", terms(wide, split), card)
    few = [replace(many, queries=queries) for queries in (1, READS_ALONE, FEW_QUERIES)]
    few.append(replace(many, queries=FEW_QUERIES, keys=FEW_PRODUCTS // FEW_QUERIES))
    named = {f"q{one.queries}-k{one.keys}-d{one.width}-c{one.classes}": one for one in few}
    listed = {text: Case.parse(text) for text in (BATCH, BY_CLASS, *DEFAULT_CASES["cuda"])}
    for text, case in (named | listed).items():
        forms = {"Triton": by_triton} if case.queries > FEW_QUERIES else {"CUDA": by_cuda, "Triton": by_triton}
        for name, form in forms.items() if not case.linear else ():
            for precision in DTYPES:
                yield _row(text, f"{name} {precision}", form(case, precision, card.capability), card)


def _row(case: str, form: str, work: Work, card: Card) -> Row:
    seconds, name = work.bound(card.rates)
    return case, form, work, seconds, NAMES[name]


def rows(card: Card) -> list[list[str]]:
    made = []
    for case, form, work, seconds, by in (*encoder_rows(card), *score_rows(card)):
        times = work.seconds(card.rates).items()
        parts = [f"{1e-9 * getattr(work, name):,.3f} ({1e6 * part:,.1f})" for name, part in times]
        made.append([case, form, *parts, f"{1e6 * seconds:,.1f}", by])
    return made


def main(gpu: Annotated[Literal["h100", "a100"], typer.Option(help="The card.")] = "h100") -> None:
    """Print the table."""
    units = ("GFLOP", "GFLOP", "billion", "GB", "GB")
    parts = [f"{name}, {unit} (us)" for name, unit in zip(NAMES.values(), units, strict=True)]
    typer.echo("\n".join(table(("case", "form", *parts, "bound, us", "by"), rows(CARDS[gpu]))))


if __name__ == "__main__":
    run(main)
