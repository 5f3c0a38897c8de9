"""Damage that libraries pass over in silence or answer with errors of their own; what is told before work starts."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch comes with the train extra")
pytest.importorskip("webdataset", reason="webdataset comes with the train extra")

from iosr_fast.training.data import ShardPictures  # noqa: E402
from iosr_fast.training.data.evaluation_files import Content  # noqa: E402
from iosr_fast.training.data.evaluation_sets import _finish, check, describe, open_evaluation_set  # noqa: E402
from tests.training.test_data_layouts import cars, coop, dogs, in_folder  # noqa: E402
from tests.training.test_data_shards import SIZE, cls_members, write_tar  # noqa: E402


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_flipped_bit_in_a_compressed_shard_is_found(tmp_path: Path, mode: str) -> None:
    """Python's tarfile reads compressed streams without their checksum, and ends at a header that is wrong."""
    path = tmp_path / f"a.tar.{mode[2:]}"
    noise = np.random.default_rng(0).bytes(600)  # what deflate can't make smaller is stored: it decodes after a flip
    write_tar(path, [(name, data + noise if "PNG" in name else data) for name, data in cls_members(0, 12)], mode)
    good = path.read_bytes()
    assert len(ShardPictures([path], SIZE, cache=tmp_path / "cache").labels) == 12
    for position in random.Random(0).sample(range(12, len(good) - 12), 25):
        bad = bytearray(good)
        bad[position] ^= 4
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"shard .*a\.tar\.\w+ is damaged"):
            ShardPictures([path], SIZE, cache=tmp_path / "cache")


def test_other_labels_under_the_same_keys_are_noticed_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, cls_members(0, 6))
    source = ShardPictures(tmp_path, SIZE, workers=0)
    write_tar(path, cls_members(0, 6, classes=2))
    later = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))
    with pytest.raises(ValueError, match=r"a.tar no longer holds what was found"):
        list(source.iterate(torch.arange(6), 2))


def test_urls_that_end_alike_do_not_share_a_place_in_the_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name, count in (("one", 4), ("two", 5)):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "train-0000.tar", cls_members(0, count))
        # The library calls a "pipe:" by its last 128 characters.
        url = f"pipe:cat {tmp_path}/{name}/{'./' * 80}train-0000.tar"
        assert len(ShardPictures(url, SIZE, cache=cache).labels) == count
    assert len(list(cache.glob("*train-0000.tar"))) == 2


@pytest.mark.parametrize(
    ("name", "make", "file"),
    [
        ("stanford_dogs", dogs, "lists/test_list.mat"),
        ("stanford_cars", cars, "cars_test_annos_withlabels.mat"),
    ],
)
def test_whatever_is_wrong_with_a_mat_file_it_is_named(tmp_path: Path, name: str, make: object, file: str) -> None:
    made = make(tmp_path)  # type: ignore[operator]
    if make is cars:
        in_folder(tmp_path, *made)
    path = tmp_path / name / file
    good = path.read_bytes()
    assert check(tmp_path, [name]) == {name: None}
    for end in (0, 60, 127, 128, 150, len(good) - 1):
        path.write_bytes(good[:end])
        told = check(tmp_path, [name])[name]
        assert told is not None and path.name in told and "fetch it again" in told


def test_an_unknown_name_is_told_before_any_set_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    monkeypatch.setattr(
        "iosr_fast.training.data.evaluation_sets.open_evaluation_set", lambda name, root: looked.append(name)
    )
    with pytest.raises(ValueError, match="got 'dtt'"):
        check(tmp_path, ["imagenet", "dtt"])
    assert not looked


def test_labels_that_name_no_class_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"")
    dtd = describe("dtd")
    content = Content(tmp_path, ["banded", "dotted"], {"test": [("a", 0), ("b", 2)]})
    with pytest.raises(ValueError, match=r"expected labels from 0 to 1 in the split 'test' of DTD .* got 0 to 2"):
        _finish(dtd, dtd.layouts[0], content)


def test_a_changed_image_of_the_same_size_shows_in_its_time(tmp_path: Path) -> None:
    coop("eurosat", ("AnnualCrop", "Annual Crop Land", ""), ("River", "River", ""))(tmp_path)
    before = open_evaluation_set("eurosat", tmp_path)
    file = before.splits["test"].folder / before.splits["test"].keys[0]  # type: ignore[attr-defined]
    os.utime(file, ns=(1, 10**18))
    after = open_evaluation_set("eurosat", tmp_path)
    assert after.fingerprint == before.fingerprint, "which is the same for copies of the set"
    assert after.splits["test"].times[0] == 10**18 != before.splits["test"].times[0]  # type: ignore[attr-defined]
    assert after.splits["train"].times.tolist() == before.splits["train"].times.tolist()  # type: ignore[attr-defined]
