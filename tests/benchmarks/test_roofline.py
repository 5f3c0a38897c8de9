"""The roofline table: its work is that of the real modules and cases, its bound the longest part."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from benchmarks import roofline
from benchmarks.roofline import CARDS, Work, by_cuda, by_triton, encoder_rows, kernels_of, terms
from benchmarks.score import DEFAULT_CASES, Case
from iosr_fast.backbones.fuse import build_dual_encoder
from tests.backbones.small_clip import random_adapter, random_pixels, small_clip

H100 = CARDS["h100"].rates


@pytest.mark.parametrize("gpu", [False, True])
def test_an_encoders_products_are_those_that_pytorch_counts(gpu: bool) -> None:
    clip = small_clip()
    encoder = build_dual_encoder(clip, random_adapter(clip, 1))
    encoder = encoder.for_gpu() if gpu else encoder
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(torch.from_numpy(random_pixels(5, clip.image_size)))
    counted = sum(kernel.flop for kernel in kernels_of(copy.deepcopy(encoder), 5).calls)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_form_for_a_gpu_moves_fewer_bytes_and_twice_the_pictures_twice_as_many() -> None:
    def moved(encoder: torch.nn.Module, pictures: int) -> float:
        return sum(kernel.moved for kernel in kernels_of(encoder, pictures).calls if not kernel.flop)

    before, joined = (moved(form, 2) for form in (roofline.vit_b16("fp16"), roofline.vit_b16("fp16").for_gpu()))
    assert joined < 0.5 * before
    assert moved(roofline.vit_b16("fp16"), 4) == pytest.approx(2 * before, rel=0.01)


def test_an_encoder_counts_exponentials_and_joined_streams() -> None:
    """Those of attention and activations; the CLS token alone in the last block, the second stream behind the cat."""
    width, tokens, streams = 3072, 197, 9 + 2 * 2
    calls = kernels_of(roofline.vit_b16("fp16").for_gpu(), 2).calls
    of = {name: sum(kernel.exponentials for kernel in calls if kernel.name == name) for name in ("silu", "softmax")}
    # The first adapted block's MLP is shared, and the last block's is of one token of both streams.
    assert of["silu"] == 2 * width * (9 * tokens + 2 * 2 * tokens + 2)
    attention = sum(kernel.exponentials for kernel in calls if kernel.name == "scaled_dot_product_attention")
    assert attention == 2 * 12 * tokens**2 * streams and of["softmax"] == 2 * 2 * 12 * tokens
    assert [kernel.moved for kernel in calls if kernel.name == "cat"][-1] == 2 * 2 * (2 * 2 * tokens * 768)


def test_fewer_kernels_have_a_lower_bound_and_parts_are_within_the_whole() -> None:
    bounds = {form: seconds for _, form, _, seconds, _ in encoder_rows(CARDS["h100"])}
    whole = [seconds for form, seconds in bounds.items() if ":" not in form]
    assert whole == sorted(whole, reverse=True) and len(whole) == 5
    joined = {form.partition(": ")[2]: seconds for form, seconds in bounds.items() if "joined for" in form}
    assert whole[-1] == pytest.approx(joined[""] - joined["activations"]), "products are longer than their exponentials"


def test_a_few_queries_wait_for_memory_and_a_batch_does_not() -> None:
    """By the rates of an H100: what scoring.dispatch chooses by."""
    few, batch = Case(roofline.READS_ALONE, 10**6, 512, 1000), Case(roofline.FEW_QUERIES, 10**6, 512, 1000)
    seconds, by = by_cuda(few, "int8", 90).bound(H100)
    assert by == "hbm" and seconds == pytest.approx(by_cuda(few, "fp16", 90).bound(H100)[0] / 2, rel=0.01)
    assert by_cuda(batch, "int8", 90).bound(H100)[1] == "cuda"
    assert by_triton(batch, "int8", 90).bound(H100)[0] < by_cuda(batch, "int8", 90).bound(H100)[0]


def test_tiles_are_those_of_the_kernels_and_of_the_card() -> None:
    case = Case.parse("q256-k16000-d512-c1000")
    hopper, ampere = (by_triton(case, "fp16", capability) for capability in (90, 80))
    sums = 5 * 4 * 256 * 1000
    # Two blocks of 128 queries read each key; 125 tiles of 128 keys read each query, an A100's 250 of 64.
    assert hopper.l2 == 2 * 16000 * 1024 + 125 * 256 * 1024 + sums
    assert ampere.l2 == 2 * 16000 * 1024 + 250 * 256 * 1024 + sums
    uneven = by_triton(replace(case, keys=16001), "fp16", 90)
    assert uneven.exponentials == 256 * 128 * 126, "a tile ends with its block of classes"
    assert by_triton(Case(1, 64, 512, 4), "fp16", 90).exponentials == 16 * 64, "with rows that have no query"
    many = Case.parse("q4096-k160000-d768-c10000")
    assert by_triton(many, "fp16", 90).hbm > 3e9 * many.gigabytes("fp16"), "three steps of queries"


def test_values_are_products_of_their_own() -> None:
    with_values = Case(4, 8192, 512, 1000, values=True)
    assert by_cuda(with_values, "fp32", 90).cuda == 2 * 4 * 8192 * (512 + 1000)
    batch = replace(with_values, queries=256)
    assert by_triton(batch, "fp16", 90).tensor == pytest.approx(1e9 * batch.gflop, rel=0.05)  # which has texts, too
    assert by_triton(batch, "fp32", 90).cuda == 2 * 256 * 8192 * 1000


def test_a_bound_is_the_longest_part_and_work_adds_up() -> None:
    card = Work(10.0, 10.0, 10.0, 10.0, 10.0)
    assert Work(hbm=20.0, tensor=10.0).bound(card) == (2.0, "hbm")
    assert Work(tensor=1.0) + Work(tensor=2.0, l2=3.0) == Work(tensor=3.0, l2=3.0)
    wide = Case(256, 8192, 512, 1000, values=True, linear=True)
    assert terms(wide, split=True).bound(H100)[0] < terms(wide, split=False).bound(H100)[0] / 3


def test_the_table_has_a_row_for_each_case(capsys: pytest.CaptureFixture[str]) -> None:
    roofline.main("a100")
    printed = capsys.readouterr().out
    assert all(f"{text} |" in printed for text in DEFAULT_CASES["cuda"]) and "ViT-B-16" in printed
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[2:]]
    for _, _, *parts, bound, by in lines:
        longest = max(parts, key=lambda part: float(part.partition("(")[2][:-1].replace(",", "")))
        if not by.startswith("sum"):
            assert longest.endswith(f"({bound})") and by in roofline.NAMES.values()
        assert float(bound.replace(",", "")) > 0
