"""iosr-fast embed in one process: the content of its parts, and that an interrupted run resumes and loses nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iosr_fast.encoders.encoder import Embeddings, Encoder
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.exceptions import BadImageError
from iosr_fast.files import part_folder
from iosr_fast.files import run as runs
from iosr_fast.files.embedding_files import iterate_parts, read_embeddings, read_part
from iosr_fast.images.decode import CpuDecoder
from iosr_fast.images.geometry import Geometry
from iosr_fast.utils.manifest import read_manifest
from tests.files.runs import (
    assert_encodes,
    embedded,
    kill_in_the_middle,
    logged,
    part_bytes,
    run,
    write_pictures,
)
from tests.store.manifests import rewrite_manifest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_folder_gives_what_the_encoder_gives(engine: Path, pictures: list[Path], tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "out"
    options = ("--dtype", dtype, "--chunk", "8", "--batch", "3")
    part = embedded(engine, tmp_path / "in", out, *options)
    assert part.keys == [path.relative_to(tmp_path / "in").as_posix() for path in pictures]
    assert str(part.embeddings.plain.dtype) == str(part.embeddings.adapted.dtype) == dtype
    assert_encodes(engine, part, pictures, 1e-6 if dtype == "float32" else 1e-3)
    assert [len(one.keys) for one in iterate_parts(out)] == [8, 8, 8, 6]
    manifest = read_manifest(out, "embeddings")
    assert (manifest["images"], manifest["embedded"], manifest["errors"]) == (30, 30, 0)
    assert manifest["engine"] == read_manifest(engine, "engine")["fingerprint"]
    assert {name.split(".")[0] for name in manifest["files"]} == {f"part-0000{i}" for i in range(4)} | {"plan", "log"}


def test_the_same_plan_gives_the_same_bytes(engine: Path, pictures: list[Path], tmp_path: Path) -> None:
    for name, threads in (("one", "1"), ("two", "2")):
        options = ("--chunk", "7", "--threads", threads)
        embedded(engine, tmp_path / "in", tmp_path / name, *options)
    assert len(part_bytes(tmp_path / "one")) == 5
    assert part_bytes(tmp_path / "one") == part_bytes(tmp_path / "two")


def test_missing_damaged_and_foreign_parts_are_computed_again(
    engine: Path, pictures: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("--chunk", "4")
    embedded(engine, tmp_path / "in", out, *options)
    whole = part_bytes(out)
    parts = [out / name for name in whole]
    parts[0].unlink()
    parts[1].write_bytes(whole[parts[1].name][:-100])  # cut off
    body = bytearray(whole[parts[2].name])
    body[len(body) // 2] ^= 1  # in the embeddings
    parts[2].write_bytes(body)
    shutil.copy(parts[5], parts[3])  # another part's images
    before = len(logged(out))
    again = run("embed", engine, tmp_path / "in", out, *options)
    assert again.exit_code == 0, again.output
    assert part_bytes(out) == whole
    assert [entry["part"] for entry in logged(out)[before:]] == [path.name for path in parts[:4]]
    for path in parts[1:4]:
        assert f"{path.name} is computed again: " in again.output
    assert len(read_embeddings(out).keys) == 30


def test_a_finished_run_does_nothing_when_started_again(engine: Path, pictures: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    embedded(engine, tmp_path / "in", out, "--chunk", "10")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    again = run("embed", engine, tmp_path / "in", out, "--chunk", "10")
    assert again.exit_code == 0 and "all 3 parts exist" in again.output
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == before
    whole = (out / "manifest.json").read_bytes()
    for damaged, content in (("manifest.json", whole[:100]), (part_folder.LOG, b"{")):  # as a kill leaves them
        (out / damaged).write_bytes(content)
        again = run("embed", engine, tmp_path / "in", out, "--chunk", "10")
        assert again.exit_code == 0 and "manifest.json is written again: " in again.output, again.output
        assert damaged == part_folder.LOG or (out / "manifest.json").read_bytes() == whole
        assert len(read_embeddings(out).keys) == len(pictures)


def test_a_killed_run_resumes_and_embeds_every_image_once(engine: Path, tmp_path: Path) -> None:
    given, out, whole = tmp_path / "in", tmp_path / "out", tmp_path / "whole"
    paths = write_pictures(given, 200)
    options = ("--chunk", "5", "--batch", "5")
    embedded(engine, given, whole, *options)
    kill_in_the_middle("embed", engine, given, out, 40, *options)
    written = {name: (out / name).stat().st_mtime_ns for name in part_bytes(out)}
    (out / ".part-00039.safetensors.0123.tmp").write_bytes(b"half a par")  # as a kill while writing leaves it
    part = embedded(engine, given, out, *options)
    assert part.keys == [path.relative_to(given).as_posix() for path in paths]
    assert part_bytes(out) == part_bytes(whole)
    assert {name: (out / name).stat().st_mtime_ns for name in written} == written, "finished parts were to be kept"
    assert not list(out.glob(".*"))


def test_another_plan_input_or_engine_is_refused(engine: Path, pictures: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    embedded(engine, tmp_path / "in", out, "--chunk", "10")
    before = part_bytes(out)

    def refused(model: Path, *options: str) -> str:
        done = run("embed", model, tmp_path / "in", out, *options)
        assert done.exit_code == 2 and "another plan" in done.output
        return done.output

    assert "chunk (there 10, now 9)" in refused(engine, "--chunk", "9")
    assert "batch (there 64, now 2)" in refused(engine, "--chunk", "10", "--batch", "2")
    assert "dtype (there float32, now float16)" in refused(engine, "--chunk", "10", "--dtype", "float16")
    Image.new("RGB", (64, 64)).save(tmp_path / "in" / "one-more.png")
    assert "images (there 30, now 31)" in refused(engine, "--chunk", "10")
    (tmp_path / "in" / "one-more.png").unlink()
    other = Path(shutil.copytree(engine, tmp_path / "engine"))
    manifest = json.loads((other / "manifest.json").read_text())
    rewrite_manifest(other, fingerprint="0" * 64)
    assert f"engine (there {manifest['fingerprint']}, now {'0' * 64})" in refused(other, "--chunk", "10")
    assert part_bytes(out) == before and len(read_embeddings(out).keys) == 30


def test_a_part_whose_image_was_changed_is_computed_again(engine: Path, pictures: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    embedded(engine, tmp_path / "in", out, "--chunk", "10")
    shutil.copy(pictures[0], pictures[12])
    again = run("embed", engine, tmp_path / "in", out, "--chunk", "10")
    assert "part-00001.safetensors is computed again: its images have changed since" in again.output
    assert [entry["part"] for entry in logged(out)[3:]] == ["part-00001.safetensors"]
    part = read_embeddings(out)
    np.testing.assert_array_equal(part.embeddings.plain[12], part.embeddings.plain[0])


def test_an_engine_without_adapter_gives_plain_embeddings(
    engine: Path, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plain(Encoder):
        """The demo's engine less its adapted output."""

        runtime, adapted, geometry = "onnxruntime", False, Geometry(64)

        def encode(self, pixels: np.ndarray) -> Embeddings:
            return Embeddings(open_engine(engine, threads=1).encode(pixels).plain)

    other = Path(shutil.copytree(engine, tmp_path / "engine"))
    manifest = rewrite_manifest(other, first_adapted_block=None)
    monkeypatch.setattr(runs, "open_engine", lambda *args, **kwargs: Plain())
    part = embedded(other, tmp_path / "in", tmp_path / "out")
    assert part.embeddings.adapted is None
    assert part.embeddings.plain.shape == (30, manifest["width"])
    assert read_part(tmp_path / "out" / "part-00000.safetensors").embeddings.adapted is None


