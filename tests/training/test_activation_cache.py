"""The cached outputs of the frozen stem: what is read is what was written, despite kills, damage and full disks."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import ROOT

torch = pytest.importorskip("torch")

from iosr_fast.training import activation_cache  # noqa: E402
from iosr_fast.training.activation_cache import ActivationCache, prune  # noqa: E402

KEY = {"clip": "c" * 64, "pictures": "p" * 64, "first": 3, "augment": True, "seed": 0}
COUNT, VIEWS, SHAPES = 10, 3, ((5, 8), (1, 7))
ROWS, VIEW = torch.tensor([7, 0, 9, 3]), 1


def opened(folder: Path, key: dict[str, Any] | None = None, **changes: Any) -> closing[ActivationCache]:
    settings = {"count": COUNT, "views": VIEWS, "shapes": SHAPES, "dtype": torch.float16} | changes
    return closing(ActivationCache(folder, key or KEY, **settings))


def outputs(rows: Any, view: int) -> list[Any]:
    """Made-up outputs of a stem: different for each row and view, the same in every process."""
    seeds = [torch.Generator().manual_seed(100 * int(row) + view + 1) for row in rows]
    return [torch.stack([torch.randn(shape, generator=seed) for seed in seeds]) for shape in SHAPES]


def filled(cache: ActivationCache) -> int:
    return int(np.count_nonzero(cache._marks))


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_are_read_as_they_were_rounded_by_this_process_and_the_next(tmp_path: Path, dtype: Any) -> None:
    expected = [part.to(dtype) for part in outputs(ROWS, VIEW)]
    with opened(tmp_path, dtype=dtype) as cache:
        assert filled(cache) == 0
        assert cache.read(ROWS, VIEW) is None and not cache.contains(ROWS, VIEW)
        cache.write(ROWS, VIEW, outputs(ROWS, VIEW))
        assert filled(cache) == len(ROWS) and cache.contains(ROWS, VIEW)
        other = torch.tensor([7, 0, 9, 4])  # one row of the four is missing
        assert not cache.contains(other, VIEW) and cache.read(other, VIEW) is None and cache.read(ROWS, 0) is None
        cache.write(ROWS[:1], 0, outputs(ROWS[:1], 0))
    with opened(tmp_path, dtype=dtype) as cache:
        assert filled(cache) == len(ROWS) + 1
        for _ in range(2):  # verified at first, trusted after
            for got, want in zip(cache.read(ROWS.flip(0), VIEW), expected, strict=True):
                assert got.dtype == dtype and got.is_contiguous()
                assert torch.equal(got, want.flip(0))
        mine = cache.read(ROWS, VIEW)
        mine[0].zero_()  # a copy: the file is not changed
        assert torch.equal(cache.read(ROWS, VIEW)[0], expected[0])
        zeros = [torch.zeros(1, *shape) for shape in SHAPES]
        cache.write(ROWS[:1], 2, zeros)
        for got, want in zip(cache.read(ROWS[:1], 2), zeros, strict=True):
            assert torch.equal(got, want.to(dtype))


def test_another_key_or_size_is_another_file(tmp_path: Path) -> None:
    with opened(tmp_path) as cache:
        cache.write(ROWS, VIEW, outputs(ROWS, VIEW))
    others = [
        {"key": KEY | {"seed": 1}},
        {"key": {**KEY, "more": None}},
        {"views": 4},
        {"count": 11},
        {"dtype": torch.bfloat16},
        {"shapes": ((5, 8), (7, 1))},
    ]
    for changes in others:
        with opened(tmp_path, **changes) as other:
            assert other.path != cache.path and filled(other) == 0
    with opened(tmp_path, key=dict(reversed(KEY.items()))) as again:  # the order of a key means nothing
        assert again.path == cache.path and filled(again) == len(ROWS)


def test_a_file_that_does_not_match_its_header_is_made_anew(tmp_path: Path) -> None:
    with opened(tmp_path) as cache:
        cache.write(ROWS, VIEW, outputs(ROWS, VIEW))
        path, header = cache.path, cache.path.with_name(cache.path.name + ".json")
    assert json.loads(header.read_text())["key"] == KEY

    def refill() -> None:
        with opened(tmp_path) as cache:
            assert cache.path == path and filled(cache) == 0 and path.stat().st_size == cache.bytes
            cache.write(ROWS, VIEW, outputs(ROWS, VIEW))

    header.write_text(header.read_text().replace('"seed": 0', '"seed": 1'))
    refill()
    header.write_bytes(b"\x00\xff")
    refill()
    header.unlink()
    refill()
    os.truncate(path, path.stat().st_size - 1)
    refill()
    path.unlink()
    refill()
    with opened(tmp_path) as cache:
        assert filled(cache) == len(ROWS)


@pytest.mark.parametrize("part", [0, 1])
def test_a_flipped_bit_makes_a_row_computed_again(tmp_path: Path, part: int, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path) as cache:
        cache.write(ROWS, VIEW, outputs(ROWS, VIEW))
        slot = int(ROWS[1]) * VIEWS + VIEW
        row_bytes = 2 * int(np.prod(SHAPES[part]))
        flip(cache.path, (1 + part) * 4096 + slot * row_bytes + row_bytes - 1)
    with opened(tmp_path) as cache:
        assert cache.read(ROWS[2:], VIEW) is not None
        assert cache.contains(ROWS, VIEW) and cache.read(ROWS, VIEW) is None and not cache.contains(ROWS, VIEW)
        assert "1 rows are damaged" in caplog.text
        assert filled(cache) == len(ROWS) - 1
        cache.write(ROWS[1:2], VIEW, outputs(ROWS[1:2], VIEW))
        assert all(torch.equal(g, w.half()) for g, w in zip(cache.read(ROWS, VIEW), outputs(ROWS, VIEW), strict=True))


def test_a_row_without_its_checksum_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(row: Any) -> None:
        raise KeyboardInterrupt

    with opened(tmp_path) as cache:
        cache.write(ROWS, VIEW, outputs(ROWS, VIEW))
        assert cache.read(ROWS, VIEW) is not None
        monkeypatch.setattr(activation_cache, "_mark", stop)
        with pytest.raises(KeyboardInterrupt):
            cache.write(ROWS[:1], VIEW, outputs([1], 1))  # its data are written, its mark is not
        monkeypatch.undo()
        assert cache.read(ROWS, VIEW) is None  # trusted before, and not any more
        assert filled(cache) == len(ROWS) - 1


def test_a_row_that_another_process_writes_anew_is_verified_anew(tmp_path: Path) -> None:
    with opened(tmp_path) as cache, opened(tmp_path) as other:
        cache.write(ROWS, VIEW, outputs(ROWS, VIEW))
        assert cache.read(ROWS, VIEW) is not None
        new = outputs(ROWS + 1, VIEW)
        other.write(ROWS, VIEW, new)
        assert torch.equal(cache.read(ROWS, VIEW)[0], new[0].half())
        other.write(ROWS, VIEW, outputs(ROWS, VIEW))
        flip(cache.path, 4096 + 2 * 40 * (int(ROWS[0]) * VIEWS + VIEW))
        assert cache.read(ROWS, VIEW) is None


def test_a_row_that_is_written_while_it_is_read_is_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as cache, opened(tmp_path) as other:
        cache.write(ROWS, VIEW, outputs(ROWS, VIEW))
        assert cache.read(ROWS, VIEW) is not None  # verified and trusted
        gather = activation_cache._gather

        def gather_and_rewrite(part: Any, slots: Any) -> Any:
            out = gather(part, slots)
            other.write(ROWS[:1], VIEW, outputs(ROWS[:1] + 1, VIEW))
            return out

        monkeypatch.setattr(activation_cache, "_gather", gather_and_rewrite)
        assert cache.read(ROWS, VIEW) is None
        monkeypatch.undo()
        assert torch.equal(cache.read(ROWS[:1], VIEW)[1], outputs(ROWS[:1] + 1, VIEW)[1].half())


WRITER = """
import sys, torch
from pathlib import Path
from tests.training.test_activation_cache import *
rows = torch.arange(COUNT)
parts = [outputs(rows, view) for view in range(VIEWS)]
cache = opened(Path(sys.argv[1])).thing
for i in range(10**9):
    for view in range(VIEWS):
        for batch in torch.randperm(COUNT).split(4):
            cache.write(rows[batch], view, [part[batch] for part in parts[view]])
    if i == 0:
        print("ready", flush=True)
