"""tools/embed.py in one process: what its parts hold, and that a run may be stopped anywhere and loses nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import ROOT

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("open_clip")

import typer
from PIL import Image
from typer.testing import CliRunner, Result

from iosr_fast.clip.demo.pictures import load_pictures
from iosr_fast.encoders.encoder import Embeddings, Encoder
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.images.preprocess import to_pixels
from iosr_fast.pipeline.embedding_files import Part, iterate_parts, read_embeddings, read_part
from iosr_fast.utils.manifest import read_manifest
from tests.state.manifests import rewrite_manifest
from tools import embed
from tools.embedding import plan as plans

FORMATS = ["safetensors", "parquet"]


@pytest.fixture(scope="session")
def engine(demo_cache: Path) -> Path:
    """The demo's engine, built once for all files of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IOSR_FAST_CACHE", str(demo_cache))
        return embed.find_engine("demo")


@cache
def load_images() -> np.ndarray:
    return load_pictures("held-out").images


def write_pictures(folder: Path, n: int) -> list[Path]:
    """n of the demo's pictures as files of two sizes in sub-folders; their paths, sorted by key."""
    pictures = load_images()[:n]
    paths = [folder / f"c{i % 3}" / f"{i:04d}.png" for i in range(n)]
    for i, (path, picture) in enumerate(zip(paths, pictures, strict=True)):
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(picture)
        (image.resize((90, 70)) if i % 5 == 0 else image).save(path)
    return sorted(paths, key=lambda path: path.relative_to(folder).as_posix())


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    return write_pictures(tmp_path / "in", 30)


def run(engine: Path, given: Path | str, out: Path, *options: str) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(embed.main)
    words = ["--engine", str(engine), "--input", str(given), "--out", str(out), "--threads", "1", *options]
    return CliRunner().invoke(app, words)


def embedded(engine: Path, given: Path | str, out: Path, *options: str) -> Part:
    """What a run that must go well has written."""
    done = run(engine, given, out, *options)
    assert done.exit_code == 0, done.output
    return read_embeddings(out)


def assert_encodes(engine: Path, part: Part, paths: Sequence[Path], atol: float = 1e-6) -> None:
    encoder = open_engine(engine, threads=1)
    expected = encoder.encode(to_pixels(paths, encoder.image_size))
    np.testing.assert_allclose(part.embeddings.plain, expected.plain, rtol=0, atol=atol)
    np.testing.assert_allclose(part.embeddings.adapted, expected.adapted, rtol=0, atol=atol)
    assert part.errors == [None] * len(paths)


def part_bytes(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("part-*"))}


def logged(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / plans.LOG).read_text().splitlines()]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("file_format", FORMATS)
def test_a_folder_gives_what_the_encoder_gives(
    engine: Path, pictures: list[Path], tmp_path: Path, file_format: str, dtype: str
) -> None:
    if file_format == "parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / "out"
    options = ("--format", file_format, "--dtype", dtype, "--chunk", "8", "--batch", "3")
    part = embedded(engine, tmp_path / "in", out, *options)
    assert part.keys == [path.relative_to(tmp_path / "in").as_posix() for path in pictures]
    assert str(part.embeddings.plain.dtype) == str(part.embeddings.adapted.dtype) == dtype
    assert_encodes(engine, part, pictures, 1e-6 if dtype == "float32" else 1e-3)
    assert [len(one.keys) for one in iterate_parts(out)] == [8, 8, 8, 6]
    manifest = read_manifest(out, "embeddings")
    assert (manifest["images"], manifest["embedded"], manifest["errors"]) == (30, 30, 0)
    assert manifest["engine"] == read_manifest(engine, "engine")["fingerprint"]
    assert {name.split(".")[0] for name in manifest["files"]} == {f"part-0000{i}" for i in range(4)} | {"plan", "log"}


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_same_plan_gives_the_same_bytes(
    engine: Path, pictures: list[Path], tmp_path: Path, file_format: str
) -> None:
    if file_format == "parquet":
        pytest.importorskip("pyarrow")
    for name, threads in (("one", "1"), ("two", "2")):
        embedded(
            engine, tmp_path / "in", tmp_path / name, "--format", file_format, "--chunk", "7", "--threads", threads
        )
    assert len(part_bytes(tmp_path / "one")) == 5
    assert part_bytes(tmp_path / "one") == part_bytes(tmp_path / "two")


@pytest.mark.parametrize("file_format", FORMATS)
def test_missing_damaged_and_foreign_parts_are_computed_again(
    engine: Path, pictures: list[Path], tmp_path: Path, file_format: str
) -> None:
    if file_format == "parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / "out"
    options = ("--format", file_format, "--chunk", "4")
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
    again = run(engine, tmp_path / "in", out, *options)
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
    again = run(engine, tmp_path / "in", out, "--chunk", "10")
    assert again.exit_code == 0 and "all 3 parts are there" in again.output
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == before


