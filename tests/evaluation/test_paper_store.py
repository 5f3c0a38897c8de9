"""iosr_fast/evaluation/paper: keys of embeddings and cells, and what is read back when they are damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch comes with the cpu extra")

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.evaluation.accuracy import Draw
from iosr_fast.evaluation.paper import cells, run, store
from iosr_fast.evaluation.paper.model import Model
from iosr_fast.evaluation.paper.problems import Problem, pose
from iosr_fast.evaluation.paper.run import Views, plan
from iosr_fast.evaluation.paper.store import Store, Wanted
from iosr_fast.images.geometry import Geometry
from iosr_fast.methods.tuning.tuned import Tuned
from tests.evaluation.paper_sets import CLASSES, Pictures, model, tiny, wanted

CHANGES: dict[str, Callable[[], tuple[Model, Wanted]]] = {
    "clip": lambda: (model(fingerprint="another"), wanted()),
    "size": lambda: (model(image_size=96), wanted()),
    "resize mode": lambda: (model(geometry=Geometry(64, "squash")), wanted()),
    "adapter": lambda: (model("another"), wanted()),
    "engine": lambda: (model(engine="another"), wanted()),
    "no adapter": lambda: (model(None), wanted()),
    "set": lambda: (model(), wanted(data=replace(tiny(), fingerprint="another"))),
    "split": lambda: (model(), wanted(split="test")),
    "rows": lambda: (model(), wanted(rows=np.array([0, 1, 2, 3, 4, 6]))),
    "order of rows": lambda: (model(), wanted(rows=np.array([1, 0, 2, 3, 4, 5]))),
    "views": lambda: (model(), wanted(views=4)),
    "one view": lambda: (model(), wanted(views=1)),
    "mirror": lambda: (model(), wanted(mirror=False)),
    "seed": lambda: (model(), wanted(seed=2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_ingredient_is_in_the_key_of_embeddings(change: str, tmp_path: Path) -> None:
    changed, images = CHANGES[change]()
    assert Store(tmp_path, model()).keys(wanted()) == Store(tmp_path, model()).keys(wanted())
    assert Store(tmp_path, changed).keys(images) != Store(tmp_path, model()).keys(wanted())


@pytest.mark.parametrize("name", ["store.VERSION", "model.PRECISION"])
def test_so_are_the_format_and_the_precision(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Store(tmp_path, model()).keys(wanted())
    monkeypatch.setattr(f"iosr_fast.evaluation.paper.{name}", "another")
    assert Store(tmp_path, model()).keys(wanted()) != before


def test_one_view_is_the_same_for_every_seed_and_views_are_the_same_for_every_adapter(tmp_path: Path) -> None:
    keys = Store(tmp_path, model()).keys
    assert keys(wanted(views=1, seed=1)) == keys(wanted(views=1, seed=2, mirror=False))
    assert wanted().generator().random() == wanted().generator().random() != wanted(seed=2).generator().random()


def test_text_embeddings_depend_on_clip_names_and_templates(tmp_path: Path) -> None:
    key = Store(tmp_path, model()).text_key(tiny())
    assert key == Store(tmp_path, model("another adapter")).text_key(replace(tiny(), fingerprint="other pictures"))
    assert key != Store(tmp_path, model(fingerprint="another")).text_key(tiny())
    for changed in (replace(tiny(), templates=["{}"]), replace(tiny(), class_names=list("abcde"))):
        assert key != Store(tmp_path, model()).text_key(changed)


def test_parts_are_written_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More images than a part holds: what an earlier part has is kept, and the whole is in order."""
    monkeypatch.setattr(store, "PART", 4)

    def encode(part: Wanted, *_: Any) -> Embeddings:
        if 9 in part.rows:
            raise ValueError("killed here")
        rows = np.repeat(part.rows[:, None], 2, axis=1).astype(np.float32)
        return Embeddings(rows, rows + 0.5)

    monkeypatch.setattr(store, "encode", encode)
    images = wanted(rows=np.arange(11))
    with pytest.raises(ValueError, match="killed here"):
        Store(tmp_path, model()).embeddings(images)
    assert len(list(tmp_path.iterdir())) == 2 and Store(tmp_path, model()).missing(images) == 3
    monkeypatch.setattr(store, "encode", lambda part, *_: Embeddings(np.full((3, 2), 7.0), np.full((3, 2), 7.0)))
    embeddings = Store(tmp_path, model()).embeddings(images)
    np.testing.assert_array_equal(embeddings.plain[:, 0], [0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 7])
    np.testing.assert_array_equal(embeddings.adapted[:, 1], [0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 7, 7, 7])


def damage_tensor(folder: Path) -> None:
    content = (folder / store.FILE).read_bytes()
    (folder / store.FILE).write_bytes(content[:-1] + bytes([content[-1] ^ 255]))


def lose_tensor(folder: Path) -> None:
    (folder / store.FILE).unlink()


def cut_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"schema": 1')


def put_another(folder: Path) -> None:
    other = next(path for path in folder.parent.iterdir() if path != folder)
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


