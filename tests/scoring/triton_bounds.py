"""Kernels read and write within their tensors, in Triton's interpreter; run as triton_parity.py says.

Each tensor of a launch is copied to memory that begins or ends at a page without access, so that an access beyond it
ends the process. Tensor descriptors, whose bounds the hardware checks, are masked loads in the interpreter.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import multiprocessing
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from iosr_fast.kernels import affine, cache_score, dense_values
from iosr_fast.kernels.launch import PRECISIONS, Config
from iosr_fast.scoring.device_plan import device_plan
from tests.conftest import random_embeddings, random_plan
from tests.scoring.triton_parity import SMALL, tensors, way

NO_ACCESS = 0
LIBC = ctypes.CDLL(None, use_errno=True)
MODULES = (affine, cache_score, dense_values)


def guarded_copy(tensor: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A copy of the tensor directly before (at_end) or behind a page without access."""
    size = tensor.numel() * tensor.element_size()
    inside = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, inside + 2 * mmap.PAGESIZE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (begin, begin + mmap.PAGESIZE + inside):
        assert LIBC.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), NO_ACCESS) == 0
    offset = mmap.PAGESIZE + (inside - size if at_end else 0)
    copy = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset).view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


class Guarded:
    """A kernel that runs on guarded copies of its tensors; what it writes is copied back."""

    def __init__(self, kernel: Any, at_end: bool, launched: set[str]) -> None:
        self.kernel, self.at_end, self.launched = kernel, at_end, launched

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **named: Any) -> None:
            # A tensor may be several arguments, and as one that isn't read of any shape.
            copies: dict[Any, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

            def guarded(value: Any) -> Any:
                if isinstance(value, TensorDescriptor):
                    return TensorDescriptor.from_tensor(guarded(value.base), value.block_shape)
                if not isinstance(value, torch.Tensor) or not value.numel():
                    return value
                key = (value.data_ptr(), value.shape, value.dtype)
                if key not in copies:
                    assert value.is_contiguous()
                    copies[key] = (value, guarded_copy(value, self.at_end), value.clone())
                return copies[key][1]

            moved = {name: guarded(value) for name, value in named.items()}
            self.kernel[grid](*map(guarded, arguments), **moved)
            for tensor, copy, before in copies.values():
                if not torch.equal(copy.view(torch.uint8), before.view(torch.uint8)):
                    tensor.copy_(copy)
            self.launched.add(self.kernel.fn.__name__)

        return launch


@pytest.fixture(params=[False, True], ids=["begin", "end"])
def launched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """All launches are guarded; the names of the kernels that were launched."""
    names: set[str] = set()
    for module in MODULES:
        for name in [name for name in dir(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Guarded(getattr(module, name), request.param, names))
    monkeypatch.setattr(dense_values, "multiprocessors", lambda device: 16)
    return names


CASES = [
    ("few", [40, 0, 3, 9, 1], 17, 5, SMALL[0], {"cache_kernel", "merge_kernel"}),
    ("few", [1], 1, 1, SMALL[1], {"cache_kernel"}),
    ("aligned", [4] * 5, 33, 19, SMALL[0], {"cache_kernel", "affine_kernel"}),
    ("aligned", [1] * 37, 33, 3, SMALL[1], {"cache_kernel", "affine_kernel"}),
    ("aligned-tma", [4] * 5, 48, 19, SMALL[0], {"cache_kernel", "affine_kernel"}),
    ("ragged", [40, 0, 3, 9, 1], 33, 19, SMALL[0], {"cache_kernel", "merge_kernel", "affine_kernel"}),
    ("ragged-tma", [40, 0, 3, 9, 1], 48, 19, SMALL[1], {"cache_kernel", "merge_kernel", "affine_kernel"}),
    ("ragged-tma", [1, 0, 2], 16, 1, SMALL[0], {"cache_kernel", "affine_kernel"}),
]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize(("path", "counts", "width", "batch", "config", "expected"), CASES)
def test_no_access_beyond_a_tensor(
    path: str,
    counts: list[int],
    width: int,
    batch: int,
    config: Config,
    expected: set[str],
    precision: str,
    rng: np.random.Generator,
    launched: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = device_plan(random_plan(rng, counts, width).with_key_precision(precision), "cpu")  # type: ignore[arg-type]
    rows = tensors(random_embeddings(rng, batch, width), "cpu")
    logits = cache_score.score_triton(plan, *rows, **way(path), config=config)[0]
    expected = expected | ({"digits_kernel"} if precision == "int8" else set())
    assert expected <= launched
    monkeypatch.undo()
    torch.testing.assert_close(logits, cache_score.score_triton(plan, *rows, **way(path), config=config)[0])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_access_beyond_values(precision: str, rng: np.random.Generator, launched: set[str]) -> None:
    for batch, counts, width in ((5, [20, 0, 17], 17), (1, [1], 1)):
        plan = random_plan(rng, counts, width, dense=True, precision=precision)  # type: ignore[arg-type]
        rows = tensors(random_embeddings(rng, batch, width), "cpu")
        cache_score.score_triton(device_plan(plan, "cpu"), *rows, config=Config(16, 16, 32, 1, 1, block_v=16))
    assert "dense_kernel" in launched


def test_no_access_beyond_queries_in_two_parts(rng: np.random.Generator, launched: set[str]) -> None:
    plan = random_plan(rng, [2, 1, 5], 33, ("text", "linear"))
    cache_score.score_triton(device_plan(plan, "cpu"), *tensors(random_embeddings(rng, 35, 33), "cpu"))
    assert launched == {"parts_kernel", "affine_kernel"}


def _read_beyond(at_end: bool) -> None:
    faulthandler.disable()
    rows, both = torch.ones(3, 5), torch.empty((3, 12), dtype=torch.float16)
    Guarded(affine.parts_kernel, at_end, set())[3,](rows, both, WIDTH=6, BLOCK_D=8)


def test_an_access_beyond_a_tensor_ends_the_process() -> None:
    process = multiprocessing.get_context("fork").Process(target=_read_beyond, args=(True,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGSEGV
