"""WebDataset shards: exact rows in order whatever the part, streaming, the index, and what is damaged."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="torch comes with the cpu extra")

from iosr_fast.exceptions import BadImageError  # noqa: E402
from iosr_fast.images.geometry import Geometry  # noqa: E402
from iosr_fast.training.data import ShardPictures, shards, split  # noqa: E402
from iosr_fast.training.data.shard_index import INDEX, read_samples  # noqa: E402
from tests.pictures import encode  # noqa: E402

SIZE = 8
GEOMETRY = Geometry(SIZE)


def png(number: int) -> bytes:
    """A picture that tells which it is: `number` in its first channel."""
    return encode(Image.new("RGB", (SIZE, SIZE), (number, 7, 9)))


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def cls_members(first: int, count: int, classes: int = 3) -> list[tuple[str, bytes]]:
    return [
        member
        for i in range(first, first + count)
        for member in ((f"in/{i:06d}.cls", f"{i % classes}\n".encode()), (f"in/{i:06d}.PNG", png(i)))
    ]


COUNTS = [7, 1, 12, 5, 15]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    first = 0
    for i, count in enumerate(COUNTS):
        write_tar(folder / f"train-{i:04d}.tar", cls_members(first, count))
        first += count
    return folder


def numbers(source: ShardPictures, order: torch.Tensor, batch: int = 4) -> list[int]:
    """Which pictures come, after checking that they come as rows and batches say."""
    batches = list(source.iterate(order, batch))
    assert [rows.tolist() for rows, _ in batches] == [rows.tolist() for rows in order.split(batch) if len(rows)]
    for rows, pixels in batches:
        assert pixels.dtype == torch.uint8 and pixels.shape == (len(rows), 3, SIZE, SIZE)
        assert pixels[:, 0, 0, 0].tolist() == rows.tolist()
    return [number for _, pixels in batches for number in pixels[:, 0, 3, 3].tolist()]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("window", [1, 6, 2000])
def test_any_part_of_an_order_comes_exactly(folder: Path, window: int, workers: int) -> None:
    source = ShardPictures(folder, GEOMETRY, workers, window=window)
    assert source.labels.tolist() == [i % 3 for i in range(40)] and source.class_names == ["0", "1", "2"]
    order = source.order(torch.Generator().manual_seed(5))
    assert sorted(order.tolist()) == list(range(40)) and order.dtype == torch.int64
    assert torch.equal(order, source.order(torch.Generator().manual_seed(5)))
    parts = [order, order[13:], order[39:], order[:0], order[8:29], torch.arange(40)]
    parts += [order[rank::3] for rank in range(3)] + [order[17:][1::2]]
    for part in parts:
        assert numbers(source, part) == part.tolist()


def test_an_order_shuffles_within_windows_only(folder: Path) -> None:
    source = ShardPictures(folder, GEOMETRY, window=6)
    starts = np.cumsum([0, *COUNTS])
    generator = torch.Generator().manual_seed(0)
    orders = [source.order(generator).tolist() for _ in range(20)]
    assert len({tuple(order) for order in orders}) == 20
    for order in orders:
        stream = [sorted(order[i : i + 6]) for i in range(0, 40, 6)]
        shards_in_turn = [int(np.searchsorted(starts, row, "right")) for block in stream for row in block]
        # Each shard is in consecutive windows, and the rows before any window's end are a prefix of each shard.
        for end in range(6, 40, 6):
            for start, count in zip(starts, COUNTS, strict=False):
                seen = [row for row in order[:end] if start <= row < start + count]
                assert sorted(seen) == list(range(start, start + len(seen)))
        assert set(shards_in_turn) == {1, 2, 3, 4, 5}
    assert any(order[:6] != sorted(order[:6]) for order in orders)


def test_a_pass_reads_each_shard_once_forward_and_none_that_is_not_needed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ShardPictures(folder, GEOMETRY, workers=0, window=6)
    opened: list[str] = []

    def counting(path: Path) -> object:
        opened.append(path.name)
        return read_samples(path)

    monkeypatch.setattr(shards, "read_samples", counting)
    order = source.order(torch.Generator().manual_seed(1))
    numbers(source, order)
    assert sorted(opened) == [f"train-{i:04d}.tar" for i in range(5)]
    opened.clear()
    numbers(source, order[30:])
    ends = np.cumsum(COUNTS)
    needed = {f"train-{int(np.searchsorted(ends, row, 'right')):04d}.tar" for row in order[30:].tolist()}
    assert sorted(opened) == sorted(needed) and len(opened) < 5


def test_an_order_that_does_not_stream_is_refused(folder: Path) -> None:
    source = ShardPictures(folder, GEOMETRY, workers=0, window=3)
    with pytest.raises(ValueError, match="needs more than the window of 3 samples"):
        numbers(source, torch.arange(39, -1, -1))


def test_many_small_shards_are_not_all_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MOST_OPEN", 8)
    for i in range(40):
        write_tar(tmp_path / f"{i:03d}.tar", cls_members(3 * i, 3, classes=2))
    source = ShardPictures(tmp_path, GEOMETRY, workers=0)
    order = source.order(torch.Generator().manual_seed(0))
    assert numbers(source, order) == order.tolist()


def test_shards_split_by_class_and_still_stream(folder: Path) -> None:
    source = ShardPictures(folder, GEOMETRY, workers=0, window=6)
    train, held = split(source, 0.25, seed=0)
    assert len(train.labels) + len(held.labels) == 40 and held.labels.bincount().min() >= 3
    order = train.order(torch.Generator().manual_seed(2))
    for rows, pixels in train.iterate(order, 5):
        assert pixels[:, 0, 0, 0].tolist() == train.rows[rows].tolist()


def test_labels_in_json_and_text_and_names_of_any_kind(tmp_path: Path) -> None:
    names = ["café/bar", "日本", "a/b c"]
    members = [(f"{i}.json", json.dumps({"class": names[i % 3], "x": 1}).encode()) for i in range(4)]
    joined = [member for i in range(4) for member in (members[i], (f"{i}.png", png(i)))]
    write_tar(tmp_path / "a.tar", joined)
    webp = encode(Image.new("RGB", (SIZE, SIZE)), "WEBP")
    write_tar(tmp_path / "b.tar.gz", [("k.webp", webp), ("k.txt", "日本\n".encode())], "w:gz")
    source = ShardPictures(tmp_path, GEOMETRY)
    assert source.class_names == sorted(names)
    assert [source.class_names[label] for label in source.labels] == [*names, names[0], "日本"]
    assert [rows.tolist() for rows, _ in source.iterate(torch.arange(5), 2)] == [[0, 1], [2, 3], [4]]
    listed = ShardPictures([tmp_path / "b.tar.gz", tmp_path / "a.tar"], GEOMETRY, class_names=[*names, "unused"])
    assert listed.labels.tolist() == [1, 0, 1, 2, 0]


def test_class_names_come_from_a_file_beside_the_shards(folder: Path) -> None:
    (folder / "classes.txt").write_text("rot\ngrün\nblau\n", encoding="utf-8")
    source = ShardPictures(str(folder / "train-{0000..0001}.tar"), GEOMETRY)
    assert source.class_names == ["rot", "grün", "blau"] and len(source.labels) == 8
    (folder / "classes.txt").write_text("rot\ngrün\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"key in/000002 of shard .*train-0000.tar has the label 2, which is not one of 2"
    ):
        ShardPictures(folder, GEOMETRY)


def test_class_files_beside_the_shards_agree_or_are_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (folder / "train-0001.tar").rename(other / "train-0001.tar")
    shards = [folder / "train-0000.tar", other / "train-0001.tar"]
    for place in (folder, other):
        (place / "classes.txt").write_text("rot\ngrün\nblau\n", encoding="utf-8")
    assert ShardPictures(shards, GEOMETRY, cache=tmp_path).class_names == ["rot", "grün", "blau"]
    (other / "classes.txt").write_text("blau\ngrün\nrot\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"the same classes beside all shards, got others .*other/classes.txt than"):
        ShardPictures(shards, GEOMETRY, cache=tmp_path)
    assert ShardPictures(shards, GEOMETRY, cache=tmp_path, class_names=["a", "b", "c"]).class_names == ["a", "b", "c"]


def test_the_index_is_made_once_and_again_for_a_changed_shard(folder: Path, tmp_path: Path) -> None:
    first = ShardPictures(folder, GEOMETRY)
    index = folder / INDEX
    stamp = index.stat().st_mtime_ns
    assert ShardPictures(folder, GEOMETRY).fingerprint == first.fingerprint and index.stat().st_mtime_ns == stamp
    write_tar(folder / "train-0001.tar", cls_members(100, 3))
    changed = ShardPictures(folder, GEOMETRY)
    assert len(changed.labels) == 42 and changed.fingerprint != first.fingerprint
    index.write_text('{"format": 1, "shards": {"train', encoding="utf-8")
    assert ShardPictures(folder, GEOMETRY).fingerprint == changed.fingerprint
    cache = tmp_path / "cache"
    index.unlink()
    assert ShardPictures(folder, GEOMETRY, cache=cache).fingerprint == changed.fingerprint
    assert (cache / INDEX).is_file() and not index.exists()


def test_what_was_indexed_before_a_damaged_shard_is_kept(folder: Path) -> None:
    last = folder / "train-0004.tar"
    good = last.read_bytes()
    last.write_bytes(good[:1000])
    with pytest.raises(ValueError, match=r"train-0004.tar is damaged"):
        ShardPictures(folder, GEOMETRY)
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    assert sorted(index["shards"]) == [f"train-{i:04d}.tar" for i in range(4)]
    last.write_bytes(good)
    assert len(ShardPictures(folder, GEOMETRY).labels) == 40


def test_a_folder_that_cannot_be_written_asks_for_a_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="give another folder as cache="):
        ShardPictures(folder, GEOMETRY)


def test_missing_shards_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"2 of 7 shards are missing: .*train-0005.tar, .*train-0006.tar"):
        ShardPictures(str(folder / "train-{0000..0006}.tar"), GEOMETRY)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="expected shards"):
        ShardPictures(tmp_path / "empty", GEOMETRY)


@pytest.mark.parametrize("damage", ["truncated", "header", "no end", "not a tar", "gzip"])
def test_damaged_shards_are_named_before_training_starts(folder: Path, damage: str) -> None:
    path = folder / "train-0002.tar"
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        data = data[: 512 * 9 + 40]
    elif damage == "header":
        data[512 * 8 : 512 * 8 + 100] = b"x" * 100
    elif damage == "no end":
        data = data[: 512 * 8]
    elif damage == "not a tar":
        data = bytearray(b"<html>not found</html>" * 100)
    else:
        path.unlink()
        path = folder / "train-0002.tar.gz"
        write_tar(path, cls_members(8, 12), "w:gz")
        data = bytearray(path.read_bytes()[:-300])
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"shard .*{path.name} is damaged"):
        ShardPictures(folder, GEOMETRY)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("k.cls", b"1")], r"expected one image .* at key k of shard .*bad.tar, found 0 among: cls"),
        ([("k.png", b"1"), ("k.jpg", b"1"), ("k.cls", b"1")], "found 2 among: cls, jpg, png"),
        ([("k.png", b"1")], "expected a label at key k of shard .*bad.tar"),
        ([("k.png", b"1"), ("k.json", b'{"label": null}')], "expected a label at key k"),
        ([("k.png", b"1"), ("k.cls", b"dog")], "label at key k of shard .*bad.tar can't be read"),
        ([("k.png", b"1"), ("k.json", b'{"label"')], "label at key k of shard .*bad.tar can't be read"),
        ([("k.png", b"1"), ("k.txt", b"dog")], "expected labels of one kind, got integers"),
        ([("README", b"1")], "holds no samples"),
    ],
)
def test_bad_samples_are_named(folder: Path, members: list[tuple[str, bytes]], message: str) -> None:
    write_tar(folder / "bad.tar", members)
    with pytest.raises(ValueError, match=message):
        ShardPictures(folder, GEOMETRY)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_undecodable_image_names_shard_and_key(folder: Path, workers: int) -> None:
    write_tar(folder / "train-0001.tar", [("in/broken.png", png(3)[:50]), ("in/broken.cls", b"1")])
    source = ShardPictures(folder, GEOMETRY, workers)
    with pytest.raises(BadImageError, match=r"key in/broken of shard .*train-0001.tar"):
        numbers(source, torch.arange(40))


def test_a_shard_that_changes_after_it_was_opened_is_named(folder: Path) -> None:
    source = ShardPictures(folder, GEOMETRY, workers=0)
    write_tar(folder / "train-0000.tar", cls_members(1, 7))
    with pytest.raises(ValueError, match=r"train-0000.tar changed after it was opened"):
        numbers(source, torch.arange(40))
    write_tar(folder / "train-0000.tar", cls_members(0, 3))
    with pytest.raises(ValueError, match=r"train-0000.tar changed after it was opened"):
        numbers(source, torch.arange(40))


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_flipped_bit_in_a_compressed_shard_is_found(tmp_path: Path, mode: str) -> None:
    """Python's tarfile reads compressed streams without their checksum, and ends at a header that is wrong."""
    path = tmp_path / f"a.tar.{mode[2:]}"
    noise = np.random.default_rng(0).bytes(600)  # what deflate can't make smaller is stored: it decodes after a flip
    write_tar(path, [(name, data + noise if "PNG" in name else data) for name, data in cls_members(0, 12)], mode)
    good = path.read_bytes()
    assert len(ShardPictures([path], GEOMETRY, cache=tmp_path / "cache").labels) == 12
    for position in random.Random(0).sample(range(12, len(good) - 12), 25):
        bad = bytearray(good)
        bad[position] ^= 4
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"shard .*a\.tar\.\w+ is damaged"):
            ShardPictures([path], GEOMETRY, cache=tmp_path / "cache")


def test_other_labels_under_the_same_keys_are_noticed_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, cls_members(0, 6))
    source = ShardPictures(tmp_path, GEOMETRY, workers=0)
    write_tar(path, cls_members(0, 6, classes=2))
    later = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))
    with pytest.raises(ValueError, match=r"a.tar changed after it was opened"):
        list(source.iterate(torch.arange(6), 2))
