"""tools/reproduction: what a key depends on, how problems are drawn, and what is compared with published figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.utils.temporaries import claimed
from tests.tools.test_reproduce import CLASSES, ROOT, Pictures, tiny
from tools.reproduce_paper import check_out
from tools.reproduction import cells, problems, report, run, store
from tools.reproduction.models import Model
from tools.reproduction.problems import OwnSet, pose
from tools.reproduction.run import Views, plan
from tools.reproduction.store import Store, Wanted

CLIP: Any = SimpleNamespace(name="ViT-B-16", fingerprint="clip", image_size=64, logit_scale=100.0)
GIVEN = ("ViT-B-16", "openai", None, "torch")


def model(adapter: str | None = "adapter", engine: str = "engine", **clip: Any) -> Model:
    return Model(SimpleNamespace(**{**vars(CLIP), **clip}), adapter, engine, GIVEN)


def wanted(views: int = 3, **more: Any) -> Wanted:
    given = {"data": tiny(), "split": "train", "rows": np.arange(6), "views": views, "mirror": True, "seed": 1, **more}
    return Wanted(**given)


CHANGES: dict[str, Callable[[], tuple[Model, Wanted]]] = {
    "clip": lambda: (model(fingerprint="another"), wanted()),
    "size": lambda: (model(image_size=96), wanted()),
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
    changed, asked = CHANGES[change]()
    assert Store(tmp_path, model()).keys(wanted()) == Store(tmp_path, model()).keys(wanted())
    assert Store(tmp_path, changed).keys(asked) != Store(tmp_path, model()).keys(wanted())


@pytest.mark.parametrize(("module", "name"), [(store, "VERSION"), ("tools.reproduction.models", "PRECISION")])
def test_so_are_the_format_and_the_precision(
    module: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Store(tmp_path, model()).keys(wanted())
    monkeypatch.setattr(*((f"{module}.{name}",) if isinstance(module, str) else (module, name)), "another")
    assert Store(tmp_path, model()).keys(wanted()) != before


def test_one_view_is_the_same_for_every_seed_and_views_are_the_same_for_every_adapter(tmp_path: Path) -> None:
    held = Store(tmp_path, model())
    assert held.keys(wanted(views=1, seed=1)) == held.keys(wanted(views=1, seed=2, mirror=False))
    assert wanted().generator().random() == wanted().generator().random() != wanted(seed=2).generator().random()


def test_text_embeddings_depend_on_clip_names_and_templates(tmp_path: Path) -> None:
    key = Store(tmp_path, model()).text_key(tiny())
    assert key == Store(tmp_path, model("another adapter")).text_key(replace(tiny(), fingerprint="other pictures"))
    assert key != Store(tmp_path, model(fingerprint="another")).text_key(tiny())
    for changed in (replace(tiny(), templates=("{}",)), replace(tiny(), class_names=list("abcde"))):
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
    asked = wanted(rows=np.arange(11))
    with pytest.raises(ValueError, match="killed here"):
        Store(tmp_path, model()).embeddings(asked)
    assert len(list(tmp_path.iterdir())) == 2 and Store(tmp_path, model()).missing(asked) == 3
    monkeypatch.setattr(store, "encode", lambda part, *_: Embeddings(np.full((3, 2), 7.0), np.full((3, 2), 7.0)))
    found = Store(tmp_path, model()).embeddings(asked)
    np.testing.assert_array_equal(found.plain[:, 0], [0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 7])
    np.testing.assert_array_equal(found.adapted[:, 1], [0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 7, 7, 7])


def keys_of(tmp_path: Path, problem: problems.Problem | None = None, method: str = "tip-x", **more: Any) -> set[str]:
    given = {"rows": [(method, "none")], "shots": [2], "seeds": [1], "views": Views(3), **more}
    groups = plan([problem or pose(tiny())], store=Store(tmp_path, model()), **given)
    return {cell.key for group in groups for cell in group.cells}


def relabelled(split: str) -> problems.Problem:
    data = tiny()
    held = data.splits[split]
    changed = Pictures(held.images, held.labels[::-1].copy(), held.keys)
    return pose(replace(data, splits={**data.splits, split: changed}))


def test_each_ingredient_is_in_the_key_of_a_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [
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
    for place, value in ((cells, 2), (store, 2)):
        with monkeypatch.context() as patched:
            patched.setattr(place, "VERSION", value)
            made.append(keys_of(tmp_path))
    monkeypatch.setattr(run, "package_version", lambda _: "9.9")
    made.append(keys_of(tmp_path))
    assert len(set.union(*made)) == len(made)
    assert not list(tmp_path.iterdir())  # keys are known before anything is encoded


def test_a_draw_is_balanced_and_more_shots_keep_the_images_of_fewer() -> None:
    problem = pose(tiny())
    labels = problem.source.splits["train"].labels
    for seed in (1, 2, 3):
        most = problem.support(3, seed)
        assert [labels[rows].tolist() for rows in most] == [list(range(CLASSES))] * 3
        assert len(set(np.concatenate(most))) == 3 * CLASSES
        for k in (1, 2):
            assert [a.tolist() for a in problem.support(k, seed)] == [a.tolist() for a in most[:k]]
    assert len({str(problem.support(3, seed)) for seed in range(5)}) == 5


def test_the_demo_is_drawn_as_evaluate_draws_it_and_no_support_picture_is_asked() -> None:
    from tools.evaluation.tasks import POOL, Encoded

    problem = problems.demo()
    split = problem.source.splits["test"]
    number = np.arange(len(split), dtype=np.float32)[:, None].repeat(2, 1)
    text = np.zeros((len(problem.source.class_names), 2), np.float32)
    theirs = Encoded(Embeddings(number), split.labels, text, 1.0).task(2, POOL, 7)
    ours = np.sort(np.concatenate(problem.support(2, 7)))
    np.testing.assert_array_equal(np.sort(theirs.support.embeddings.plain[:, 0]), ours)
    np.testing.assert_array_equal(theirs.queries.plain[:, 0], problem.queries(7))
    assert not set(np.concatenate(problem.support(POOL, 7))) & set(problem.queries(7)) and problem.most_shots() == POOL
    assert len(set(split.keys)) == len(split)


def without(data: OwnSet, *splits: str) -> OwnSet:
    return replace(data, splits={name: split for name, split in data.splits.items() if name not in splits})


def test_a_shifted_set_takes_its_support_from_the_classes_of_the_same_names() -> None:
    source = tiny("imagenet")
    asked = without(tiny("other"), "train", "val")
    kept = [3, 1]
    rows = np.flatnonzero(np.isin(asked.splits["test"].labels, kept))
    test = asked.splits["test"]
    few = Pictures(
        test.images[rows], np.array([kept.index(c) for c in test.labels[rows]]), [test.keys[r] for r in rows]
    )
    target = replace(asked, class_names=[source.class_names[c] for c in kept], splits={"test": few})
    problem = pose(target, source)
    assert problem.shifted and problem.classes.tolist() == kept
    np.testing.assert_array_equal(problem.labels_of(np.arange(CLASSES)), [-1, 1, -1, 0, -1])
    with pytest.raises(ValueError, match=r"every class of other among those of imagenet, got \['unicorn'\]"):
        pose(replace(target, class_names=["unicorn", source.class_names[1]]), source)
    with pytest.raises(ValueError, match="expected a split 'train' of other"):
        pose(target)


def test_classes_of_one_name_are_told_apart_by_the_folders_of_their_images() -> None:
    images = np.zeros((4, 8, 8, 3), np.uint8)
    train = Pictures(images, np.array([0, 1, 2, 2]), ["n01/a.jpg", "n02/a.jpg", "n03/a.jpg", "n03/b.jpg"])
    test = Pictures(images[:2], np.array([0, 1]), ["a/n03/x.jpg", "a/n01/y.jpg"])
    source = OwnSet("imagenet", ["missile", "cat", "missile"], ["{}"], {"train": train}, "s")
    target = OwnSet("imagenet_r", ["missile", "missile"], ["{}"], {"test": test}, "t")
    assert pose(target, source).classes.tolist() == [2, 0]
    elsewhere = Pictures(images[:2], np.array([0, 1]), ["x.jpg", "y.jpg"])
    with pytest.raises(ValueError, match="expected one class of imagenet called 'missile', got several"):
        pose(replace(target, splits={"test": elsewhere}), source)


def test_data_sets_are_opened_under_their_root_and_all_that_is_missing_is_listed(tmp_path: Path) -> None:
    """DTD as CoOp lays it out; what else is asked for is listed with where to get it, before anything is read."""
    from PIL import Image

    folder = tmp_path / "dtd"
    parts: dict[str, list[list[Any]]] = {}
    for split, held in tiny().splits.items():
        parts[split] = []
        for row, label in enumerate(held.labels.tolist()):
            place = f"class{label}/{split}{row}.jpg"
            (folder / "images" / place).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(held.images[row]).save(folder / "images" / place)
            parts[split].append([place, label, f"class {label}"])
    (folder / "split_zhou_DescribableTextures.json").write_text(json.dumps(parts))
    problem, demo = problems.open_problems(["dtd", "demo"], tmp_path)
    assert problem.name == "dtd" and problem.validated and not problem.shifted and demo.name == "demo"
    assert problem.support(3, 1)[2].shape == (CLASSES,) and problem.most_shots() == 3
    assert any("CoOp" in note for note in report._notes(problem, 1))
    for names, told in (
        (["dtd", "textures"], "expected --data out of demo, all, caltech101"),
        (["dtd", "eurosat", "imagenet_a"], "(?s)expected the data sets that were asked for:.*EuroSAT.*ImageNet-A"),
    ):
        with pytest.raises((ValueError, OSError), match=told):
            problems.open_problems(names, tmp_path)
    with pytest.raises(ValueError, match="expected --root, the folder that holds dtd"):
        problems.open_problems(["dtd"], None)


def test_a_resnet_is_encoded_by_open_clip_s_own_encoder() -> None:
    torch = pytest.importorskip("torch", reason="torch comes with the train extra")
    pytest.importorskip("open_clip", reason="open_clip comes with the train extra")
    from iosr_fast.clip.adapter import encode_plain
    from tools.reproduction.models import load_model

    made = load_model("RN50", "none", "auto")
    assert made.adapter is None and not made.encoder.adapted
    pixels = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    found = made.encoder.encode(pixels)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (made.clip.mean, made.clip.std))
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        rows = encode_plain(made.clip, (scaled - mean) / std).numpy()
    np.testing.assert_allclose(found.plain, rows / np.linalg.norm(rows, axis=1, keepdims=True), atol=1e-5)
    assert found.adapted is None and made.encoder.width == found.plain.shape[1]


KILLED = """
import os, signal
from pathlib import Path
import numpy as np
from tools.reproduction import cells, store

