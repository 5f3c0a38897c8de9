"""What iosr-fast embed takes: folders, WebDataset shards and Parquet files; and how it is cut into chunks."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from iosr_fast.exceptions import BadImageError
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.preprocess import to_pixels
from iosr_fast.pipeline import embedding_files
from iosr_fast.pipeline.source import Item, ItemDecoder, Source, check_carried
from iosr_fast.pipeline.sources import kind_of, open_source
from tests.pipeline.runs import assert_encodes, embedded, run, write_pictures


def write_shard(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    return write_pictures(tmp_path / "in", 20)


@pytest.fixture
def shards(pictures: list[Path], tmp_path: Path) -> Path:
    """Three shards with 8, 8 and 4 samples: a class and a picture each, and what webdataset skips."""
    folder = tmp_path / "shards"
    for number in range(3):
        members = {"__about__": b"x", "__meta__/a.txt": b"x"}
        for i, path in enumerate(pictures[8 * number : 8 * number + 8]):
            members |= {f"{number}/{i:03d}.cls": b"1", f"{number}/{i:03d}.PNG": path.read_bytes()}
        write_shard(folder / f"train-{number:03d}.tar", members)
    return folder


# Chunks


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10, 100])
@pytest.mark.parametrize("starts", [(0,), (0, 3), (0, 3, 3, 9)])
def test_every_item_is_in_one_chunk_and_no_chunk_crosses_a_group(size: int, starts: tuple[int, ...]) -> None:
    source = Source({}, [Item(str(i), "", "") for i in range(10)], starts)
    chunks = source.cut(size)
    assert [item for chunk in chunks for item in chunk.items] == source.items
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    for chunk in chunks:
        first, last = int(chunk.items[0].key), int(chunk.items[-1].key)
        assert len(chunk.items) <= size
        assert not any(first < start <= last for start in starts)


def test_a_chunk_knows_when_its_images_change() -> None:
    items = [Item("a", "a", "1-1"), Item("b", "b", "1-1")]
    (chunk,) = Source({}, items).cut(2)
    (same,) = Source({}, list(items)).cut(2)
    (changed,) = Source({}, [items[0], Item("b", "b", "1-2")]).cut(2)
    assert chunk.digest() == same.digest() != changed.digest()


# Folders


def test_a_folder_is_listed_with_all_below_it_but_what_is_hidden(pictures: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copy(pictures[0], folder / "TOP.JPG")
    shutil.copy(pictures[0], folder / "._c0.png")
    (folder / ".hidden").mkdir()
    shutil.copy(pictures[0], folder / ".hidden" / "a.png")
    (folder / "readme.txt").write_text("no image")
    (folder / "elsewhere").symlink_to(write_pictures(tmp_path / "more", 1)[0].parent)
    (folder / "c0" / "loop").symlink_to(folder)
    keys = [item.key for item in open_source(str(folder)).items]
    below = [path.relative_to(folder).as_posix() for path in pictures]
    assert keys == sorted(["TOP.JPG", "elsewhere/0000.png", *below])


def test_what_an_input_is_stands_in_it_or_is_asked(pictures: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    assert kind_of(str(folder)) == "folder"
    assert [kind_of("a/{00..99}.tar"), kind_of("a/*.tar"), kind_of("list.parquet")] == [
        "webdataset",
        "webdataset",
        "parquet",
    ]
    (folder / "a.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected one kind of input .* choose one with --kind folder or webdataset"):
        open_source(str(folder))
    assert len(open_source(str(folder), "folder").items) == 20
    with pytest.raises(ValueError, match=r"expected a folder, a \.tar or a \.parquet, got the file"):
        open_source(str(pictures[0]))
    with pytest.raises(FileNotFoundError, match="found nothing"):
        open_source(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected images, \.tar shards or \.parquet files in .*, found none"):
        open_source(str(tmp_path / "empty"))


def test_a_name_that_is_not_utf_8_is_refused_by_name(pictures: list[Path], tmp_path: Path) -> None:
    try:
        shutil.copy(pictures[0], os.fsencode(tmp_path / "in") + b"/caf\xe9.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(ValueError, match=r"expected names in UTF-8 .*caf\\udce9\.png"):
        open_source(str(tmp_path / "in"))


# WebDataset


@pytest.mark.parametrize("given", ["shards", "shards/*.tar", "shards/train-{000..002}.tar"])
def test_shards_give_what_the_encoder_gives(
    engine: Path,
    shards: Path,
    pictures: list[Path],
    tmp_path: Path,
    given: str,
) -> None:
    part = embedded(engine, str(tmp_path / given), tmp_path / "out", "--chunk", "5")
    assert part.keys == [f"train-00{i // 8}.tar#{i // 8}/{i % 8:03d}" for i in range(20)]
    assert_encodes(engine, part, pictures)
    assert len(list((tmp_path / "out").glob("part-*"))) == 5  # 5 and 3 of 8, twice, and 4


def test_a_sample_is_read_alone(shards: Path, pictures: list[Path]) -> None:
    """An item's bytes are its picture and nothing else of the shard."""
    source = open_source(str(shards))
    for item, path in zip(source.items, pictures, strict=True):
        with open(item.path, "rb") as file:
            file.seek(item.offset)
            assert file.read(item.size) == path.read_bytes()


