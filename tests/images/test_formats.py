"""A fixed list of formats, each picture upright: EXIF orientation, first frames, AVIF and HEIC."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, TiffImagePlugin, features

from iosr_fast.exceptions import BadImageError
from iosr_fast.images import pixels
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.preprocess import decode_pixels, open_image, resize_and_crop
from tests.pictures import encode

ORIENTATIONS = range(1, 9)


def rgb(source: Any, **options: Any) -> np.ndarray:
    return np.asarray(open_image(source, **options))


def upright(width: int = 48, height: int = 32) -> np.ndarray:
    """Red, green, blue and white quarters: no turn and no mirror leaves them as they are."""
    made = np.zeros((height, width, 3), np.uint8)
    made[: height // 2, : width // 2, 0] = made[: height // 2, width // 2 :, 1] = 255
    made[height // 2 :, : width // 2, 2] = made[height // 2 :, width // 2 :] = 255
    return made


def stored(image: np.ndarray, orientation: int) -> np.ndarray:
    """An upright picture as a file with this EXIF orientation stores it: EXIF says where its row and column 0 are."""
    ways: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a[:, ::-1].transpose(1, 0, 2),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: a[::-1].transpose(1, 0, 2),
    }
    return np.ascontiguousarray(ways[orientation](image))


def oriented(kind: str, image: np.ndarray, orientation: int, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    if kind == "TIFF":
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[0x0112] = orientation
        return encode(stored(image, orientation), kind, tiffinfo=tags)
    return encode(stored(image, orientation), kind, exif=exif, **options)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_rotated_picture_is_turned_upright(kind: str, orientation: int, tmp_path: Path) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    data = oriented(kind, upright(), orientation, **({"lossless": True} if kind == "WEBP" else {}))
    (tmp_path / "picture").write_bytes(data)
    for source in (data, tmp_path / "picture", Image.open(io.BytesIO(data))):
        made = open_image(source)
        assert (
            made.size == (48, 32)
            and np.abs(np.asarray(made)[4::8, 4::8].astype(int) - upright()[4::8, 4::8]).max() < 60
        )
        assert open_image(made).size == (48, 32), "not turned twice"
        assert (decode_pixels(source, Geometry(24)) == resize_and_crop(made, Geometry(24))).all()
    if kind != "TIFF":  # which Pillow turns
        expected = Image.open(io.BytesIO(data)).convert("RGB")
        assert (rgb(data, exif_orientation=False) == np.asarray(expected)).all()
        as_stored = decode_pixels(data, Geometry(24), exif_orientation=False)
        assert (as_stored == resize_and_crop(expected, Geometry(24))).all()


@pytest.mark.parametrize(
    "block",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0",
        b"Exif\0\0II*\0\xff\xff\xff\x7f",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12",
        b"Exif\0\0XX*\0\x08\0\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\xff\0\0\0\0",
        b"Exif\0\0" + bytes(range(256)) * 8,
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_is_no_reason_to_refuse_a_picture(block: bytes, kind: str) -> None:
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    data = encode(upright(), kind, exif=block, **options)
    assert np.abs(rgb(data)[4::8, 4::8].astype(int) - upright()[4::8, 4::8]).max() < 60
    assert decode_pixels(data, Geometry(16)).shape == (16, 16, 3)


def test_a_renamed_eps_starts_no_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append("gs"))
    data = encode(upright(), "EPS")
    for name in ("a.jpg", "a.eps", "a.png"):
        (tmp_path / name).write_bytes(data)
        for read in (open_image, lambda path: decode_pixels(path, Geometry(8))):
            with pytest.raises(BadImageError, match=r"not an image of a known format \(JPEG, PNG"):
                read(tmp_path / name)
    with pytest.raises(BadImageError):
        open_image(data)
    assert started == []


@pytest.mark.parametrize("kind", ["EPS", "ICO", "TGA", "PCX", "DDS", "SGI", "IM", "JPEG2000", "ICNS", "SPIDER", "BLP"])
def test_other_decoders_of_pillow_are_not_started(kind: str) -> None:
    image = Image.fromarray(upright(64, 64)).convert("F" if kind == "SPIDER" else "P" if kind == "BLP" else "RGB")
    try:
        data = encode(image, kind)
    except (OSError, ValueError, KeyError) as error:
        pytest.skip(f"this Pillow writes no {kind}: {error}")
    with pytest.raises(BadImageError, match="not an image of a known format"):
        open_image(data)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_first_frame_counts(kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    frames = [Image.fromarray(upright()), Image.new("RGB", (48, 32), "black")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(rgb(data)[4::8, 4::8].astype(int) - upright()[4::8, 4::8]).max() < 60


def heic(image: np.ndarray, orientation: int = 1) -> bytes:
    import pillow_heif as library

    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    library.from_pillow(Image.fromarray(stored(image, orientation))).save(file, quality=95, exif=exif.tobytes())
    return file.getvalue()


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_heic_is_read_and_turned_once(orientation: int, tmp_path: Path) -> None:
    data = heic(upright(64, 48), orientation)
    (tmp_path / "a.HEIC").write_bytes(data)
    for source in (data, tmp_path / "a.HEIC"):
        made = open_image(source)
        assert made.size == (64, 48)
        assert np.abs(np.asarray(made)[4::8, 4::8].astype(int) - upright(64, 48)[4::8, 4::8]).max() < 60


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"msf1", b"hevc"])
def test_heic_without_its_library_names_the_command(
    brand: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels._register_heif.cache_clear()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    path = tmp_path / "a.heic"
    path.write_bytes(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(64))
    for read in (open_image, lambda path: decode_pixels(path, Geometry(8))):
        with pytest.raises(BadImageError, match=r"a\.heic: pillow_heif is needed .* pip install 'iosr_fast\[heic\]'"):
            read(path)


def test_avif_without_its_decoder_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "check", lambda name: name != "avif")
    with pytest.raises(BadImageError, match=r"this Pillow can't read AVIF; .*: pip install 'pillow>=11\.3'"):
        open_image(b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(64))
