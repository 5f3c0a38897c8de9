"""Folders written whole or not at all, whoever is killed or reads meanwhile; manifests in which no byte may differ."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from iosr_fast.sealed import folders
from iosr_fast.sealed.files import in_cache, new_file, remove_leftovers
from iosr_fast.sealed.folders import check_new_folder, new_folder
from iosr_fast.sealed.manifest import read_manifest, write_manifest
from iosr_fast.sealed.verified_folder import VerifiedFolder
from tests.full_disk import largest_file
from tests.store.manifests import rewrite_manifest

KILLED = """
import os, signal
from pathlib import Path
from iosr_fast.sealed.folders import new_folder
with new_folder(Path("thing")) as made:
    (made / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
# Forks a writer of "new" over "old" again and again, and kills it at its first, second, ... touch of the file system.
KILLED_ANYWHERE = """
import os, signal, sys
from pathlib import Path
from iosr_fast.sealed import folders
from iosr_fast.sealed.manifest import read_manifest, write_manifest

EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "open", "os.chmod", "os.scandir", "os.listdir"}
swap = folders.exchange

def write(content):
    with folders.new_folder("thing", "thing") as made:
        (made / "inner").mkdir()
        (made / "content").write_text(content)
        (made / "inner" / "content").write_text(content)
        write_manifest(made, "thing", {"content": content})

def exchange(*names):
    done = swap(*names)
    touch("open")
    return done

def touch(event, *_):
    global left
    if event in EVENTS:
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

folders.exchange = exchange if sys.argv[1] == "exchange" else lambda *_: False
left, found, kills = 1 << 60, set(), 0
while True:
    write("old")
    child = os.fork()
    if not child:
        left = kills
        sys.addaudithook(touch)
        write("new")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    try:
        content = read_manifest("thing", "thing")["content"]
    except FileNotFoundError as error:
        aside = str(error).partition("a killed save left it at ")[2].partition(":")[0]
        os.rename(aside, "thing")
        content = "put back " + read_manifest("thing", "thing")["content"]
    assert {path.read_text() for path in Path("thing").rglob("content")} == {content.split()[-1]}
    found.add(content)
    if not os.WIFSIGNALED(status):
        assert content == "new"
        break
    kills += 1
write("newer")
print(kills, *sorted(os.listdir()), *sorted(found))
"""


def write(target: Path, content: str) -> None:
    with new_folder(target, "thing") as made:
        (made / "content").write_text(content)
        write_manifest(made, "thing", {"content": content})


def read(target: Path) -> tuple[str, str]:
    manifest = read_manifest(target, "thing", verify=False)
    time.sleep(0.001)
    return manifest["content"], (target / "content").read_text()


@pytest.fixture(params=["exchange", "two renames"])
def renaming(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Whether names are exchanged, where this machine can, or renamed twice as elsewhere."""
    chosen: str = request.param
    (tmp_path / "one").mkdir()
    (tmp_path / "other").write_text("")
    able = folders.exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one").is_file() == able
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    if chosen == "two renames":
        monkeypatch.setattr(folders, "exchange", lambda *_: False)
    elif not able:
        pytest.skip("this file system can't exchange names")
    return chosen


@pytest.mark.usefixtures("renaming")
def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "thing"
    write(target, "one")
    with pytest.raises(RuntimeError), new_folder(target, "thing") as made:
        (made / "content").write_text("two")
        raise RuntimeError
    read_manifest(target, "thing")
    assert (target / "content").read_text() == "one" and os.listdir(tmp_path) == ["thing"]
    write(target, "three")
    read_manifest(target, "thing")
    assert (target / "content").read_text() == "three" and os.listdir(tmp_path) == ["thing"]


@pytest.mark.usefixtures("renaming")
def test_a_link_stays_a_link_and_the_folder_that_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "versions").mkdir()
    write(tmp_path / "versions" / "first", "one")
    (tmp_path / "thing").symlink_to("versions/first")
    write(tmp_path / "thing", "two")
    assert (tmp_path / "thing").is_symlink() and read(tmp_path / "versions" / "first") == ("two", "two")
    assert os.listdir(tmp_path / "versions") == ["first"]
    (tmp_path / "later").symlink_to("versions/second")
    write(tmp_path / "later", "three")
    assert (tmp_path / "later").is_symlink() and read(tmp_path / "versions" / "second") == ("three", "three")
    (tmp_path / "file").symlink_to("target")
    with new_file(tmp_path / "file") as made:
        made.write_text("four")
    assert (tmp_path / "file").is_symlink() and (tmp_path / "target").read_text() == "four"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FileExistsError, match=r"not replaced: .*Too many levels"):
        write(tmp_path / "loop", "five")


def edit_manifest(target: Path) -> None:
    path = target / "manifest.json"
    path.write_text(path.read_text().replace('"content": "one"', '"content": "two"'))


def replace_manifest(target: Path, content: str) -> None:
    (target / "manifest.json").write_text(content)


EXTENSION = '{"manifest_version": 3, "name": "a browser extension"}'
LOOKALIKE = '{"schema": 2, "kind": "thing", "files": {}, "checksum": ""}'
IN_THE_WAY: dict[str, tuple[Callable[[Path], object], str]] = {
    "file": (lambda at: (at / "notes.txt").write_text("mine"), r"other files than those of the thing, 'notes\.txt'"),
    "folder": (lambda at: (at / "empty").mkdir(), "other files than those of the thing, 'empty'"),
    "hidden file": (lambda at: (at / ".env").write_text("mine"), r"other files than those of the thing, '\.env'"),
    "link": (lambda at: (at / "data").symlink_to(at.parent), "other files than those of the thing, 'data'"),
    "damage": (lambda at: (at / "content").write_text("two"), "no complete thing .*does not match its manifest"),
    "missing file": (lambda at: (at / "content").unlink(), "no complete thing .*content is missing"),
    "edited manifest": (edit_manifest, "no complete thing .*changed by hand"),
    "another kind": (lambda at: rewrite_manifest(at, kind="another"), "expected .* to hold a thing, got a another"),
    "extension": (lambda at: replace_manifest(at, EXTENSION), "damaged or not a manifest of iosr_fast"),
    "lookalike": (lambda at: replace_manifest(at, LOOKALIKE), "no complete thing"),
    "no manifest": (lambda at: (at / "manifest.json").unlink(), "files that iosr_fast did not write, 'content'"),
}


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_a_folder_is_not_replaced_if_anything_in_it_would_be_lost(name: str, tmp_path: Path) -> None:
    target, (change, reason) = tmp_path / "target", IN_THE_WAY[name]
    write(target, "one")
    change(target)
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    for attempt in (lambda: check_new_folder(target, "thing"), lambda: write(target, "new")):
        with pytest.raises(FileExistsError, match=f"not replaced: .*{reason}.*choose another place, or remove it"):
            attempt()
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.usefixtures("renaming")
def test_a_file_that_comes_while_the_folder_is_written_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "thing"
    write(target, "one")
    with pytest.raises(FileExistsError, match=r"other files .*'notes\.txt'"), new_folder(target, "thing") as made:
        write_manifest(made, "thing", {"content": "two"})
        (target / "notes.txt").write_text("mine")
    assert read(target) == ("one", "one") and (target / "notes.txt").exists() and os.listdir(tmp_path) == ["thing"]


def test_the_current_folder_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    write(Path("."), "one")
    assert read(tmp_path / "empty") == ("one", "one") and os.listdir(tmp_path) == ["empty"]


def test_files_can_be_read_by_whoever_can_read_the_folder(tmp_path: Path) -> None:
    with new_folder(tmp_path / "thing") as made:
        (made / "content").touch(0o600)
    assert (tmp_path / "thing").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "thing" / "content").stat().st_mode & 0o777 == 0o644


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_at_any_moment_leaves_the_old_folder_or_the_new_one(renaming: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_ANYWHERE, renaming], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    kills, *found = done.stdout.split()
    assert int(kills) > 25
    assert found == ["thing", "new", "old", *(["put", "back", "old"] if renaming == "two renames" else [])]


def test_leftovers_of_a_kill_are_removed_for_their_target_only(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path)
    assert killed.returncode == -9
    (leftover,) = tmp_path.iterdir()
    assert (leftover / "new" / "half").is_file()
    remove_leftovers(tmp_path, of="another")
    assert leftover.exists()
    remove_leftovers(tmp_path, of="thing")
    assert not any(tmp_path.iterdir())
    remove_leftovers(tmp_path / "nowhere")


def test_leftovers_of_a_kill_leave_the_cache_with_the_next_file_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IOSR_FAST_CACHE", str(tmp_path))
    place = in_cache("engines", "next")
    assert subprocess.run([sys.executable, "-c", KILLED], cwd=place.parent).returncode == -9
    assert os.listdir(place.parent) != []
    assert in_cache("engines", "next") == place and os.listdir(place.parent) == []


def test_hidden_files_of_users_and_only_copies_stay(tmp_path: Path) -> None:
    for name in (".gitignore", "thing.json", ".x.json.abcdefgh.more", ".x.abcdefgh", ".file.abcdefgh.tmp"):
        (tmp_path / name).write_text("")
    (tmp_path / ".thing.abcdefgh.tmp" / "old").mkdir(parents=True)
    present = sorted(tmp_path.iterdir())
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == present
    write(tmp_path / "thing", "one")
    remove_leftovers(tmp_path)
    assert not (tmp_path / ".thing.abcdefgh.tmp").exists(), "the new folder supersedes what was set aside"


@pytest.mark.parametrize("old", [False, True])
def test_what_a_living_writer_has_not_finished_stays(old: bool, tmp_path: Path) -> None:
    target, done = tmp_path / "thing", tmp_path / "done"
    with new_folder(target, "thing") as made, new_file(done) as file:
        (made / "content").write_text("mine")
        file.unlink()
        file.write_text("mine")  # another file of the same name, as libraries write that rename by themselves
        write(target, "another's")
        with new_file(done) as other:
            other.write_text("another's")
        if old:
            for path in (made, file):
                os.utime(path, (0, 0))
        remove_leftovers(tmp_path)
        assert made.exists() and file.exists()
        write_manifest(made, "thing", {"content": "mine"})
    assert read(target) == ("mine", "mine") and done.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["done", "thing"]


def test_leftovers_go_by_age_where_folders_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    (tmp_path / ".thing.abcdefgh.tmp").mkdir()
    write(tmp_path / "thing", "one")
    assert sorted(os.listdir(tmp_path)) == [".thing.abcdefgh.tmp", "thing"]
    os.utime(tmp_path / ".thing.abcdefgh.tmp", (0, 0))
    write(tmp_path / "thing", "two")
    assert os.listdir(tmp_path) == ["thing"]


@pytest.mark.parametrize("by", ["Python", "safetensors"])
@pytest.mark.parametrize("writer", [new_file, new_folder])
def test_a_full_disk_is_told_with_the_room_that_is_left(by: str, writer: Any, tmp_path: Path) -> None:
    target = tmp_path / "thing"
    with (
        pytest.raises(OSError, match=rf"for {target}: [\d,]+ MB are free there") as error,
        largest_file(1000),
        writer(target) as made,
    ):
        file = made / "content" if made.is_dir() else made
        if by == "Python":
            file.write_bytes(bytes(2000))
        save_file({"x": np.zeros(2000)}, file)
    assert error.value.errno == errno.EFBIG and not any(tmp_path.iterdir())


def content_of(held: VerifiedFolder) -> tuple[str, str]:
    return held.manifest["content"], held.read("content").decode()


def test_an_exchanged_folder_is_never_missing(tmp_path: Path) -> None:
    target, ends, missing = tmp_path / "thing", threading.Event(), []

    def looking() -> None:
        while not ends.is_set():
            if not (target / "manifest.json").is_file():
                missing.append(time.time())

    write(target, "one")
    looker = threading.Thread(target=looking)
    looker.start()
    for number in range(25):
        write(target, str(number))
    ends.set()
    looker.join()
    assert not missing


@pytest.mark.parametrize("variable", ["IOSR_FAST_CACHE", "XDG_CACHE_HOME", "HOME"])
def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_folder(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("IOSR_FAST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(
        variable, str(tmp_path / "file" / "below")
    )  # root may write to any folder, and to none below a file
    with caplog.at_level(logging.WARNING):
        place = in_cache("engines", "one")
        assert in_cache("engines", "one") == place and in_cache() == place.parent.parent
    assert "set IOSR_FAST_CACHE to a folder that can be written" in caplog.text and len(caplog.records) == 1
    write(place, "one")
    assert read(in_cache("engines", "one")) == ("one", "one")
    assert not place.is_relative_to(tmp_path)


def test_a_cache_that_is_only_read_serves_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOSR_FAST_CACHE", str(tmp_path / "cache"))
    write(in_cache("engines", "one"), "one")

    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, "read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert in_cache("engines", "one") == tmp_path / "cache" / "engines" / "one"
    assert not in_cache("engines", "two").is_relative_to(tmp_path)