def test_a_sample_without_its_image_is_kept_with_its_error(
    engine: Path,
    pictures: list[Path],
    tmp_path: Path,
) -> None:
    data = pictures[0].read_bytes()
    write_shard(tmp_path / "a.tar", {"1.png": data, "2.cls": b"3", "3.png": data, "4.png": b"nothing"})
    refused = run("embed", engine, tmp_path / "a.tar", tmp_path / "out")
    assert refused.exit_code == 2 and not (tmp_path / "out").exists()
    assert "1 of 4 images can't be read, the first is a.tar#2: the sample has no image among ['cls']" in refused.output
    part = embedded(engine, tmp_path / "a.tar", tmp_path / "out", "--skip-bad")
    assert part.keys == ["a.tar#1", "a.tar#2", "a.tar#3", "a.tar#4"]
    assert [error is None for error in part.errors] == [True, False, True, False]
    np.testing.assert_array_equal(part.embeddings.plain[0], part.embeddings.plain[2])


def test_a_sample_with_two_images_is_asked_about(pictures: list[Path], tmp_path: Path) -> None:
    first, second = (path.read_bytes() for path in pictures[:2])
    write_shard(tmp_path / "a.tar", {"1.png": first, "1.webp": second})
    given = str(tmp_path / "a.tar")
    with pytest.raises(ValueError, match=r"expected one image a sample, got \['png', 'webp'\] in a\.tar#1"):
        open_source(given)
    (item,) = open_source(given, image_field=".WEBP").items
    pixels = ItemDecoder().decode([item], Geometry(64)).pixels
    np.testing.assert_array_equal(pixels, to_pixels(pictures[1], Geometry(64)))


def test_damaged_shards_are_refused_by_name(shards: Path, tmp_path: Path) -> None:
    shard = shards / "train-001.tar"
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        headers = [member.offset for member in tar]
        ends = [0, 100, *headers[1:], tar.members[-1].offset_data + 5, tar.offset]
    for end in ends:  # cut off anywhere, between two members too
        shard.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"expected a whole, uncompressed tar file at .*train-001\.tar"):
            open_source(str(shards))
    for header in headers:
        shard.write_bytes(whole[:header] + b"?" * 512 + whole[header + 512 :])
        with pytest.raises(ValueError, match=r"expected a whole, uncompressed tar file at .*train-001\.tar"):
            open_source(str(shards))
    with tarfile.open(shard, "w:gz") as tar:
        tar.add(shards / "train-000.tar", "a.png")
    with pytest.raises(ValueError, match=r"expected a whole, uncompressed tar file at .*train-001\.tar"):
        open_source(str(shards))
    picture = (shards / "train-000.tar").read_bytes()
    write_shard(shard, {"1.png": picture, "2.png": picture, "1.jpg": picture})
    with pytest.raises(ValueError, match=r"expected each image once in .*train-001\.tar#1 more than once"):
        open_source(str(shards))
    write_shard(shard, {"1.png": picture, "1.PNG": picture})
    with pytest.raises(ValueError, match=r"expected every member once in the shard .*train-001\.tar"):
        open_source(str(shards))
    with pytest.raises(FileNotFoundError, match=r"expected shards at .*train-003\.tar"):
        open_source(str(shards / "train-{000..003}.tar"))
    with pytest.raises(ValueError, match=r"expected shards on a file system, got https://host/a\.tar"):
        open_source("https://host/a.tar")


