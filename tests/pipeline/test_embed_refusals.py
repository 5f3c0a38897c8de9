"""tools/embed.py: unreadable images, and what is refused before any work."""

# ruff: noqa: F811 (the fixtures imported from tests.pipeline.test_embed are named again where they are asked for)

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iosr_fast.images.preprocess import BadImageError
from iosr_fast.pipeline.embedding_files import read_embeddings
from tests.pipeline.test_embed import (  # noqa: F401 (engine and pictures are fixtures)
    FORMATS,
    assert_encodes,
    embedded,
    engine,
    logged,
    part_bytes,
    pictures,
    run,
)
from tools.embedding import plan as plans
from tools.embedding.items import Item, load_pixels


def test_a_bad_image_stops_the_run_by_name_and_keeps_the_parts(
    engine: Path, pictures: list[Path], tmp_path: Path
) -> None:
    out, bad = tmp_path / "out", pictures[17]
    good = bad.read_bytes()
    bad.write_bytes(good[:40])
    stopped = run(engine, tmp_path / "in", out, "--chunk", "5")
    assert stopped.exit_code == 2
    assert f"can't read image {bad}: " in stopped.output and "--skip-bad" in stopped.output
    assert list(part_bytes(out)) == [f"part-0000{i}.safetensors" for i in range(3)]
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        read_embeddings(out)
    bad.write_bytes(good)  # mended: the run goes on with what was not there
    assert_encodes(engine, embedded(engine, tmp_path / "in", out, "--chunk", "5"), pictures)
    assert [entry["part"] for entry in logged(out)] == [f"part-0000{i}.safetensors" for i in range(6)]


@pytest.mark.parametrize("file_format", FORMATS)
def test_skip_bad_keeps_the_row_and_says_why(
    engine: Path, pictures: list[Path], tmp_path: Path, file_format: str
) -> None:
    out = tmp_path / "out"
    options = ("--format", file_format, "--chunk", "5")
    good = {i: pictures[i].read_bytes() for i in (3, 4, 20)}
    pictures[3].write_bytes(b"no picture")
    pictures[4].write_bytes(b"")
    pictures[20].write_bytes(good[20][: len(good[20]) // 2])
    done = run(engine, tmp_path / "in", out, *options, "--skip-bad")
    assert done.exit_code == 0 and "27 of 30 images" in done.output and "3 unread" in done.output
    part = read_embeddings(out)
    assert [i for i, error in enumerate(part.errors) if error is not None] == [3, 4, 20]
    assert "not an image of a known format" in (part.errors[3] or "")
    for array in (part.embeddings.plain, part.embeddings.adapted):
        assert np.isnan(array[[3, 4, 20]]).all() and np.isfinite(np.delete(array, [3, 4, 20], axis=0)).all()
    if file_format == "parquet":
        pq = pytest.importorskip("pyarrow.parquet")
        assert [pq.read_table(out / f"part-0000{i}.parquet")["plain"].null_count for i in range(6)] == [
            2,
            0,
            0,
            0,
            1,
            0,
        ]
    refused = run(engine, tmp_path / "in", out, *options)
    assert refused.exit_code == 2 and f"can't read image {pictures[3]}" in refused.output
    for i, data in good.items():
        pictures[i].write_bytes(data)
    before = len(logged(out))
    assert_encodes(engine, embedded(engine, tmp_path / "in", out, *options, "--skip-bad"), pictures)
    redone = [entry["part"] for entry in logged(out)[before:]]
    assert redone == [f"part-0000{i}.{file_format}" for i in (0, 4)], "only the parts that had bad images"


def test_somebody_elses_folder_and_a_second_run_are_refused(engine: Path, pictures: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    refused = run(engine, tmp_path / "in", other)
    assert refused.exit_code == 2 and "holds other things than a run's parts" in refused.output
    refused = run(engine, tmp_path / "in", tmp_path / "in" / "out")
    assert refused.exit_code == 2 and "expected --out outside the input" in refused.output
    with plans.locked(tmp_path / "out"):
        refused = run(engine, tmp_path / "in", tmp_path / "out")
        assert refused.exit_code == 2 and "another run is writing to" in refused.output
    with plans.locked(tmp_path / "out"):
        (tmp_path / "out" / plans.LOCK).unlink()
        (tmp_path / "out" / plans.LOCK).write_text("the next run's")
    assert (tmp_path / "out" / plans.LOCK).is_file(), "this run's end took the next one's lock away"
    embedded(engine, tmp_path / "in", tmp_path / "out")


def test_whatever_a_decoder_raises_is_a_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow raises TypeErrors and others for some damaged TIFF files."""
    path = tmp_path / "a.tif"
    Image.new("RGB", (8, 8)).save(path)
    item = Item("a.tif", str(path), "")
    assert isinstance(load_pixels(item, 8), np.ndarray)

    def convert(*_: object) -> None:
        raise TypeError("'str' object cannot be interpreted as an integer")

    monkeypatch.setattr(Image.Image, "convert", convert)
    bad = load_pixels(item, 8)
    assert isinstance(bad, BadImageError) and "a.tif: 'str' object cannot be" in str(bad)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--chunk", "0"), "expected --chunk from 1 to 65536, got 0"),
        (("--batch", "0"), "expected --batch of at least 1, got 0"),
        (("--format", "csv"), "expected --format safetensors or parquet, got csv"),
        (("--dtype", "int8"), "expected --dtype float32 or float16, got int8"),
        (("--workers", "2"), "expected --ray with --workers"),
        (("--keep-columns", "label"), "expected --format parquet with --keep-columns"),
        (("--path-column", "file"), "expected Parquet files with --path-column"),
        (("--image-field", "jpg"), "expected WebDataset shards with --image-field"),
        (("--kind", "zip"), "expected --kind auto or one of"),
    ],
)
def test_options_that_can_not_be_are_refused_before_any_work(
    engine: Path, pictures: list[Path], tmp_path: Path, options: tuple[str, ...], told: str
) -> None:
    refused = run(engine, tmp_path / "in", tmp_path / "out", *options)
    assert refused.exit_code == 2 and told in refused.output
    assert not (tmp_path / "out").exists()