def test_parts_can_be_read_by_others(engine: Path, pictures: list[Path], tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        embedded(engine, tmp_path / "in", tmp_path / "out", "--chunk", "10")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o644}


# Unreadable images and refusals


def test_a_bad_image_stops_the_run_by_name_and_keeps_the_parts(
    engine: Path, pictures: list[Path], tmp_path: Path
) -> None:
    out, bad = tmp_path / "out", pictures[17]
    good = bad.read_bytes()
    bad.write_bytes(good[:40])
    stopped = run("embed", engine, tmp_path / "in", out, "--chunk", "5")
    assert stopped.exit_code == 2
    assert f"can't read image {bad}: " in stopped.output and "--skip-bad" in stopped.output
    assert list(part_bytes(out)) == [f"part-0000{i}.safetensors" for i in range(3)]
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        read_embeddings(out)
    bad.write_bytes(good)  # mended: the run goes on with what was not there
    assert_encodes(engine, embedded(engine, tmp_path / "in", out, "--chunk", "5"), pictures)
    assert [entry["part"] for entry in logged(out)] == [f"part-0000{i}.safetensors" for i in range(6)]


def test_skip_bad_keeps_the_row_and_says_why(engine: Path, pictures: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--chunk", "5")
    good = {i: pictures[i].read_bytes() for i in (3, 4, 20)}
    pictures[3].write_bytes(b"no picture")
    pictures[4].write_bytes(b"")
    pictures[20].write_bytes(good[20][: len(good[20]) // 2])
    done = run("embed", engine, tmp_path / "in", out, *options, "--skip-bad")
    assert done.exit_code == 0 and "27 of 30 images" in done.output and "3 unread" in done.output
    part = read_embeddings(out)
    assert [i for i, error in enumerate(part.errors) if error is not None] == [3, 4, 20]
    assert "not an image of a known format" in (part.errors[3] or "")
    for array in (part.embeddings.plain, part.embeddings.adapted):
        assert np.isnan(array[[3, 4, 20]]).all() and np.isfinite(np.delete(array, [3, 4, 20], axis=0)).all()
    refused = run("embed", engine, tmp_path / "in", out, *options)
    assert refused.exit_code == 2 and f"can't read image {pictures[3]}" in refused.output
    for i, data in good.items():
        pictures[i].write_bytes(data)
    before = len(logged(out))
    assert_encodes(engine, embedded(engine, tmp_path / "in", out, *options, "--skip-bad"), pictures)
    redone = [entry["part"] for entry in logged(out)[before:]]
    assert redone == [f"part-0000{i}.safetensors" for i in (0, 4)], "only the parts that had bad images"


def test_somebody_elses_folder_and_a_second_run_are_refused(engine: Path, pictures: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    refused = run("embed", engine, tmp_path / "in", other)
    assert refused.exit_code == 2 and "holds other files than a run's parts" in refused.output
    refused = run("embed", engine, tmp_path / "in", tmp_path / "in" / "out")
    assert refused.exit_code == 2 and "expected --out outside the input" in refused.output
    with part_folder.locked(tmp_path / "out"):
        refused = run("embed", engine, tmp_path / "in", tmp_path / "out")
        assert refused.exit_code == 2 and "another run is writing to" in refused.output
    with part_folder.locked(tmp_path / "out"):
        (tmp_path / "out" / part_folder.LOCK).unlink()
        (tmp_path / "out" / part_folder.LOCK).write_text("the next run's")
    assert (tmp_path / "out" / part_folder.LOCK).is_file(), "this run's end took the next one's lock away"
    embedded(engine, tmp_path / "in", tmp_path / "out")


def test_whatever_a_decoder_raises_is_a_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow raises TypeErrors and others for some damaged TIFF files."""
    path = tmp_path / "a.tif"
    Image.new("RGB", (8, 8)).save(path)
    assert np.shape(CpuDecoder(exact=True).decode([path], Geometry(8)).pixels) == (1, 8, 8, 3)

    def convert(*_: object) -> None:
        raise TypeError("'str' object cannot be interpreted as an integer")

    monkeypatch.setattr(Image.Image, "convert", convert)
    (bad,) = CpuDecoder(exact=True).decode([path], Geometry(8)).errors
    assert isinstance(bad, BadImageError) and "a.tif: 'str' object cannot be" in str(bad)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--chunk", "0"), "expected --chunk from 1 to 65536, got 0"),
        (("--batch", "0"), "expected --batch of at least 1, got 0"),
        (("--dtype", "int8"), "'--dtype': "),
        (("--workers", "2"), "expected --workers, --gpus and --address only with --ray"),
    ],
)
def test_options_that_can_not_be_are_refused_before_any_work(
    engine: Path, pictures: list[Path], tmp_path: Path, options: tuple[str, ...], told: str
) -> None:
    refused = run("embed", engine, tmp_path / "in", tmp_path / "out", *options)
    assert refused.exit_code == 2 and told in refused.output
    assert not (tmp_path / "out").exists()
