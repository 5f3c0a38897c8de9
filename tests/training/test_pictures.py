"""Training pictures in memory, in folders and in lists: rows, fingerprints, splits, and what is unreadable."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from iosr_fast.cli.train_adapter import read_data
from iosr_fast.exceptions import BadImageError
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.preprocess import to_pixels
from iosr_fast.training.pictures import FilePictures, PictureSource, Sources, TensorPictures, file_sources, split

GEOMETRY = Geometry(8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, count in (("Ärger", 5), ("blue sky", 4), ("c", 1)):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (9 + i, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "in" / name / f"{i}.png")
    return tmp_path / "in"


def opened(data: Path, workers: int = 0, share: float = 0.0, skip: bool = False, size: int = 8) -> Sources:
    return file_sources(*read_data(data), GEOMETRY, Geometry(size), share, 0, workers, skip)


def everything(source: PictureSource) -> torch.Tensor:
    return torch.cat(list(source.iterate(torch.arange(len(source.labels)), 3)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_gives_any_rows_in_batches(folder: Path, workers: int) -> None:
    source = opened(folder, workers).train
    assert isinstance(source, FilePictures)
    assert source.class_names == ["blue sky", "c", "Ärger"] and source.labels.tolist() == [0] * 4 + [1] + [2] * 5
    expected = torch.from_numpy(to_pixels(source.paths, GEOMETRY)).permute(0, 3, 1, 2)
    order = torch.randperm(10)
    state = torch.random.get_rng_state()
    for rows in (order, order[1::2], order[:0]):
        batches = list(source.iterate(rows, 4))
        assert len(batches) == -(-len(rows) // 4)
        for part, pixels in zip(rows.split(4), batches, strict=False):
            assert pixels.dtype == torch.uint8 and torch.equal(pixels, expected[part])
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is the training's"


def write_list(folder: Path, *lines: str) -> Path:
    (folder / "list.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "list.csv"


def test_a_list_is_relative_to_its_folder_and_may_have_no_labels(folder: Path) -> None:
    source = opened(write_list(folder, "label,path,more", "b,c/0.png,x", "a,blue sky/1.png,")).train
    assert source.class_names == ["a", "b"] and source.labels.tolist() == [1, 0]
    assert everything(source).shape == (2, 3, 8, 8)
    assert opened(write_list(folder, "path", "c/0.png", "blue sky/1.png")).train.class_names == ["unlabelled"]
    with pytest.raises(ValueError, match="expected one label a picture"):
        opened(write_list(folder, "path,labels", "c/0.png,a;b"))
    with pytest.raises(ValueError, match="expected the columns path and label"):
        opened(write_list(folder, "file,label", "c/0.png,a"))


def test_missing_pictures_are_refused_or_left_out_and_reported(folder: Path) -> None:
    listed = write_list(folder, "path,label", "c/0.png,b", "no.png,c", "blue sky/1.png,a")
    with pytest.raises(FileNotFoundError, match=r"1 of 3 pictures are missing, first .*no\.png.*skip_missing"):
        opened(listed)
    sources = opened(listed, skip=True)
    assert sources.train.class_names == ["a", "b"] and "skipped 1 pictures" in sources.notes[0]
    with pytest.raises(FileNotFoundError, match="2 of 2 pictures are missing"):
        opened(write_list(folder, "path,label", "no.png,a", "nor.png,b"), skip=True)


def test_fingerprint_of_files_changes_with_what_is_in_them(folder: Path) -> None:
    first = opened(folder).train.fingerprint
    assert opened(folder, workers=2).train.fingerprint == first
    moved = folder.rename(folder.with_name("moved"))
    source = opened(moved).train
    assert isinstance(source, FilePictures) and source.fingerprint == first, "copies that keep times are the same"
    prints = [first, FilePictures(source.paths, source.labels, source.class_names, Geometry(9)).fingerprint]
    prints.append(FilePictures(source.paths, source.labels.flip(0), source.class_names, GEOMETRY).fingerprint)
    picture = moved / "c" / "0.png"
    Image.new("RGB", (9, 9)).save(picture)
    prints.append(opened(moved).train.fingerprint)
    os.utime(picture, ns=(0, 0))
    picture.rename(moved / "c" / "1.png")
    prints.append(opened(moved).train.fingerprint)
    assert len(set(prints)) == 5


def test_fingerprint_of_tensors_is_their_content() -> None:
    images, labels, names = torch.arange(6 * 3 * 8 * 8).reshape(6, 3, 8, 8).byte(), torch.arange(6) % 2, ["a", "b"]
    others = [
        (images.flip(0), labels, names),
        (images.reshape(6, 3, 4, 16), labels, names),
        (images, labels.flip(0), names),
        (images, labels, ["ab", ""]),
    ]
    prints = {TensorPictures(*each).fingerprint for each in ((images, labels, names), *others)}
    assert len(prints) == 5 and TensorPictures(images.clone(), labels.clone(), names).fingerprint in prints


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_picture_is_named_from_a_worker_too(folder: Path, workers: int) -> None:
    bad = folder / "Ärger" / "2.png"
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(BadImageError) as caught:
        everything(opened(folder, workers).train)
    assert caught.value.path == bad and str(bad) in str(caught.value)


def test_held_out_pictures_have_the_encoders_size_and_are_not_trained_on(folder: Path) -> None:
    sources = opened(folder, share=0.4, size=9)
    train, held_out = sources.train, sources.held_out
    assert isinstance(train, FilePictures) and isinstance(held_out, FilePictures)
    assert not {*train.paths} & {*held_out.paths}
    assert everything(held_out).shape[-1] == 9 and everything(train).shape[-1] == 8
    for place in sorted((folder / "Ärger").iterdir())[:2]:
        place.unlink()
    few = opened(folder, share=0.4)
    assert few.held_out is None and "fewer than two classes have at least four" in few.notes[0]
    assert len(few.train.labels) == 8


def test_a_split_holds_out_a_share_of_every_class() -> None:
    labels = torch.tensor([0] * 4 + [1] + [2] * 5)
    train, held = split(labels, 0.4, seed=0)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(10))
    assert labels[held].bincount(minlength=3).tolist() == [2, 0, 2]
    assert torch.equal(held, split(labels, 0.4, seed=0)[1])
    assert any(not torch.equal(held, split(labels, 0.4, seed=seed)[1]) for seed in range(1, 5))
    assert labels[split(labels, 0.001, seed=0)[1]].bincount(minlength=3).tolist() == [2, 0, 2], "at least two"
    assert labels[split(labels, 0.999, seed=0)[0]].bincount(minlength=3).tolist() == [2, 1, 3], "at most half"