@pytest.mark.parametrize("damage", ["cut", "log"])
def test_a_manifest_that_a_kill_left_half_is_written_again(
    engine: Path, pictures: list[Path], tmp_path: Path, damage: str
) -> None:
    out = tmp_path / "out"
    embedded(engine, tmp_path / "in", out, "--chunk", "10")
    whole = (out / "manifest.json").read_bytes()
    if damage == "cut":
        (out / "manifest.json").write_bytes(whole[:100])
    else:
        log = (out / plans.LOG).read_text()
        (out / plans.LOG).write_text(log[:-3])
    again = run(engine, tmp_path / "in", out, "--chunk", "10")
    assert again.exit_code == 0 and "manifest.json is written again: " in again.output, again.output
    assert damage == "log" or (out / "manifest.json").read_bytes() == whole
    assert len(read_embeddings(out).keys) == len(pictures)


def test_a_killed_run_goes_on_and_embeds_every_image_once(engine: Path, tmp_path: Path) -> None:
    given, out, whole = tmp_path / "in", tmp_path / "out", tmp_path / "whole"
    paths = write_pictures(given, 400)
    options = ("--chunk", "10", "--batch", "10")
    embedded(engine, given, whole, *options)
    words = ["--engine", str(engine), "--input", str(given), "--out", str(out), "--threads", "1", *options]
    process = subprocess.Popen([sys.executable, str(ROOT / "tools" / "embed.py"), *words], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while len(list(out.glob("part-*"))) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = part_bytes(out)
    assert 3 <= len(kept) < 40, "the run was to be killed in its middle"
    assert process.returncode == -signal.SIGKILL and not (out / "manifest.json").exists()
    written = {name: (out / name).stat().st_mtime_ns for name in kept}
    (out / ".part-00039.safetensors.0123.tmp").write_bytes(b"half a par")  # as a kill while writing leaves it
    part = embedded(engine, given, out, *options)
    assert part.keys == [path.relative_to(given).as_posix() for path in paths]
    assert part_bytes(out) == part_bytes(whole)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == written, "finished parts were to be kept"
    assert not list(out.glob(".*"))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (("--chunk", "9"), "chunk (there 10, now 9)"),
        (("--batch", "2"), "batch (there 64, now 2)"),
        (("--dtype", "float16"), "dtype (there float32, now float16)"),
    ],
)
def test_another_plan_is_refused(
    engine: Path, pictures: list[Path], tmp_path: Path, changed: tuple[str, ...], named: str
) -> None:
    out = tmp_path / "out"
    embedded(engine, tmp_path / "in", out, "--chunk", "10")
    before = part_bytes(out)
    refused = run(engine, tmp_path / "in", out, "--chunk", "10", *changed)
    assert refused.exit_code == 2
    assert "another plan" in refused.output and named in refused.output
    assert part_bytes(out) == before
    assert len(read_embeddings(out).keys) == 30


def test_another_input_or_engine_is_refused(engine: Path, pictures: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    embedded(engine, tmp_path / "in", out)
    Image.new("RGB", (64, 64)).save(tmp_path / "in" / "one-more.png")
    refused = run(engine, tmp_path / "in", out)
    assert refused.exit_code == 2 and "images (there 30, now 31)" in refused.output
    (tmp_path / "in" / "one-more.png").unlink()
    other = Path(shutil.copytree(engine, tmp_path / "engine"))
    manifest = json.loads((other / "manifest.json").read_text())
    rewrite_manifest(other, fingerprint="0" * 64)
    refused = run(other, tmp_path / "in", out)
    assert refused.exit_code == 2 and f"engine (there {manifest['fingerprint']}, now {'0' * 64})" in refused.output


def test_a_part_whose_image_was_changed_is_computed_again(engine: Path, pictures: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    embedded(engine, tmp_path / "in", out, "--chunk", "10")
    shutil.copy(pictures[0], pictures[12])
    again = run(engine, tmp_path / "in", out, "--chunk", "10")
    assert "part-00001.safetensors is computed again: its images have changed since" in again.output
    assert [entry["part"] for entry in logged(out)[3:]] == ["part-00001.safetensors"]
    part = read_embeddings(out)
    np.testing.assert_array_equal(part.embeddings.plain[12], part.embeddings.plain[0])


def test_an_engine_without_adapter_gives_plain_embeddings(
    engine: Path, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plain(Encoder):
        """The demo's engine less its adapted output."""

        runtime, adapted = "onnxruntime", False

        def encode(self, pixels: np.ndarray) -> Embeddings:
            return Embeddings(open_engine(engine, threads=1).encode(pixels).plain)

    other = Path(shutil.copytree(engine, tmp_path / "engine"))
    manifest = rewrite_manifest(other, first_adapted_block=None)
    monkeypatch.setattr(embed, "open_engine", lambda *args, **kwargs: Plain())
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
