"""Folders that are held open: what was verified is what is read, links and pipes are refused, a digest pins all."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from iosr_fast.exceptions import IosrFastError
from iosr_fast.sealed.folders import exchange, new_folder
from iosr_fast.sealed.manifest import read_manifest, write_manifest
from iosr_fast.sealed.verified_folder import open_verified
from tests.sealed.test_files import content_of, write
from tests.store.manifests import rewrite_manifest


def test_what_is_held_is_read_whatever_becomes_of_its_names(tmp_path: Path) -> None:
    target = tmp_path / "thing"
    write(target, "one")
    held = open_verified(target, "thing")
    write(target, "two")
    assert content_of(held) == ("one", "one") and content_of(open_verified(target, "thing")) == ("two", "two")
    held.copy("content", tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "one"


@pytest.mark.parametrize("when", ["before it is opened", "while it is opened"])
@pytest.mark.parametrize("how", ["replaced", "removed", "rewritten"])
def test_a_file_that_changes_after_it_was_verified_is_not_opened(how: str, when: str, tmp_path: Path) -> None:
    target = tmp_path / "thing"
    write(target, "one")
    held = open_verified(target, "thing")
    held.check()
    file, seen = target / "content", []

    def change() -> None:
        facts = file.stat()
        if how != "rewritten":
            file.unlink()
        if how != "removed":
            file.write_text("two")
            os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))

    def opener(folder: Path) -> str:
        if when == "while it is opened" and not seen:
            change()
        seen.append((folder / "content").read_text())
        return seen[-1]

    time.sleep(0.02)  # clocks of file systems tick
    if when == "before it is opened":
        change()
    if how == "rewritten":
        with pytest.raises(ValueError, match=r"content in .* does not match its manifest"):
            held.open_with(opener)
    else:
        assert held.open_with(opener) == "one" and set(seen) == {"one"}


def test_libraries_get_the_open_files_without_a_copy(tmp_path: Path) -> None:
    write(tmp_path / "thing", "one")
    held = open_verified(tmp_path / "thing", "thing")
    before, file = os.stat(tmp_path / "thing" / "content"), held.files["content"]
    shutil.rmtree(tmp_path / "thing")
    assert held.open_with(lambda folder: os.path.samestat(os.stat(folder / "content"), before))
    assert os.path.samestat(os.fstat(file.descriptor), before)

    def fails(folder: Path) -> None:
        raise IosrFastError(f"can't load {folder / 'content'}")

    with pytest.raises(IosrFastError, match=rf"^can't load {tmp_path}/thing/content$"):
        held.open_with(fails)


@pytest.mark.parametrize("moment", ["manifest.json", "inner", "content"])
def test_a_folder_that_is_exchanged_while_it_is_opened_is_one_folder(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without hashes, too, no file of one folder is read beside those of another."""
    for name, content in (("thing", "one"), ("other", "two")):
        with new_folder(tmp_path / name) as made:
            (made / "inner").mkdir()
            for path in (made / "content", made / "inner" / "content"):
                path.write_text(content)
            write_manifest(made, "thing", {"content": content})
    exchanged = []
    opening = os.open

    def open_and_exchange(path: object, *words: Any, **options: Any) -> int:
        descriptor = opening(path, *words, **options)  # type: ignore[arg-type]
        if Path(str(path)).name == moment and not exchanged:
            exchanged.append(exchange(tmp_path / "thing", tmp_path / "other"))
        return descriptor

    monkeypatch.setattr(os, "open", open_and_exchange)
    held = open_verified(tmp_path / "thing", "thing", verify=False)
    assert exchanged == [True]
    assert {held.manifest["content"]} == {held.read(name).decode() for name in held.files}


@pytest.mark.parametrize("name", ["content", "inner", "inner/content", "manifest.json"])
def test_a_link_in_a_folder_is_not_followed(name: str, tmp_path: Path) -> None:
    target = tmp_path / "thing"
    with new_folder(target, "thing") as made:
        (made / "inner").mkdir()
        for path in (made / "content", made / "inner" / "content"):
            path.write_text("one")
        write_manifest(made, "thing", {})
    (target / name).rename(tmp_path / "moved")
    (target / name).symlink_to(tmp_path / "moved")
    with pytest.raises(ValueError, match=f"{name} is a link"):
        open_verified(target, "thing")
    (tmp_path / "way").symlink_to(target)
    (target / name).unlink()
    (tmp_path / "moved").rename(target / name)
    open_verified(tmp_path / "way", "thing").check()  # the folder itself may have another name


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("name", ["content", "manifest.json"])
def test_a_pipe_in_a_folder_keeps_nobody_waiting(name: str, tmp_path: Path) -> None:
    write(tmp_path / "thing", "one")
    (tmp_path / "thing" / name).unlink()
    os.mkfifo(tmp_path / "thing" / name)
    with pytest.raises(IosrFastError, match=f"expected a regular file at .*{name}"):
        open_verified(tmp_path / "thing", "thing")


def test_a_huge_manifest_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "thing", "one")
    monkeypatch.setattr("iosr_fast.sealed.manifest.LARGEST_MANIFEST", 1 << 10)
    monkeypatch.setattr("iosr_fast.sealed.verified_folder.LARGEST_MANIFEST", 1 << 10)
    rewrite_manifest(tmp_path / "thing", much="x" * 5000)
    for reading in (open_verified, read_manifest):
        with pytest.raises(ValueError, match="got a larger one"):
            reading(tmp_path / "thing", "thing")
    rewrite_manifest(tmp_path / "thing", ["much"], files={f"f{i}": {"sha256": "0" * 64, "bytes": 1} for i in range(3)})
    monkeypatch.setattr("iosr_fast.sealed.verified_folder._MOST_FILES", 2)
    with pytest.raises(ValueError, match="expected at most 2 files"):
        open_verified(tmp_path / "thing", "thing")


def test_a_digest_is_that_of_manifest_json(tmp_path: Path) -> None:
    write(tmp_path / "thing", "one")
    digest = f"sha256:{hashlib.sha256((tmp_path / 'thing' / 'manifest.json').read_bytes()).hexdigest()}"
    assert open_verified(tmp_path / "thing", "thing", expected_digest=digest).digest == digest
    write(tmp_path / "thing", "two")
    with pytest.raises(ValueError, match=f"with the digest {digest}, got sha256:"):
        open_verified(tmp_path / "thing", "thing", expected_digest=digest)
    (tmp_path / "thing" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=f"with the digest {digest}, got sha256:"):
        open_verified(tmp_path / "thing", "thing", expected_digest=digest)  # and nothing of it is parsed
    for wrong in (digest[:-1], digest.removeprefix("sha256:"), digest.upper(), "", "sha256:"):
        with pytest.raises(ValueError, match="expected a digest of the form"):
            open_verified(tmp_path / "thing", "thing", expected_digest=wrong)
    with pytest.raises(ValueError, match="not verified"):
        open_verified(tmp_path / "thing", "thing", verify=False, expected_digest=digest)
