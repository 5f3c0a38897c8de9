"""The cached outputs of the frozen stem: what is read is what was written, despite kills, damage and full disks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from iosr_fast.training import activation_cache
from iosr_fast.training.activation_cache import ActivationCache
from tests.training.small import largest_file

KEY = {"clip": "c" * 64, "pictures": "p" * 64, "first": 3, "augment": True, "seed": 0}
COUNT, VIEWS, SHAPE = 10, 3, (2, 5, 8)
ROWS, VIEW = torch.tensor([7, 0, 9, 3]), 1


def opened(folder: Path, key: dict[str, Any] | None = None, **changes: Any) -> ActivationCache:
    settings = {"count": COUNT, "views": VIEWS, "shape": SHAPE} | changes
    return ActivationCache(folder, key or KEY, **settings)


def outputs(rows: Any, view: int) -> Any:
    """Made-up outputs of a stem (2, B, 5, 8): different for each row and view, the same in every process."""
    seeds = [torch.Generator().manual_seed(100 * int(row) + view + 1) for row in rows]
    return torch.stack([torch.randn(SHAPE, generator=seed) for seed in seeds], dim=1)


def test_rows_are_read_as_they_were_rounded_by_this_process_and_the_next(tmp_path: Path) -> None:
    cache, expected = opened(tmp_path), outputs(ROWS, VIEW).half()
    assert cache.read(ROWS, VIEW) is None and not cache.contains(ROWS, VIEW)
    assert torch.equal(cache.write(ROWS, VIEW, outputs(ROWS, VIEW)), expected)
    other = torch.tensor([7, 0, 9, 4])  # one row of the four is missing
    assert not cache.contains(other, VIEW) and cache.read(other, VIEW) is None and cache.read(ROWS, 0) is None
    for again in (cache, opened(tmp_path)):
        got = again.read(ROWS.flip(0), VIEW)
        assert got.dtype == torch.float16 and torch.equal(got, expected.flip(1))
        got.zero_()  # a copy: the file is not changed
        assert torch.equal(again.read(ROWS, VIEW), expected)


def test_another_key_or_size_is_another_file(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    cache.write(ROWS, VIEW, outputs(ROWS, VIEW))
    others = [{"key": KEY | {"seed": 1}}, {"key": {**KEY, "more": None}}, {"views": 4}, {"count": 11}]
    for changes in [*others, {"shape": (2, 8, 5)}]:
        other = opened(tmp_path, **changes)
        assert other.path != cache.path and not other.contains(ROWS, VIEW)
    again = opened(tmp_path, key=dict(reversed(KEY.items())))  # the order of a key means nothing
    assert again.path == cache.path and again.contains(ROWS, VIEW)


@pytest.mark.parametrize("damage", ["bit", "cut"])
def test_damaged_rows_are_computed_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    cache = opened(tmp_path)
    cache.write(ROWS, VIEW, outputs(ROWS, VIEW))
    row = 8 * COUNT * VIEWS + 160 * (int(ROWS[2]) * VIEWS + VIEW)
    with cache.path.open("r+b") as file:
        if damage == "cut":
            file.truncate(row + 80)
        else:
            file.seek(row + 159)
            file.write(b"\x55")
    cache = opened(tmp_path)
    assert cache.read(ROWS[:2], VIEW) is not None
    assert cache.contains(ROWS, VIEW) and cache.read(ROWS, VIEW) is None and not cache.contains(ROWS, VIEW)
    assert "1 rows are damaged" in caplog.text
    cache.write(ROWS[2:3], VIEW, outputs(ROWS[2:3], VIEW))
    assert torch.equal(cache.read(ROWS, VIEW), outputs(ROWS, VIEW).half())


def test_a_row_without_its_checksum_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(row: Any) -> None:
        raise KeyboardInterrupt

    cache = opened(tmp_path)
    cache.write(ROWS, VIEW, outputs(ROWS, VIEW))
    assert cache.read(ROWS, VIEW) is not None
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(activation_cache, "_mark", stop)
        cache.write(ROWS[:1], VIEW, outputs([1], 1))  # its data are written, its mark is not
    assert cache.read(ROWS, VIEW) is None and cache.contains(ROWS[1:], VIEW)


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"168,000\.000 GB needed in .* GB free .*no room.*; cache fewer views"):
        opened(tmp_path, count=10**9, views=1000)
    with largest_file(1 << 20):  # stands for a disk that fills up meanwhile
        with pytest.raises(OSError, match=r"can't cache the frozen stem's outputs: .* cache fewer views"):
            opened(tmp_path, count=100_000)
        assert not list(tmp_path.iterdir())
        cache = opened(tmp_path)
    # Reserved, not a sparse file: a full disk would turn a write to that into a SIGBUS.
    status = cache.path.stat()
    assert status.st_blocks * 512 >= status.st_size == COUNT * VIEWS * (8 + 2 * int(np.prod(SHAPE)))


@pytest.mark.parametrize("wrong", [1e5, float("nan")])
def test_numbers_beyond_float16_are_refused(tmp_path: Path, wrong: float) -> None:
    cache, parts = opened(tmp_path), outputs(ROWS, VIEW)
    parts[1, 2, 0, 3] = wrong
    with pytest.raises(ValueError, match=r"finite in float16, got up to (100000|nan); train without cached views"):
        cache.write(ROWS, VIEW, parts)
    assert not cache.contains(ROWS, VIEW)
