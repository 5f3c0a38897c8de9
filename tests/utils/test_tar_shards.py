"""Shards are read as the webdataset library reads them, and braces expand as its braceexpand does."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.tar_shards import expand_braces, read_members

MEMBERS = [
    "__about__",
    "__meta__/a.txt",
    "a/1.jpg",
    "a/1.seg.png",
    "a/1.CLS",
    "a/2.JPG",
    "a.b/1.jpg",
    "README",
    "3.txt",
]
PATTERNS = ["a.tar", "a-{000..012}.tar", "{8..11}", "{a,b}/{1..2}.tar", "x{5..5}", "{098..101}-{u,v}{,w}.tar"]


def write(path: Path, names: list[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = len(str(number))
            tar.addfile(member, io.BytesIO(str(number).encode()))
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)


def read(path: Path) -> list[dict]:
    with tarfile.open(path) as tar:
        return list(read_members(tar, lambda member: tar.extractfile(member).read()))


def test_samples_are_those_of_the_library(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="webdataset comes with the dev extra")
    write(tmp_path / "a.tar", MEMBERS)
    samples = read(tmp_path / "a.tar")
    expected = list(webdataset.tarfile_samples([{"url": str(tmp_path / "a.tar")}]))
    assert samples == [{name: value for name, value in sample.items() if name != "__url__"} for sample in expected]
    assert [sample["__key__"] for sample in samples] == ["a/1", "a/2", "a.b/1", "3"]


def test_a_file_that_occurs_twice_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", ["a.jpg", "a.JPG"])
    with pytest.raises(IosrFastError, match=r"a\.JPG occurs twice in the sample a"):
        read(tmp_path / "a.tar")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_braces_expand_as_in_bash(pattern: str) -> None:
    braceexpand = pytest.importorskip("braceexpand", reason="webdataset of the dev extra brings braceexpand")
    assert expand_braces(pattern) == list(braceexpand.braceexpand(pattern))


@pytest.mark.parametrize("pattern", ["a-{}.tar", "a-{5..3}.tar", "a-{one}.tar"])
def test_braces_without_a_meaning_are_an_error(pattern: str) -> None:
    with pytest.raises(IosrFastError, match=r"expected braces as in \{000\.\.127\} or \{a,b\}, got \{.*\} in a-"):
        expand_braces(pattern)