"""


@pytest.mark.slow
def test_writers_killed_at_any_moment_leave_no_wrong_row(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, cwd=ROOT) for _ in range(2)]
    try:
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        with opened(tmp_path) as cache:  # a third process reads while the two write
            end, read = time.monotonic() + 0.1, 0
            while time.monotonic() < end or not read:
                read += check_every_row(cache)
    finally:
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
    with opened(tmp_path) as cache:
        assert 0 < check_every_row(cache) <= filled(cache)
        assert filled(cache) >= COUNT * VIEWS - 2  # each writer can lose the row that it was at


def check_every_row(cache: ActivationCache) -> int:
    """How many rows there are; all of them have to be right."""
    count = 0
    for row in range(COUNT):
        for view in range(VIEWS):
            parts = cache.read(torch.tensor([row]), view)
            if parts is not None:
                count += 1
                assert all(torch.equal(g, w.half()) for g, w in zip(parts, outputs([row], view), strict=True))
    return count


def test_more_than_the_disk_has_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"102,000.+ GB needed in .* GB free .*; cache fewer views") as caught:
        opened(tmp_path, count=10**9, views=1000)
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.glob("[!.]*"))


@pytest.mark.parametrize("reserves", [True, False], ids=["posix_fallocate", "zeros"])
def test_a_disk_that_fills_up_meanwhile_is_an_error_and_is_cleaned_up(
    tmp_path: Path, reserves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not reserves:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # stands for a disk with room for a megabyte
    try:
        with pytest.raises(OSError, match=r"can't cache the frozen stem's outputs: .* cache fewer views"):
            opened(tmp_path, count=100_000)
        assert not list(tmp_path.glob("[!.]*"))
        with opened(tmp_path) as cache:  # what has room goes on
            cache.write(ROWS, VIEW, outputs(ROWS, VIEW))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with opened(tmp_path) as cache:
        assert cache.read(ROWS, VIEW) is not None
        # Really there, not a sparse file that a full disk would turn into a SIGBUS.
        assert cache.path.stat().st_blocks * 512 >= cache.bytes


def test_unused_files_and_what_kills_left_are_removed(tmp_path: Path) -> None:
    foreign = {"notes.json": "mine", "checkpoint.activations": "mine too"}
    for name, text in foreign.items():
        (tmp_path / name).write_text(text)
    (tmp_path / f"{'a' * 32}.activations.tmp").write_bytes(b"half")
    (tmp_path / f"{'b' * 32}.activations").write_bytes(b"no header")
    (tmp_path / f"{'c' * 32}.activations.json").write_bytes(b"no data")
    opened(tmp_path, KEY | {"seed": 1}).thing.close()
    with opened(tmp_path) as cache:  # in use
        cache.write(ROWS, VIEW, outputs(ROWS, VIEW))
        assert len(prune(tmp_path)) == 2
        assert cache.read(ROWS, VIEW) is not None
    assert prune(tmp_path) == [cache.path]
    assert {path.name for path in tmp_path.iterdir()} == {".activations.lock", *foreign}
    assert prune(tmp_path / "nowhere") == []


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as cache:
        with pytest.raises(
            ValueError, match=r"expected parts of shapes \[\(4, 5, 8\), \(4, 1, 7\)\], got \[\(4, 5, 8\)\]"
        ):
            cache.write(ROWS, VIEW, outputs(ROWS, VIEW)[:1])
        for wrong in (1e5, float("nan")):  # float16 would make the first infinite, and training wrong in silence
            parts = outputs(ROWS, VIEW)
            parts[1][2, 0, 3] = wrong
            with pytest.raises(ValueError, match=r"finite in float16, got up to (100000|nan); cache them in bfloat16"):
                cache.write(ROWS, VIEW, parts)
        assert filled(cache) == 0
    cache.close()
