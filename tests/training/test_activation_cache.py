"""The kept outputs of the frozen stem: what is read is what was written, whatever was killed, flipped, full or old."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import ROOT

torch = pytest.importorskip("torch")

from iosr_fast.training import activation_cache as activation_cache  # noqa: E402
from iosr_fast.training.activation_cache import ActivationCache, needed_bytes, prune  # noqa: E402

KEY = {"clip": "c" * 64, "pictures": "p" * 64, "first": 3, "augment": True, "seed": 0}
COUNT, VIEWS, SHAPES = 10, 3, ((5, 8), (1, 7))
ROWS, VIEW = torch.tensor([7, 0, 9, 3]), torch.tensor([2, 0, 1, 1])


def opened(folder: Path, key: dict[str, Any] | None = None, **changes: Any) -> ActivationCache:
    settings = {"count": COUNT, "views": VIEWS, "shapes": SHAPES, "dtype": torch.float16} | changes
    return ActivationCache(folder, key or KEY, **settings)


def outputs(rows: Any, views: Any) -> list[Any]:
    """What a stem would give: other numbers for each row and view, the same in every process."""
    seeds = [torch.Generator().manual_seed(100 * int(r) + int(v) + 1) for r, v in zip(rows, views, strict=True)]
    return [torch.stack([torch.randn(shape, generator=seed) for seed in seeds]) for shape in SHAPES]


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_are_read_as_they_were_rounded_by_this_process_and_the_next(tmp_path: Path, dtype: Any) -> None:
    expected = [part.to(dtype) for part in outputs(ROWS, VIEW)]
    with opened(tmp_path, dtype=dtype) as kept:
        assert kept.filled() == 0
        assert kept.read(ROWS, VIEW) is None and not kept.holds(ROWS, VIEW)
        kept.write(ROWS, VIEW, outputs(ROWS, VIEW))
        assert kept.filled() == len(ROWS) and kept.holds(ROWS, VIEW)
        assert not kept.holds(ROWS, VIEW + torch.tensor([0, 0, 0, 1]))
        assert kept.read(ROWS, VIEW + torch.tensor([0, 0, 0, 1])) is None  # one row of the four is another
        kept.write(ROWS[:1], torch.tensor([0]), outputs(ROWS[:1], [0]))
    with opened(tmp_path, dtype=dtype) as kept:
        assert kept.filled() == len(ROWS) + 1
        for _ in range(2):  # verified at first, trusted after
            for got, want in zip(kept.read(ROWS.flip(0), VIEW.flip(0)), expected, strict=True):
                assert got.dtype == dtype and got.is_contiguous()
                assert torch.equal(got, want.flip(0))
        mine = kept.read(ROWS, VIEW)
        mine[0].zero_()  # a copy: the file is not touched
        assert torch.equal(kept.read(ROWS, VIEW)[0], expected[0])


def test_a_row_of_zeros_is_a_row(tmp_path: Path) -> None:
    zeros = [torch.zeros(1, *shape) for shape in SHAPES]
    with opened(tmp_path) as kept:
        kept.write(ROWS[:1], VIEW[:1], zeros)
        assert kept.filled() == 1
        assert all(
            torch.equal(got, want.half()) for got, want in zip(kept.read(ROWS[:1], VIEW[:1]), zeros, strict=True)
        )


def test_another_key_or_size_is_another_file(tmp_path: Path) -> None:
    with opened(tmp_path) as kept:
        kept.write(ROWS, VIEW, outputs(ROWS, VIEW))
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
            assert other.path != kept.path and other.filled() == 0
    with opened(tmp_path, key=dict(reversed(KEY.items()))) as again:  # the order of a key means nothing
        assert again.path == kept.path and again.filled() == len(ROWS)


def test_a_file_that_does_not_match_its_header_is_made_anew(tmp_path: Path) -> None:
    with opened(tmp_path) as kept:
        kept.write(ROWS, VIEW, outputs(ROWS, VIEW))
        path, header = kept.path, kept.path.with_name(kept.path.name + ".json")
    assert json.loads(header.read_text())["key"] == KEY

    def refill() -> None:
        with opened(tmp_path) as kept:
            assert kept.path == path and kept.filled() == 0 and path.stat().st_size == kept.bytes
            kept.write(ROWS, VIEW, outputs(ROWS, VIEW))

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
    with opened(tmp_path) as kept:
        assert kept.filled() == len(ROWS)


@pytest.mark.parametrize("part", [0, 1])
def test_a_flipped_bit_makes_a_row_computed_again(tmp_path: Path, part: int, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path) as kept:
        kept.write(ROWS, VIEW, outputs(ROWS, VIEW))
        slot = int(ROWS[1]) * VIEWS + int(VIEW[1])
        row_bytes = 2 * int(np.prod(SHAPES[part]))
        flip(kept.path, (1 + part) * 4096 + slot * row_bytes + row_bytes - 1)
    with opened(tmp_path) as kept:
        assert kept.read(ROWS[2:], VIEW[2:]) is not None
        assert kept.holds(ROWS, VIEW) and kept.read(ROWS, VIEW) is None and not kept.holds(ROWS, VIEW)
        assert "1 rows are damaged" in caplog.text
        assert kept.filled() == len(ROWS) - 1
        kept.write(ROWS[1:2], VIEW[1:2], outputs(ROWS[1:2], VIEW[1:2]))
        assert all(torch.equal(g, w.half()) for g, w in zip(kept.read(ROWS, VIEW), outputs(ROWS, VIEW), strict=True))


def test_a_row_without_its_checksum_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(row: Any) -> None:
        raise KeyboardInterrupt

    with opened(tmp_path) as kept:
        kept.write(ROWS, VIEW, outputs(ROWS, VIEW))
        assert kept.read(ROWS, VIEW) is not None
        monkeypatch.setattr(activation_cache, "_mark", stop)
        with pytest.raises(KeyboardInterrupt):
            kept.write(ROWS[:1], VIEW[:1], outputs([1], [1]))  # its data are written, its mark is not
        monkeypatch.undo()
        assert kept.read(ROWS, VIEW) is None  # trusted before, and not any more
        assert kept.filled() == len(ROWS) - 1


def test_a_row_that_another_process_writes_anew_is_verified_anew(tmp_path: Path) -> None:
    with opened(tmp_path) as kept, opened(tmp_path) as other:
        kept.write(ROWS, VIEW, outputs(ROWS, VIEW))
        assert kept.read(ROWS, VIEW) is not None
        new = outputs(ROWS + 1, VIEW)
        other.write(ROWS, VIEW, new)
        assert torch.equal(kept.read(ROWS, VIEW)[0], new[0].half())
        other.write(ROWS, VIEW, outputs(ROWS, VIEW))
        flip(kept.path, 4096 + 2 * 40 * (int(ROWS[0]) * VIEWS + int(VIEW[0])))
        assert kept.read(ROWS, VIEW) is None


def test_a_row_that_is_written_while_it_is_read_is_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as kept, opened(tmp_path) as other:
        kept.write(ROWS, VIEW, outputs(ROWS, VIEW))
        assert kept.read(ROWS, VIEW) is not None  # verified and trusted
        gather = activation_cache._gather

        def gather_and_rewrite(part: Any, slots: Any) -> Any:
            out = gather(part, slots)
            other.write(ROWS[:1], VIEW[:1], outputs(ROWS[:1] + 1, VIEW[:1]))
            return out

        monkeypatch.setattr(activation_cache, "_gather", gather_and_rewrite)
        assert kept.read(ROWS, VIEW) is None
        monkeypatch.undo()
        assert torch.equal(kept.read(ROWS[:1], VIEW[:1])[1], outputs(ROWS[:1] + 1, VIEW[:1])[1].half())


WRITER = """
import sys, torch
from pathlib import Path
from tests.training.test_activation_cache import *
rows = torch.arange(COUNT).repeat_interleave(VIEWS)
views = torch.arange(VIEWS).repeat(COUNT)
parts = outputs(rows, views)
kept = opened(Path(sys.argv[1]))
for i in range(10**9):
    for batch in torch.randperm(len(rows)).split(4):
        kept.write(rows[batch], views[batch], [part[batch] for part in parts])
    if i == 0:
        print("ready", flush=True)