os.replace = os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
key = "0123456789abcdef" * 2
for write in (
    lambda: cells.write_json(Path("run.json"), {}),
    lambda: cells.write_json(Path("cells", key + ".json"), {}),
    lambda: store._write(Path("embeddings", "demo-test-" + key), "embeddings", {}, {"plain": np.zeros((1, 2))}),
):
    if os.fork() == 0:
        write()
    os.wait()
"""


def test_what_killed_runs_leave_in_out_is_removed_by_the_next_run(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", KILLED], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    of_run = list(tmp_path.glob(".run.json.*"))
    assert of_run and all(list((tmp_path / name).iterdir()) for name in ("cells", "embeddings"))
    others = [tmp_path / "embeddings" / name for name in (".editor.settings", ".cache.folders0")]
    for path in others:
        path.mkdir()
    begun = tmp_path / "begun"
    begun.mkdir()
    for path in of_run:
        path.rename(begun / path.name)

    def start() -> None:
        check_out(begun, {"views": 3})
        cells.Cells(tmp_path / "cells")
        Store(tmp_path / "embeddings", None)  # type: ignore[arg-type]  # nothing is encoded

    with claimed(tmp_path / "cells" / f"{'0' * 32}.json") as written:
        written.write_text("{")
        start()
        assert written.is_file(), "a second run is at it"
        written.unlink()
    assert [path.name for path in begun.iterdir()] == ["run.json"] and not list((tmp_path / "cells").iterdir())
    assert sorted((tmp_path / "embeddings").iterdir()) == sorted(others)
