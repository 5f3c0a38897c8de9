"""The cached outputs of the frozen stem: what is read is what was written, and what does not fit is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from iosr_fast.training.activation_cache import ActivationCache

COUNT, VIEWS, SHAPE = 10, 3, (2, 5, 8)
ROWS, VIEW = torch.tensor([7, 0, 9, 3]), 1


def outputs(rows: Any) -> Any:
    return torch.randn((2, len(rows), *SHAPE[1:]), generator=torch.Generator().manual_seed(0))


def test_rows_are_read_as_they_were_rounded() -> None:
    cache, expected = ActivationCache(COUNT, VIEWS, SHAPE), outputs(ROWS).half()
    assert not cache.contains(ROWS, VIEW)
    assert torch.equal(cache.write(ROWS, VIEW, outputs(ROWS)), expected)
    assert not cache.contains(torch.tensor([7, 0, 9, 4]), VIEW), "one row of the four is missing"
    assert cache.contains(ROWS, VIEW) and not cache.contains(ROWS, 0)
    got = cache.read(ROWS.flip(0), VIEW)
    assert got.dtype == torch.float16 and torch.equal(got, expected.flip(1))
    got.zero_()
    assert torch.equal(cache.read(ROWS, VIEW), expected), "a copy was given"


def test_what_exceeds_the_memory_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"fit the memory, .* GB, got 160,000\.0 GB of .* cache fewer views"):
        ActivationCache(10**9, 1000, SHAPE)


@pytest.mark.parametrize("wrong", [1e5, float("nan")])
def test_numbers_beyond_float16_are_refused(wrong: float) -> None:
    cache, parts = ActivationCache(COUNT, VIEWS, SHAPE), outputs(ROWS)
    parts[1, 2, 0, 3] = wrong
    with pytest.raises(ValueError, match=r"finite in float16, got up to (100000|nan); train without cached views"):
        cache.write(ROWS, VIEW, parts)
    assert not cache.contains(ROWS, VIEW)