"""


def test_writers_killed_at_any_moment_leave_no_wrong_row(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = ROOT
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, cwd=root) for _ in range(2)]
    try:
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        with opened(tmp_path) as kept:  # a third process reads while the two write
            end, read = time.monotonic() + 0.1, 0
            while time.monotonic() < end or not read:
                read += check_every_row(kept)
    finally:
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
    with opened(tmp_path) as kept:
        assert 0 < check_every_row(kept) <= kept.filled()
        assert kept.filled() >= COUNT * VIEWS - 2  # each writer can lose the row that it was at


def check_every_row(kept: ActivationCache) -> int:
    """How many rows there are; all of them have to be right."""
    found = 0
    for row in range(COUNT):
        for view in range(VIEWS):
            parts = kept.read(torch.tensor([row]), torch.tensor([view]))
            if parts is not None:
                found += 1
                assert all(torch.equal(g, w.half()) for g, w in zip(parts, outputs([row], [view]), strict=True))
    return found


def test_more_than_the_disk_has_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        OSError, match=r"102,000.+ GB wanted in .* GB free .*; use fewer cached views, another"
    ) as caught:
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
        with pytest.raises(OSError, match=r"can't keep the frozen stem's outputs: .* use fewer cached views"):
            opened(tmp_path, count=100_000)
        assert not list(tmp_path.glob("[!.]*"))
        with opened(tmp_path) as kept:  # what has room goes on
            kept.write(ROWS, VIEW, outputs(ROWS, VIEW))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with opened(tmp_path) as kept:
        assert kept.read(ROWS, VIEW) is not None
        # Really there, not a sparse file that a full disk would turn into a SIGBUS.
        assert kept.path.stat().st_blocks * 512 >= kept.bytes


def test_the_size_is_known_beforehand(tmp_path: Path) -> None:
    with opened(tmp_path) as kept:
        assert kept.bytes == kept.path.stat().st_size == needed_bytes(COUNT, VIEWS, SHAPES)
    vit_b_16 = needed_bytes(9000, 4, ((197, 768), (197, 768)))
    assert vit_b_16 == pytest.approx(9000 * 4 * (2 * 197 * 768 * 2 + 8), rel=1e-6)


def test_the_least_recently_used_files_go_first(tmp_path: Path) -> None:
    paths = []
    for seed in range(4):
        with opened(tmp_path, KEY | {"seed": seed}) as kept:
            paths.append(kept.path)
            size = kept.bytes
    for age, path in enumerate(paths):
        os.utime(path.with_name(path.name + ".json"), (1e9 + age, 1e9 + age))
    foreign = tmp_path / "notes.json"
    foreign.write_text("mine")
    (tmp_path / "checkpoint.prefix").write_text("mine too")
    assert prune(tmp_path, 4 * size) == []
    opened(tmp_path, KEY).close()  # the oldest is used again
    assert prune(tmp_path, 3 * size) == [paths[1]]
    with opened(tmp_path, KEY | {"seed": 2}) as kept:  # in use
        kept.write(ROWS, VIEW, outputs(ROWS, VIEW))
        assert set(prune(tmp_path, 0)) == {paths[0], paths[3]}
        assert kept.read(ROWS, VIEW) is not None
    assert foreign.read_text() == "mine" and (tmp_path / "checkpoint.prefix").exists()
    assert prune(tmp_path, 0) == [paths[2]]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".prefix.lock", "checkpoint.prefix", "notes.json"]
    assert prune(tmp_path / "nowhere", 0) == []


def test_what_a_kill_left_half_made_goes(tmp_path: Path) -> None:
    (tmp_path / f"{'a' * 32}.prefix.tmp").write_bytes(b"half")
    (tmp_path / f"{'b' * 32}.prefix").write_bytes(b"no header")
    (tmp_path / f"{'c' * 32}.prefix.json").write_bytes(b"no data")
    assert [path.name for path in prune(tmp_path, 10**9)] == [f"{'b' * 32}.prefix"]
    assert [path.name for path in tmp_path.iterdir()] == [".prefix.lock"]


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected torch.float16 or torch.bfloat16, got torch.float32"):
        opened(tmp_path, dtype=torch.float32)
    with pytest.raises(ValueError, match="at least one picture, view and part, got 0 pictures, 3 views"):
        opened(tmp_path, count=0)
    with pytest.raises(TypeError, match="a key that JSON can hold"):
        opened(tmp_path, KEY | {"model": object()})
    with pytest.raises(TypeError, match="a key that JSON can hold"):
        opened(tmp_path, KEY | {"scale": float("nan")})
    assert not list(tmp_path.glob("[!.]*"))
    with opened(tmp_path) as kept:
        with pytest.raises(IndexError, match=r"expected rows in 0\.\.9, got 3\.\.10"):
            kept.read(torch.tensor([3, 10]), torch.tensor([0, 0]))
        with pytest.raises(IndexError, match=r"expected views in 0\.\.2, got -1\.\.0"):
            kept.write(torch.tensor([3, 4]), torch.tensor([-1, 0]), outputs([3, 4], [0, 0]))
        with pytest.raises(ValueError, match="rows and views of one shape"):
            kept.read(ROWS, VIEW[:1])
        with pytest.raises(TypeError, match="Cannot cast"):
            kept.read(ROWS.float(), VIEW)
        with pytest.raises(
            ValueError, match=r"expected parts of shapes \[\(4, 5, 8\), \(4, 1, 7\)\], got \[\(4, 5, 8\)\]"
        ):
            kept.write(ROWS, VIEW, outputs(ROWS, VIEW)[:1])
        for wrong in (1e5, float("nan")):  # float16 would make the first infinite, and training wrong in silence
            parts = outputs(ROWS, VIEW)
            parts[1][2, 0, 3] = wrong
            with pytest.raises(ValueError, match=r"finite in float16, got up to (100000|nan); keep them in bfloat16"):
                kept.write(ROWS, VIEW, parts)
        assert kept.filled() == 0
    for use in (lambda: kept.read(ROWS, VIEW), kept.filled, lambda: kept.write(ROWS, VIEW, outputs(ROWS, VIEW))):
        with pytest.raises(ValueError, match="is closed"):
            use()
    kept.close()
