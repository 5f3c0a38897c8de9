"""The pipeline's benchmark: its pictures, its rows, and that nothing wrong is timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("open_clip")

from iosr_fast.benchmarks import harness, pipeline  # noqa: E402
from iosr_fast.benchmarks.photographs import photograph, texture, write_photographs  # noqa: E402
from iosr_fast.encoders.runtimes.engine import ONNX_RUNTIMES, choose_runtime  # noqa: E402
from iosr_fast.images.geometry import Geometry  # noqa: E402
from tests.clip.small_clip import small_clip  # noqa: E402

PICTURES = 8


@pytest.fixture
def small(cached_exports: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "PAUSE_S", 0)
    monkeypatch.setattr(pipeline, "load_clip", lambda *_: small_clip(layers=2))
    monkeypatch.setattr(pipeline, "RIVALS_BATCH", 3)


def test_photographs_are_as_large_as_photographs_and_repeat(tmp_path: Path) -> None:
    paths = write_photographs(tmp_path / "a", 6)
    assert paths == sorted(paths)
    again = write_photographs(tmp_path / "b", 6)
    for path, other in zip(paths, again, strict=True):
        assert 30_000 < path.stat().st_size < 90_000 and path.read_bytes() == other.read_bytes()
        assert Image.open(path).size == (500, 375)
    assert len({path.read_bytes() for path in paths}) == 6
    with pytest.raises(ValueError, match="expected at most"):
        write_photographs(tmp_path / "c", 10**6)


def test_a_texture_falls_with_frequency() -> None:
    made = texture(256, 256, 1)
    assert abs(float(made.std()) - 1) < 1e-4
    power = np.abs(np.fft.fft2(made)) ** 2
    radius = np.hypot(*np.meshgrid(*[np.fft.fftfreq(256)] * 2))
    low, high = (power[(radius > r) & (radius < 1.2 * r)].mean() for r in (0.04, 0.32))
    assert 32 < low / high < 128  # 8 times the frequency, 1/64 of the power
    assert photograph(np.zeros((64, 64, 3), np.uint8), 90, 60).size == (90, 60)


@pytest.mark.slow
def test_rows(small: None) -> None:
    made = pipeline.run("Small", pictures=PICTURES, first_adapted_block=1, threads=1, repeats=1)
    ours = ["predict-folder", "predict-folder-int8", "encoder-only", "encoder-only-int8"]
    assert {row["impl"] for row in made} == {*ours, "decode-only", "obvious-script", "two-pass"} and len(made) == 7
    by_name = {row["impl"]: row for row in made}
    for name, row in by_name.items():
        assert row["precision"] == ("int8" if "int8" in name else "fp32")
        assert row.get("runtime") == (choose_runtime("auto", ONNX_RUNTIMES) if name in ours else None)
        assert row["case"] == f"small-{PICTURES}-photographs-s1" and row["images"] == PICTURES
        assert row["rate_unit"] == "images/s" and row["rate"] > 0 and row["threads"] == 1
        assert (row["share_of_ceiling"] is None) == (row["impl"] == "decode-only")
        assert (row["memory_mb"] is None) <= ("only" in row["impl"])
    assert by_name["encoder-only"]["share_of_ceiling"] == by_name["encoder-only-int8"]["share_of_ceiling"] == 1
    ratio = by_name["encoder-only-int8"]["runtime_ms"] / by_name["predict-folder-int8"]["runtime_ms"]
    assert by_name["predict-folder-int8"]["share_of_ceiling"] == pytest.approx(ratio, abs=2e-3)


@pytest.mark.slow
def test_a_wrong_candidate_is_not_timed(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(clip: Any, adapter: Any, *_: object) -> pipeline.Embed:
        embed = pipeline.eager(clip, adapter)
        return lambda pixels: tuple(reversed(embed(pixels.flip(0))))  # type: ignore[return-value]

    monkeypatch.setattr(pipeline, "compiled", swapped)
    monkeypatch.setattr(harness, "measure", lambda *_, **__: pytest.fail("timed a wrong candidate"))
    with pytest.raises(ArithmeticError, match=r"two-pass: .* of the labels are right"):
        pipeline.run("Small", pictures=PICTURES, first_adapted_block=1, threads=1, repeats=1)


def test_wrong_pixels_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_photographs(tmp_path, 3)
    pipeline.verify_pixels(paths, Geometry(64))
    monkeypatch.setattr(
        pipeline, "resize_and_crop", lambda image, geometry: np.asarray(image.resize((geometry.size, geometry.size)))
    )
    with pytest.raises(ArithmeticError, match="pixels are off by"):
        pipeline.verify_pixels(paths, Geometry(64))


@pytest.mark.parametrize("faster", ["one", "many"])
def test_the_ceiling_is_the_faster_way(faster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting:
        calls = 0

        def encode(self, pixels: np.ndarray) -> None:
            self.calls += 1

    whole, single = Counting(), Counting()
    order = iter(([5.0, 1.0], [3.0, 2.0]) if faster == "one" else ([5.0, 2.0], [3.0, 1.0]))
    monkeypatch.setattr(harness, "measure", lambda candidates, repeats: {"": next(order)})
    stage = pipeline.Stage(single, 2, 0)  # type: ignore[arg-type]
    pipeline.encoder_only(stage, whole, [np.zeros(1)] * 7)()
    assert (whole.calls, single.calls) == ((7, 0) if faster == "one" else (0, 7))
