"""One rule of what a folder holds: suffixes, hidden files, links, and a word about all that is left out."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import numpy as np
import pytest

from iosr_fast.images.listing import IMAGE_SUFFIXES, Skipped, list_folder, list_images
from tests.pictures import encode

PICTURE = encode(np.zeros((4, 4, 3), np.uint8))


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PICTURE)


def names(folder: Path) -> list[str]:
    return [Path(path).relative_to(folder).as_posix() for path in list_images(folder).paths]


def reasons(folder: Path) -> dict[str, int]:
    skipped = list_images(folder).skipped
    return {**skipped.reasons, **skipped.suffixes}


def test_every_image_suffix_is_listed_in_any_case(tmp_path: Path) -> None:
    given = [f"{i:02d}{suffix}" for i, suffix in enumerate(sorted(IMAGE_SUFFIXES))]
    given += [f"{i:02d}x{suffix.upper()}" for i, suffix in enumerate(sorted(IMAGE_SUFFIXES))]
    touch(tmp_path, *given, "aa.JpG", "photo.backup.jpeg")
    assert names(tmp_path) == sorted([*given, "aa.JpG", "photo.backup.jpeg"])
    assert {".jpg", ".jpe", ".jfif", ".heic", ".heif", ".avif", ".tif", ".pgm"} <= IMAGE_SUFFIXES


def test_what_is_left_out_is_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "a.png", "._a.png", ".ipynb_checkpoints/a-checkpoint.png", "Thumbs.db", "__MACOSX/a/b.png")
    touch(tmp_path, "notes.txt", "b/c.txt", "b/raw.XMP", "b/noname", "b/@eaDir/a.jpg")
    with caplog.at_level(logging.WARNING):
        listing = list_images(tmp_path)
    assert [Path(path).name for path in listing.paths] == ["a.png"]
    said = "4 not images (.txt, .xmp, no suffix), 2 hidden, 3 of the operating system"
    assert listing.skipped.summary() == said and listing.skipped.total == 9
    assert caplog.messages == [f"{tmp_path}: skipped 9 of 10 files: {said}"]
    caplog.clear()
    touch(tmp_path / "clean", "a.png")
    list_images(tmp_path / "clean")
    assert caplog.messages == [] and Skipped().summary() == ""


def test_link_loops_do_not_multiply_pictures(tmp_path: Path) -> None:
    root = tmp_path / "root"
    touch(root, "a/one.png", "b/two.png")
    for i in range(4):
        (root / "a" / f"up{i}").symlink_to(root)
        (root / "b" / f"side{i}").symlink_to(root / "a")
    (root / "a" / "self").symlink_to(".")
    (root / "a" / "parent").symlink_to("..")
    assert names(root) == ["a/one.png", "b/two.png"]
    assert reasons(root) == {"linked twice": 4, "links to a folder above": 6}
    # Two folders outside that link to one another: each is listed once.
    touch(tmp_path / "x", "x.png")
    touch(tmp_path / "y", "y.png")
    (tmp_path / "x" / "to-y").symlink_to(tmp_path / "y")
    (tmp_path / "y" / "to-x").symlink_to(tmp_path / "x")
    (root / "c").symlink_to(tmp_path / "x")
    assert names(root) == ["a/one.png", "b/two.png", "c/to-y/y.png", "c/x.png"]


def test_linked_files_and_folders_are_followed_once(tmp_path: Path) -> None:
    root, store = tmp_path / "root", tmp_path / "store"
    touch(store, "p.png", "q.png")
    (root / "z").mkdir(parents=True)
    touch(root, "z/own.png")
    (root / "a.png").symlink_to(root / "z" / "own.png")  # comes first by name, and yet the picture goes by its own
    (root / "b.png").symlink_to(store / "p.png")
    (root / "c.png").symlink_to(root / "b.png")
    (root / "linked").symlink_to(store)
    assert names(root) == ["linked/p.png", "linked/q.png", "z/own.png"]
    assert reasons(root) == {"linked twice": 3}
    (root / "linked").unlink()
    assert names(root) == ["b.png", "z/own.png"]


def test_pictures_in_a_hidden_store_are_reached_by_their_links(tmp_path: Path) -> None:
    """As git-annex, DVC and the Hugging Face cache keep files: a link with a name to one that is named by its hash."""
    touch(tmp_path, ".git/annex/objects/SHA256-1.png", "blobs/0a1b")
    (tmp_path / "cat.png").symlink_to(tmp_path / ".git/annex/objects/SHA256-1.png")
    (tmp_path / "dog.jpg").symlink_to(tmp_path / "blobs/0a1b")
    assert names(tmp_path) == ["cat.png", "dog.jpg"]


def test_broken_links_and_special_files_are_counted_and_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a.png", "folder.jpg/b.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "itself.png").symlink_to("itself.png")
    (tmp_path / "below.png").symlink_to(tmp_path / "a.png" / "x.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket.png")
        assert names(tmp_path) == ["a.png", "folder.jpg/b.png"]
        assert reasons(tmp_path) == {"broken links": 4, "not regular files": 3}


@pytest.mark.parametrize("where", ["", "cat/more"])
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "cat/a.png", "cat/more/b.png", "dog/c.png")
    scandir, locked = os.scandir, str(tmp_path / where) if where else str(tmp_path)

    def refuse(place: str) -> object:
        if str(place) == locked:
            raise PermissionError(13, "Permission denied", place)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    for listed in (list_images, list_folder):
        with pytest.raises(PermissionError, match=f"can't read {locked}: permission denied"):
            listed(tmp_path)


def test_names_that_are_not_utf8_are_listed_and_as_classes_refused(tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/cat/\xff\xe9.png"
    touch(tmp_path, "cat/a.png", "dog/b.png")
    Path(os.fsdecode(odd)).write_bytes(PICTURE)
    assert [os.fsencode(path.name) for path, _ in list_folder(tmp_path)] == [b"a.png", b"\xff\xe9.png", b"b.png"]
    os.mkdir(os.fsencode(tmp_path) + b"/\xff")
    with pytest.raises(ValueError, match=r"names in UTF-8, got '\\udcff'"):
        list_folder(tmp_path)


# Folders of classes


def test_what_lies_beside_class_folders_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "cat/a.png", "cat/notes.txt", "dog/b.png", ".hidden/c.png", "loose.jpg", "readme.md")
    touch(tmp_path, "__MACOSX/cat/._a.png", "dog/.ipynb_checkpoints/b-checkpoint.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert [(path.name, name) for path, name in list_folder(tmp_path)] == [("a.png", "cat"), ("b.png", "dog")]
    (said,) = caplog.messages
    assert said == (
        f"{tmp_path}: skipped 8 of 10 files: 2 not images (.md, .txt), 1 broken links, 2 hidden, "
        "1 links to a folder above, 1 not in a class folder, 1 of the operating system"
    )


def test_a_class_without_images_says_what_it_holds(tmp_path: Path) -> None:
    touch(tmp_path, "cat/a.png", "dog/a.txt", "dog/b.txt", "dog/.c.png")
    with pytest.raises(ValueError, match=r"dog, found none \(2 not images \(\.txt\), 1 hidden\)"):
        list_folder(tmp_path)
    (tmp_path / "eel").mkdir()
    for path in (tmp_path / "dog").iterdir():
        path.unlink()
    touch(tmp_path, "dog/a.png")
    with pytest.raises(ValueError, match=r"eel, found none \(it is empty\)"):
        list_folder(tmp_path)


@pytest.mark.parametrize(
    "given",
    [
        ["train/cat/a.png", "train/dog/b.png", "test/cat/c.png", "test/dog/d.png"],
        ["Train/cat/a.png", "Train/dog/b.png", "VAL/cat/c.png", "VAL/dog/d.png", "extra/e.png"],
        ["seg_train/seg_train/sea/a.png", "seg_test/seg_test/sea/c.png"],
        ["training_set/cats/a.png", "test_set/cats/b.png"],
        ["train2017/cat/a.png", "valid/cat/b.png", "test/1.png"],
        ["train/cat/a.png", "train/dog/b.png", "test/1.png", "test/2.png"],
        ["train/cat/a.png", "train/dog/b.png"],
        ["support/cat/a.png", "support/dog/b.png", "photos/1.png", "validation/cat/c.png"],  # as the README calls them
    ],
)
def test_a_root_of_train_and_test_is_not_two_classes(tmp_path: Path, given: list[str]) -> None:
    touch(tmp_path, *given)
    training = given[0].split("/")[0]
    with pytest.raises(ValueError, match=f"which hold class folders themselves .*: give {tmp_path / training}$"):
        list_folder(tmp_path)


@pytest.mark.parametrize(
    "given",
    [
        ["train/a.png", "test/b.png"],  # these are classes
        ["train/steam/a.png", "train/diesel/b.png", "bus/c.png", "car/d.png"],  # a class with sub-folders
        ["cat/indoor/a.png", "cat/outdoor/b.png", "dog/indoor/c.png", "dog/outdoor/d.png"],
        ["test tube/glass/a.png", "train station/north/b.png", "cup/c.png"],
    ],
)
def test_classes_that_are_called_train_or_have_sub_folders_are_classes(tmp_path: Path, given: list[str]) -> None:
    touch(tmp_path, *given)
    assert {name for _, name in list_folder(tmp_path)} == {name.split("/")[0] for name in given}
