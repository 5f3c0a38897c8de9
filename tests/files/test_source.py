"""The images of a run: folders, files and CSV files, and how they are cut into chunks."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from PIL import Image

from iosr_fast.exceptions import IosrFastError
from iosr_fast.files.source import read_source
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.preprocess import decode_batch
from tests.files.runs import write_pictures


def test_files_folders_and_csv_files_are_listed_in_their_order(tmp_path: Path) -> None:
    paths = [str(path) for path in write_pictures(tmp_path / "in", 5)]
    (tmp_path / "list.csv").write_text("path,label\nin/c0/0003.png,x\n'=a.png,\n,y\n")
    (tmp_path / "=a.png").touch()
    source = read_source([paths[4], str(tmp_path / "in"), str(tmp_path / "list.csv")])
    assert source.paths == [paths[4], *paths, str(tmp_path / "in/c0/0003.png"), str(tmp_path / "=a.png")]
    assert source.keys == source.paths


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (["nowhere.png", "empty", "gone"], "expected files, found none at 'nowhere.png', 'gone': correct the paths"),
        (["list.csv"], "expected files, found none at 'gone.png', 'empty': "),
        (["empty"], "expected images, found none in 'empty'"),
        (["other.csv"], "expected the column path in other.csv, got name; add path"),
        (["https://a.org/b.jpg"], "got the URL https://a.org/b.jpg: download it first"),
    ],
)
def test_places_without_images_are_refused(
    places: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("other.csv").write_text("name\na.png\n")
    Path("list.csv").write_text("path\nlist.csv\ngone.png\nempty\n")
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        read_source(places)


def test_missing_files_are_rows_where_bad_ones_are_left_out(tmp_path: Path) -> None:
    (listed := tmp_path / "list.csv").write_text("path\ngone.png\n")
    gone, nowhere = str(tmp_path / "gone.png"), str(tmp_path / "nowhere")
    assert read_source([str(listed), nowhere], skip_bad=True).paths == [gone, nowhere]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_source([nowhere], skip_bad=True)


def test_a_name_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(ValueError, match=r"expected file names in UTF-8, got .*caf\\udce9\.png"):
        read_source([str(tmp_path)])
    os.rename(os.fsencode(tmp_path) + b"/caf\xe9.png", tmp_path / "caf\u00e9.png")
    assert read_source([str(tmp_path)], relative=True).keys == ["caf\u00e9.png"]


def test_boxes_are_columns_or_fragments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (9, 9)).save("a.png")
    listed, columns = Path("list.csv"), "path,x,y,width,height\na.png,,,,\n"
    listed.write_text(columns + 'a.png,1,2,3,4\na.png,0.5,0,.5,1\n"a.png#xywh=1,1,2,2",,,,\n')
    texts = ["a.png", "a.png#xywh=1,2,3,4", "a.png#xywh=percent:50,0,50,100", "a.png#xywh=1,1,2,2"]
    source = read_source(["list.csv", texts[1]])
    assert source.keys == source.paths == [*texts, texts[1]]
    (chunk,) = read_source([texts[1]]).cut(9)
    before = chunk.digest()
    Image.new("RGB", (9, 19)).save("a.png")
    assert chunk.digest() != before
    with pytest.raises(FileNotFoundError, match=r"found none at 'b\.png': "):  # once
        read_source(["b.png#xywh=1,2,3,4", "b.png#xywh=5,2,3,4"])
    listed.write_text("path,width,height\na.png,9,9\n")  # of the picture
    assert read_source(["list.csv"]).paths == ["a.png"]
    listed.write_text("path,x,y,width\na.png,1,2,3\n")
    with pytest.raises(IosrFastError, match=r"columns x, y, width and height of boxes in list\.csv, got no height"):
        read_source(["list.csv"])
    for row, message in {
        "a.png,1,2,3,nan": "expected a box x, y, width, height",
        "a.png,1,,3,4": "expected a box x, y, width, height",
        '"a.png#xywh=1,2,3,4",1,2,3,4': "expected a box in columns or in the path, got both",
        '"a.png#xywh=1,2,3",,,,': "expected #xywh=x,y,width,height of numbers",
    }.items():
        listed.write_text(columns + row)
        with pytest.raises(IosrFastError, match=rf"row 3 of list\.csv: {message}"):
            read_source(["list.csv"])
        paths = read_source(["list.csv"], skip_bad=True).paths
        assert [error is None for error in decode_batch(paths, Geometry(4)).errors] == [True, False]
