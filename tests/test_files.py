"""Folders written whole or not at all, and what a killed process leaves of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from iosr_fast.files import new_folder, read_manifest, remove_leftovers, write_manifest

KILLED = """
import os, signal
from pathlib import Path
from iosr_fast.files import new_folder
with new_folder(Path("thing")) as made:
    (made / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def write(target: Path, content: str) -> None:
    with new_folder(target) as made:
        (made / "content").write_text(content)
        write_manifest(made, "thing", {})


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "thing"
    write(target, "one")
    with pytest.raises(RuntimeError), new_folder(target) as made:
        (made / "content").write_text("two")
        raise RuntimeError
    read_manifest(target, "thing")
    assert (target / "content").read_text() == "one" and os.listdir(tmp_path) == ["thing"]
    write(target, "three")
    read_manifest(target, "thing")
    assert (target / "content").read_text() == "three" and os.listdir(tmp_path) == ["thing"]


def test_files_can_be_read_by_whoever_can_read_the_folder(tmp_path: Path) -> None:
    with new_folder(tmp_path / "thing") as made:
        (made / "content").touch(0o600)
    assert (tmp_path / "thing").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "thing" / "content").stat().st_mode & 0o777 == 0o644


def test_what_a_kill_leaves_is_removed_once_it_is_old(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path)
    assert killed.returncode == -9
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".thing.")
    kept = [tmp_path / name for name in (".thing.old.abcdefgh", ".gitignore", "thing.json", ".x.json.abcdefgh.more")]
    for path in kept:
        path.write_text("")
    half = tmp_path / ".x.json.abcdefgh"
    half.write_text("")
    assert remove_leftovers(tmp_path) == []
    before = time.time() - 2 * 3600
    for path in (*kept, leftover, half):
        os.utime(path, (before, before))
    assert sorted(remove_leftovers(tmp_path)) == sorted([leftover, half])
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    assert remove_leftovers(tmp_path / "nowhere") == []
