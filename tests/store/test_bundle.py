"""Bundles: whole or not at all, every damage named, and what is loaded is what was saved, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from PIL import Image

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.head.examples import Examples
from iosr_fast.head.head import Head
from iosr_fast.methods import METHODS
from iosr_fast.methods.config import Config, Evidence
from iosr_fast.sealed.verified_folder import VerifiedFolder
from iosr_fast.store.bundle import Bundle, load, save
from iosr_fast.store.changes import RemoveClass
from iosr_fast.store.head_files import fingerprint
from tests.store.live_parts import engine_folder, pictures, small_classifier, unfitted


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return engine_folder(tmp_path / "engine")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("method", [*METHODS])
def test_a_loaded_bundle_equals_the_saved_head(
    method: str, precision: str, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, _ = pictures(np.random.default_rng(1), 7, 2)
    reducer = "centre" if "stack" not in method and method != "zero-shot" and precision == "fp32" else None
    options: dict[str, Any] = {"method": method, "alpha": None, "beta": None, "reducer": reducer}
    made = small_classifier(engine, **options, key_precision=precision)
    for changed in (False, True):
        if changed:
            made.add_class("later", images[12:])
            made.remove_examples(made.examples("motif 1")[:1])
        made.save(tmp_path / "bundle")
        with monkeypatch.context() as patch:  # int8 codes are stored, not searched again
            patch.setattr("iosr_fast.scoring.plan.int8_keys", lambda *_: pytest.fail("codes were searched"))
            loaded, head = load(tmp_path / "bundle"), made.snapshot()
        assert fingerprint(loaded.head) == fingerprint(head) and loaded.head.version == head.version
        assert loaded.head.examples.pictures == head.examples.pictures
        embeddings = made.encoder.encode(images)
        np.testing.assert_array_equal(loaded.head.score(embeddings), head.score(embeddings))
        later = RemoveClass(0).apply(loaded.head)  # and it can be changed
        assert later.score(embeddings).shape == (14, 4 + changed)


def test_bundles_and_logs_keep_paths_which_are_no_part_of_the_fingerprint(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, again = small_classifier(engine), small_classifier(engine)
    made.open_log(tmp_path / "log.db")
    for i, name in enumerate(("caf\u00e9.png", "\udcff.png")):  # no CSV file can hold the second
        Image.fromarray(pictures(np.random.default_rng(9 + i), 1, 1)[0][0]).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for image in (Path("caf\u00e9.png"), "\udcff.png"):
        made.add_examples("motif 0", image)
    made.remove_examples(["e3"])
    made.close_log()
    made.save(tmp_path / "bundle")
    again.open_log(tmp_path / "log.db")
    again.close_log()
    heads = made.snapshot(), again.snapshot(), load(tmp_path / "bundle").head
    for head in heads:
        named = zip(head.examples.ids.tolist(), head.examples.paths, strict=True)
        assert [pair for pair in named if pair[1]] == [(15, str(tmp_path / "caf\u00e9.png"))]
    without = replace(heads[0], examples=replace(heads[0].examples, paths=()))
    assert len({*map(fingerprint, (*heads, without))}) == 1


def test_groups_are_kept_and_images_that_are_added_are_groups_of_their_own(engine: Path, tmp_path: Path) -> None:
    images, labels = pictures(np.random.default_rng(0), 4, 6)
    made = unfitted(engine, method="gda", skip_bad=True)
    made.fit([b"bad", *images], [f"motif {c}" for c in [0, *labels]], groups=[None, *np.arange(24) // 2])
    groups = np.arange(24) // 2 + 1
    assert made.support_.groups.tolist() == groups.tolist() and made.snapshot().folds.number == 3
    made.add_examples("motif 1", images[:2] // 9)
    made.remove_examples(made.examples("motif 0")[:1])
    calibration = made.calibration()  # by the folds of these groups, as that of the bundle
    made.save(tmp_path / "bundle")
    head = load(tmp_path / "bundle").head
    assert head.support.groups.tolist() == [*groups[1:12], 13, 14, *groups[12:]]
    assert fingerprint(head) == fingerprint(made.snapshot())
    assert str(head.judged.reliability) == str(calibration)
    new, labels = pictures(np.random.default_rng(1), 4, 10)
    made.calibrate_on(new, [f"motif {c}" for c in labels], groups=np.arange(40) // 2)
    made.save(tmp_path / "bundle")
    counts = [one.judged.count for one in (made.snapshot(), load(tmp_path / "bundle").head)]
    assert counts[0] == counts[1] < 40, "images of a group count as one in promises, of the bundle too"


def test_every_damaged_byte_is_found_and_the_error_names_its_file(engine: Path, tmp_path: Path) -> None:
    folder, rng = tmp_path / "bundle", np.random.default_rng(0)
    small_classifier(engine, reducer="centre").save(folder)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    assert {*files} == {
        *("manifest.json", "support.safetensors", "plan.safetensors", "pictures.safetensors", "left_out.safetensors"),
        *("engine/manifest.json", "engine/encoder.onnx"),
    }
    for name, path in files.items():
        data = path.read_bytes()
        for at in rng.integers(0, len(data), 25):
            flipped = bytearray(data)
            flipped[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(flipped)
            with pytest.raises(ValueError, match=name):
                load(folder)
        path.write_bytes(data[:-1])
        with pytest.raises(ValueError, match=name):
            load(folder)
        path.unlink()
        with pytest.raises(FileNotFoundError, match=name):
            load(folder)
        path.write_bytes(data)
    load(folder)


def test_a_failed_save_keeps_the_old_bundle(engine: Path, tmp_path: Path, monkeypatch) -> None:
    made = small_classifier(engine)
    made.save(tmp_path / "bundle")
    before = fingerprint(made.snapshot())
    made.remove_class("~0")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(VerifiedFolder, "copy", full)
    with pytest.raises(OSError, match="No space left"):
        made.save(tmp_path / "bundle")
    monkeypatch.undo()
    assert fingerprint(load(tmp_path / "bundle").head) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    bundle = Bundle(made.snapshot(), load(tmp_path / "bundle").settings, tmp_path / "nowhere", "f" * 64, None)
    with pytest.raises(FileNotFoundError, match="found none at"):
        save(bundle, tmp_path / "bundle")


def test_a_fingerprint_is_that_of_earlier_versions_and_of_no_other_config() -> None:
    rows = np.eye(4, dtype=np.float32)
    examples = Examples(Embeddings(rows, rows[::-1].copy()), np.array([0, 0, 1, 1]), np.arange(4), (b"a", None) * 2)
    config = Config(method="tip-adapter", parameters={"alpha": 1.0, "beta": 5.5}, factor=0.5, key_precision="fp32")
    head = Head.first(["x", "y"], rows[:2], 20.0, examples, config)
    assert fingerprint(head) == "eea4c2174f5dd6a38381f3fc408051ac8f29f8a98a5bab94ce653295705a2ebd"
    evidence = Evidence(accuracy=0.5, scored=2, protocol="loo")  # how it is known, and not what it is
    assert fingerprint(replace(head, config=structs.replace(config, evidence=evidence))) == fingerprint(head)
    others: list[dict[str, Any]] = [{"method": "tip-adapter++"}, {"parameters": {"alpha": 1.0, "beta": 5.0}}]
    others += [{"reducer": "centre"}, {"factor": 0.25}, {"key_precision": "fp16"}, {"key_precision": None}]
    others += [{"look_alikes": False}]
    made = {fingerprint(replace(head, config=structs.replace(config, **one))) for one in others}
    assert len(made | {fingerprint(head)}) == 1 + len(others)
