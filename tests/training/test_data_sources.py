"""Training pictures in memory and in folders: order, fingerprints, parts, and what is unreadable."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="torch comes with the cpu extra")

from iosr_fast.exceptions import BadImageError  # noqa: E402
from iosr_fast.images.geometry import Geometry  # noqa: E402
from iosr_fast.images.preprocess import to_pixels  # noqa: E402
from iosr_fast.training.data import (  # noqa: E402
    FolderPictures,
    PictureSource,
    SubsetPictures,
    TensorPictures,
    split,
)

SIZE = 8
GEOMETRY = Geometry(SIZE)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, count in (("Ärger", 5), ("blue sky", 4), ("c", 1)):
        (tmp_path / name).mkdir()
        for i in range(count):
            pixels = rng.integers(0, 256, (9 + i, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    return tmp_path


def everything(source: PictureSource) -> torch.Tensor:
    return torch.cat([pixels for _, pixels in source.iterate(torch.arange(len(source.labels)), 3)])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_gives_the_rows_asked_for_in_their_order(folder: Path, workers: int) -> None:
    source = FolderPictures(folder, GEOMETRY, workers)
    expected = torch.from_numpy(to_pixels(source.paths, GEOMETRY)).permute(0, 3, 1, 2)
    order = source.order(seeded(1))
    assert sorted(order.tolist()) == list(range(10)) and order.dtype == torch.int64
    assert torch.equal(order, source.order(seeded(1))) and not torch.equal(order, source.order(seeded(2)))
    state = torch.random.get_rng_state()
    for part in (order, order[1::2], order[7:], order[:0]):
        batches = list(source.iterate(part, 4))
        assert [rows.tolist() for rows, _ in batches] == [rows.tolist() for rows in part.split(4) if len(rows)]
        for rows, pixels in batches:
            assert pixels.dtype == torch.uint8 and torch.equal(pixels, expected[rows])
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is the training's"


def test_the_classes_are_the_sub_folders(folder: Path) -> None:
    source = FolderPictures(folder, GEOMETRY, 0)
    assert source.class_names == ["blue sky", "c", "Ärger"]
    assert source.labels.tolist() == [0] * 4 + [1] + [2] * 5 and source.labels.dtype == torch.int64


def test_fingerprint_of_a_folder_changes_with_what_is_in_it(folder: Path) -> None:
    first = FolderPictures(folder, GEOMETRY, 0).fingerprint
    assert FolderPictures(folder, GEOMETRY, 2).fingerprint == first
    moved = folder.parent / f"{folder.name}-moved"
    folder.rename(moved)
    assert FolderPictures(moved, GEOMETRY, 0).fingerprint == first
    assert FolderPictures(moved, Geometry(SIZE + 1), 0).fingerprint != first
    picture = moved / "c" / "0.png"
    Image.new("RGB", (9, 9)).save(picture)
    second = FolderPictures(moved, GEOMETRY, 0).fingerprint
    os.utime(picture, ns=(0, 0))
    picture.rename(moved / "c" / "1.png")
    assert len({first, second, FolderPictures(moved, GEOMETRY, 0).fingerprint}) == 3


def test_fingerprint_of_tensors_is_their_content() -> None:
    images = torch.randint(0, 255, (6, 3, SIZE, SIZE), dtype=torch.uint8)
    labels = torch.arange(6) % 2
    first = TensorPictures(images, labels, ["a", "b"]).fingerprint
    assert TensorPictures(images.clone(), labels.clone(), ["a", "b"]).fingerprint == first
    changed = images.clone()
    changed[5, 2, 7, 7] += 1
    others = [
        TensorPictures(changed, labels, ["a", "b"]),
        TensorPictures(images.flip(0), labels, ["a", "b"]),
        TensorPictures(images, labels.flip(0), ["a", "b"]),
        TensorPictures(images, labels, ["ab", ""]),
        TensorPictures(images.reshape(6, 3, 4, 16), labels, ["a", "b"]),
    ]
    assert len({first, *(other.fingerprint for other in others)}) == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_picture_is_named_from_a_worker_too(folder: Path, workers: int) -> None:
    bad = folder / "Ärger" / "2.png"
    bad.write_bytes(bad.read_bytes()[:40])
    source = FolderPictures(folder, GEOMETRY, workers)
    with pytest.raises(BadImageError) as caught:
        everything(source)
    assert caught.value.path == bad and str(bad) in str(caught.value)


def test_a_subset_is_a_source_of_its_own(folder: Path) -> None:
    whole = FolderPictures(folder, GEOMETRY, 0)
    rows = torch.tensor([7, 0, 3])
    part = SubsetPictures(whole, rows)
    assert part.labels.tolist() == [2, 0, 0] and part.class_names == whole.class_names
    assert torch.equal(everything(part), everything(whole)[rows])
    order = part.order(seeded(3))
    assert sorted(order.tolist()) == [0, 1, 2] and torch.equal(order, part.order(seeded(3)))
    assert rows[order].tolist() == [row for row in whole.order(seeded(3)).tolist() if row in {7, 0, 3}]
    (got, pixels), *_ = part.iterate(order, 3)
    assert torch.equal(got, order) and torch.equal(pixels, everything(part)[order])
    assert len({whole.fingerprint, part.fingerprint, SubsetPictures(whole, rows.flip(0)).fingerprint}) == 3
    for wrong in (torch.tensor([1, 1]), torch.tensor([-1]), torch.tensor([10])):
        with pytest.raises(ValueError, match=r"expected (each row once|rows from 0 to 9)"):
            SubsetPictures(whole, wrong)


def test_a_split_holds_out_a_share_of_every_class(folder: Path) -> None:
    source = FolderPictures(folder, GEOMETRY, 0)
    train, held = split(source, 0.4, seed=0)
    assert sorted([*train.rows.tolist(), *held.rows.tolist()]) == list(range(10))
    assert held.labels.bincount(minlength=3).tolist() == [2, 0, 2]
    assert torch.equal(held.rows, split(source, 0.4, seed=0)[1].rows)
    assert any(not torch.equal(held.rows, split(source, 0.4, seed=seed)[1].rows) for seed in range(1, 5))
    sizes = source.labels.bincount(minlength=3)
    assert split(source, 0.001, seed=0)[1].labels.bincount(minlength=3).tolist() == [2, 0, 2], "at least two"
    halves = [int(size) - int(size) // 2 if size >= 4 else int(size) for size in sizes]
    assert split(source, 0.999, seed=0)[0].labels.bincount(minlength=3).tolist() == halves, "at most half"
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="expected a share between 0 and 1"):
            split(source, share, 0)
