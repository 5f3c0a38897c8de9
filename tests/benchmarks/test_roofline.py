"""The roofline table: its work is that of the real modules and cases, its bound the longest part."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from benchmarks import roofline
from benchmarks.roofline import CARDS, Work, by_cuda, by_triton, kernels_of, terms
from benchmarks.score import DEFAULT_CASES, Case
from iosr_fast.clip.fuse import build_dual_encoder
from tests.clip.small_clip import random_adapter, random_pixels, small_clip

H100 = CARDS["h100"]


@pytest.mark.parametrize("gpu", [False, True])
def test_an_encoders_products_are_those_that_pytorch_counts(gpu: bool) -> None:
    clip = small_clip()
    encoder = build_dual_encoder(clip, random_adapter(clip, 1))
    encoder = encoder.for_gpu() if gpu else encoder
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(torch.from_numpy(random_pixels(5, clip.image_size)))
    counted = sum(flop for _, flop, _, _ in kernels_of(copy.deepcopy(encoder), 5).calls)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_form_for_a_gpu_moves_fewer_bytes_and_twice_the_pictures_twice_as_many() -> None:
    def moved(encoder: torch.nn.Module, pictures: int) -> float:
        return sum(size for _, flop, size, _ in kernels_of(encoder, pictures).calls if not flop)

    before, joined = (moved(form, 2) for form in (roofline.vit_b16("fp16"), roofline.vit_b16("fp16").for_gpu()))
    assert joined < 0.5 * before
    assert moved(roofline.vit_b16("fp16"), 4) == pytest.approx(2 * before, rel=0.01)


def test_a_few_queries_wait_for_memory_and_a_batch_does_not() -> None:
    """By the rates of an H100: what scoring.dispatch chooses by."""
    few, batch = Case(roofline.READS_ALONE, 10**6, 512, 1000), Case(roofline.FEW_QUERIES, 10**6, 512, 1000)
    seconds, by = by_cuda(few, "int8").bound(H100)
    assert by == "hbm" and seconds == pytest.approx(by_cuda(few, "fp16").bound(H100)[0] / 2, rel=0.01)
    assert by_cuda(batch, "int8").bound(H100)[1] == "cuda"
    assert by_triton(batch, "int8").bound(H100)[0] < by_cuda(batch, "int8").bound(H100)[0]


def test_each_block_of_queries_reads_all_keys_through_l2_and_hbm_has_them_once() -> None:
    one, two = (by_triton(Case(queries, 16000, 512, 1000), "fp16") for queries in (256, 512))
    assert two.l2 == 2 * one.l2 > 3 * one.hbm and two.hbm < 1.1 * one.hbm


def test_a_bound_is_the_longest_part_and_work_adds_up() -> None:
    card = Work(10.0, 10.0, 10.0, 10.0, 10.0)
    assert Work(hbm=20.0, tensor=10.0).bound(card) == (2.0, "hbm")
    assert Work(tensor=1.0) + Work(tensor=2.0, l2=3.0) == Work(tensor=3.0, l2=3.0)
    wide = Case(256, 8192, 512, 1000, values=True, linear=True)
    assert terms(wide, split=True).bound(H100)[0] < terms(wide, split=False).bound(H100)[0] / 3


def test_the_table_has_a_row_for_each_case(capsys: pytest.CaptureFixture[str]) -> None:
    roofline.main("a100")
    printed = capsys.readouterr().out
    batches = [text for text in DEFAULT_CASES["cuda"] if Case.parse(text).queries > roofline.FEW_QUERIES]
    assert all(f"| {text} |" in printed for text in batches if "linear" not in text) and "ViT-B-16" in printed
    bounds = [float(line.split("|")[8].replace(",", "")) for line in printed.splitlines()[2:]]
    assert len(bounds) > 30 and np.min(bounds) > 0