@pytest.mark.parametrize("damage", [damage_tensor, lose_tensor, cut_manifest, put_another])
@pytest.mark.parametrize("part", ["tiny-test-*", "tiny-text-*"])
def test_damaged_embeddings_are_named_and_made_again(
    damage: Callable[[Path], None], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []

    def encode(part: Wanted, *_: Any) -> Embeddings:
        encoded.append(part.split)
        rows = np.arange(2 * len(part.rows), dtype=np.float32).reshape(-1, 2)
        return Embeddings(rows, rows + 1)

    def embed_classes(*_: Any) -> np.ndarray:
        encoded.append("text")
        return np.ones((CLASSES, 2), np.float32)

    monkeypatch.setattr(store, "encode", encode)
    monkeypatch.setattr("iosr_fast.clip.prompts.embed_classes", embed_classes)
    messages: list[str] = []
    parts = (wanted(split="test"), wanted(split="train"))

    def read() -> list[np.ndarray]:
        opened = Store(tmp_path, model(), messages.append)
        return [*(opened.embeddings(each).plain for each in parts), opened.text(tiny())]

    before = read()
    folder = next(tmp_path.glob(part))
    damage(folder)
    encoded.clear()
    for one, other in zip(read(), before, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(messages) == 1 and f"{folder.name} is damaged and is made again" in messages[0]
    assert encoded == [part.split("-")[1]]


def test_embeddings_that_can_not_be_read_for_another_reason_are_not_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.ones((6, 2), np.float32)
    monkeypatch.setattr(store, "encode", lambda *_: Embeddings(rows, rows))
    Store(tmp_path, model()).embeddings(wanted())

    def no_more_files(*_: Any) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(store, "read_manifest", no_more_files)
        with pytest.raises(OSError, match="Too many open files"):
            Store(tmp_path, model()).embeddings(wanted())
    monkeypatch.setattr(store, "encode", lambda *_: pytest.fail("encoded again"))
    assert Store(tmp_path, model()).embeddings(wanted()).plain.shape == (6, 2)


def test_what_another_run_has_removed_meanwhile_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Store(tmp_path / "embeddings", model())
    gone = tmp_path / "embeddings" / "gone"
    monkeypatch.setattr(type(gone), "exists", lambda _: True)
    assert opened._read(gone, store.KIND, {}, ("plain",), 1) is None
    folder = cells.Cells(tmp_path / "cells")
    cell = cells.Cell("tiny", "tip-x", "none", 1, 1, {})
    folder.path(cell).parent.mkdir()
    folder.path(cell).write_text("{")
    folder.report = lambda _: folder.path(cell).unlink()  # as the other does
    assert folder.read(cell) is None


def test_a_file_in_the_place_of_embeddings_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="expected a folder for embeddings, got the file"):
        Store(tmp_path / "file", model())
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{}", "[]", "5"])
def test_a_damaged_cell_is_removed_and_read_as_none(text: str, tmp_path: Path) -> None:
    messages: list[str] = []
    folder = cells.Cells(tmp_path, messages.append)
    cell = cells.Cell("tiny", "tip-x", "none", 1, 1, {})
    tuned = Tuned("tip-x", "none", {"alpha": 1.0}, float("nan"), 0, "one-shot")
    folder.write(cell, Draw(1, 0.5, 10, 5, tuned, 0.1, 1.25))
    draw = folder.read(cell)
    assert draw is not None and draw.log_loss == 1.25 and np.isnan(draw.calibration_error)
    assert draw is not None and (draw.accuracy, draw.tuned.parameters, draw.seed) == (0.5, {"alpha": 1.0}, 1)
    folder.path(cell).write_text(text)
    assert folder.read(cell) is None and not folder.path(cell).exists()
    assert len(messages) == 1 and f"cell {folder.path(cell).name} is damaged" in messages[0]


def keys_of(tmp_path: Path, problem: Problem | None = None, method: str = "tip-x", **more: Any) -> set[str]:
    arguments = {"rows": [(method, "none")], "shots": [2], "seeds": [1], "views": Views(3), **more}
    groups = plan([problem or pose(tiny())], store=Store(tmp_path, model()), **arguments)
    return {cell.key for group in groups for cell in group.cells}


def relabelled(split: str) -> Problem:
    data = tiny()
    pictures: Any = data.splits[split]
    changed = Pictures(pictures.images, pictures.labels[::-1].copy(), pictures.keys)
    return pose(replace(data, splits={**data.splits, split: changed}))


def test_each_ingredient_is_in_the_key_of_a_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [
        keys_of(tmp_path),
        keys_of(tmp_path, method="tip-x++"),
        keys_of(tmp_path, rows=[("tip-x", "centre")]),
        keys_of(tmp_path, shots=[1]),
        keys_of(tmp_path, seeds=[2]),
        keys_of(tmp_path, views=Views(4)),
        keys_of(tmp_path, views=Views(3, mirror=False)),
        keys_of(tmp_path, pose(tiny("another name"))),
        keys_of(tmp_path, pose(tiny(validation=False))),
        keys_of(tmp_path, pose(replace(tiny(), class_names=list("abcde")))),
        *(keys_of(tmp_path, relabelled(split)) for split in ("train", "val", "test")),
    ]
    for place, value in ((cells, cells.VERSION + 1), (store, store.VERSION + 1)):
        with monkeypatch.context() as patched:
            patched.setattr(place, "VERSION", value)
            keys.append(keys_of(tmp_path))
    monkeypatch.setattr(run, "package_version", lambda _: "9.9")
    keys.append(keys_of(tmp_path))
    assert len(set.union(*keys)) == len(keys)
    assert not list(tmp_path.iterdir())  # keys are known before anything is encoded