def test_a_shard_that_shrank_since_it_was_listed_is_told(shards: Path) -> None:
    item = open_source(str(shards)).items[-1]
    Path(item.path).write_bytes(b"x" * (item.offset + 10))
    (error,) = ItemDecoder().decode([item], Geometry(64)).errors
    assert isinstance(error, BadImageError)
    assert f"train-002.tar#2/003: expected {item.size} bytes of it" in str(error)


# Parquet


def test_parquet_gives_what_the_encoder_gives_and_keeps_columns(
    engine: Path,
    pictures: list[Path],
    tmp_path: Path,
) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    keys = [path.relative_to(tmp_path / "in").as_posix() for path in pictures]
    keys[4] = str(pictures[4])  # an absolute path is taken as it is
    shuffled = [(7 * i) % 20 for i in range(20)]
    table = pa.table(
        {
            "file": [keys[i] for i in shuffled],
            "label": pa.array(shuffled, pa.int16()),
            "tags": [[f"t{i}"] * (i % 3) for i in shuffled],
            "unused": shuffled,
        }
    )
    pq.write_table(table, tmp_path / "in" / "list.parquet")
    options = ("--path-column", "file", "--chunk", "6", "--format", "parquet")
    given = tmp_path / "in" / "list.parquet"
    part = embedded(engine, given, tmp_path / "out", *options, "--keep-columns", "label,tags")
    assert part.keys == sorted(keys)
    assert_encodes(engine, part, [tmp_path / "in" / key for key in part.keys])
    assert part.columns.schema.field("label").type == pa.int16()
    for key, label, tags in zip(part.keys, *part.columns.to_pydict().values(), strict=True):
        assert (keys.index(key), tags) == (label, [f"t{label}"] * (label % 3))
    refused = run("embed", engine, given, tmp_path / "out", *options, "--keep-columns", "label")
    assert refused.exit_code == 2 and "another plan, which differs in input" in refused.output


def test_a_folder_of_parquet_is_one_list(
    engine: Path,
    pictures: list[Path],
    tmp_path: Path,
) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for number, paths in enumerate((pictures[:11], pictures[11:])):
        (tmp_path / "lists" / f"part={number}").mkdir(parents=True)
        names = [os.path.relpath(path, tmp_path / "lists") for path in paths]
        pq.write_table(pa.table({"path": names}), tmp_path / "lists" / f"part={number}" / "a.parquet")
    part = embedded(engine, tmp_path / "lists", tmp_path / "out")
    assert part.keys == sorted(os.path.relpath(path, tmp_path / "lists") for path in pictures)
    assert_encodes(engine, part, pictures)


def test_missing_files_are_told_before_any_work(
    engine: Path,
    pictures: list[Path],
    tmp_path: Path,
) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    given = tmp_path / "in" / "list.parquet"
    good = pictures[0].relative_to(tmp_path / "in").as_posix()
    pq.write_table(pa.table({"path": [good, "gone.png", "c1"]}), given)
    refused = run("embed", engine, given, tmp_path / "out")
    assert refused.exit_code == 2 and not (tmp_path / "out").exists()
    assert "2 of 3 images can't be read, the first is c1: it is not a file" in refused.output
    part = embedded(engine, given, tmp_path / "out", "--skip-bad")
    assert dict(zip(part.keys, part.errors, strict=True)) == {
        good: None,
        "gone.png": "no such file",
        "c1": "it is not a file",
    }


def test_doubtful_tables_are_refused(pictures: list[Path], tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    given = tmp_path / "list.parquet"
    for columns, told in (
        ({"file": ["a"]}, r"expected columns \['path'\] in .*, found \['file'\]"),
        ({"path": ["a", "b", "a"]}, "expected each image once in .*, got a more than once"),
        ({"path": ["a", None]}, "expected a path in every row"),
        ({"path": ["a", ""]}, "expected a path in every row"),
        ({"path": [1, 2]}, "expected strings in the column path"),
        ({"path": pa.array([], pa.string())}, "expected rows in"),
    ):
        pq.write_table(pa.table(columns), given)
        with pytest.raises(ValueError, match=told):
            open_source(str(given))
    with pytest.raises(ValueError, match=r"a part's own columns, got \['error'\]"):
        check_carried(["error"], embedding_files.COLUMNS)
    given.write_bytes(b"no parquet at all")
    with pytest.raises(ValueError, match="expected a Parquet file at"):
        open_source(str(given))
