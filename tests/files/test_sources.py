"""The images of a folder as the input of a run, and how they are cut into chunks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from iosr_fast.files.source import Item, Source
from iosr_fast.files.sources import folder_source
from tests.files.runs import write_pictures


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    return write_pictures(tmp_path / "in", 20)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10, 100])
def test_every_item_is_in_one_chunk(size: int) -> None:
    source = Source({}, [Item(str(i), "", "") for i in range(10)])
    chunks = source.cut(size)
    assert [item for chunk in chunks for item in chunk.items] == source.items
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    assert all(len(chunk.items) == size for chunk in chunks[:-1]) and len(chunks[-1].items) <= size


def test_a_chunk_knows_when_its_images_change() -> None:
    items = [Item("a", "a", "1-1"), Item("b", "b", "1-1")]
    (chunk,) = Source({}, items).cut(2)
    (same,) = Source({}, list(items)).cut(2)
    (changed,) = Source({}, [items[0], Item("b", "b", "1-2")]).cut(2)
    assert chunk.digest() == same.digest() != changed.digest()


def test_a_folder_is_listed_with_all_below_it_but_what_is_hidden(pictures: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copy(pictures[0], folder / "TOP.JPG")
    shutil.copy(pictures[0], folder / "._c0.png")
    (folder / ".hidden").mkdir()
    shutil.copy(pictures[0], folder / ".hidden" / "a.png")
    (folder / "readme.txt").write_text("no image")
    (folder / "elsewhere").symlink_to(write_pictures(tmp_path / "more", 1)[0].parent)
    (folder / "c0" / "loop").symlink_to(folder)
    keys = [item.key for item in folder_source(folder).items]
    below = [path.relative_to(folder).as_posix() for path in pictures]
    assert keys == sorted(["TOP.JPG", "elsewhere/0000.png", *below])


def test_an_input_that_is_no_folder_of_images_is_refused(pictures: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a folder of images, got the file .*; give the folder it is in"):
        folder_source(pictures[0])
    with pytest.raises(FileNotFoundError, match=r"expected a folder of images at .*nowhere, found nothing"):
        folder_source(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected images .* in .*empty, found none"):
        folder_source(tmp_path / "empty")


def test_a_name_that_is_not_utf_8_is_refused_by_name(pictures: list[Path], tmp_path: Path) -> None:
    try:
        shutil.copy(pictures[0], os.fsencode(tmp_path / "in") + b"/caf\xe9.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(ValueError, match=r"expected names in UTF-8 .*caf\\udce9\.png"):
        folder_source(tmp_path / "in")
