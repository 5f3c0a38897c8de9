"""What is refused by its structure, before a decoder works on it: many scans wherever they hide, sizes that differ."""

from __future__ import annotations

import struct
import time

import numpy as np
import pytest
from PIL import Image

from iosr_fast.images.decoder_process.structure import structure_error
from iosr_fast.images.limits import claimed_size
from tests.images.jpegs import COMMENT, END, START, frame, jpeg, scan, segment, tables
from tests.pictures import encode
from tests.serving.hostile_images import FAIR, chunk, png, webp

MAX_PIXELS = 50_000_000
PHOTO = Image.effect_noise((300, 200), 60).convert("RGB")
DC, AC = scan(1, 2, 3, band=(0, 0, 0)), scan(1, band=(1, 63, 0))
HIDES = {
    "nothing": b"",
    "a comment that holds the end": segment(COMMENT, END),
    "an application's segment that holds the end": segment(0xE1, b"\0" * 9 + END * 5),
    "a comment that holds a scan and the end": segment(COMMENT, scan(1) + END),
    "fill bytes": b"\xff" * 9,
    "restart markers": b"\xff\xd0\x12\xff\xd7",
    "stuffed bytes": b"\x12\xff\x00\xff\xff\x00",
    "garbage": b"\0\x07" * 40,
}


@pytest.mark.parametrize("hide", list(HIDES))
@pytest.mark.parametrize("kind", [0xC0, 0xC1, 0xC2, 0xC9, 0xCA], ids=["C0", "C1", "C2", "C9", "CA"])
def test_scans_are_counted_wherever_they_hide(kind: int, hide: str) -> None:
    progressive = kind in (0xC2, 0xCA)
    repeated = AC if progressive else scan(1)
    few = [HIDES[hide] + repeated] * 3
    first = [DC] if progressive else []
    assert structure_error(jpeg(kind, 640, 480, *first, *few), MAX_PIXELS) == ""
    many = [HIDES[hide] + repeated] * 80
    assert "scans over 640 x 480 pixels" in structure_error(jpeg(kind, 640, 480, *first, *many), MAX_PIXELS)


def test_a_large_image_may_have_fewer_scans_than_a_small_one() -> None:
    scans = [DC, *[AC] * 30]
    assert structure_error(jpeg(0xC2, 1000, 1000, *scans), MAX_PIXELS) == ""
    assert "at most 12 scans" in structure_error(jpeg(0xC2, 7000, 7000, *scans), MAX_PIXELS)


@pytest.mark.parametrize(
    "data",
    [
        jpeg(0xC0, 8, 8, scan(1), frame(0xC0, 6000, 6000), scan(1)),
        jpeg(0xC0, 8, 8, frame(0xC2, 6000, 6000), scan(1)),
        jpeg(0xC3, 8, 8, scan(1)),
        jpeg(0xC5, 8, 8, scan(1)),
        jpeg(0xCD, 8, 8, scan(1)),
        jpeg(0xC0, 8, 0, scan(1), segment(0xDC, struct.pack(">H", 60_000))),
        jpeg(0xC0, 8, 8, scan(1), segment(0xDC, struct.pack(">H", 60_000))),
        START + tables() + segment(0xDE, struct.pack(">BHHB", 8, 8, 8, 0)) + frame(0xC0, 8, 8) + scan(1) + END,
        START + frame(0xC0, 8, 8) + b"\xff\xfe\x00\x00" + END,
        png(8, 8, chunk(b"IHDR", struct.pack(">IIBBBBB", 6000, 6000, 8, 2, 0, 0, 0)), rows=bytes(100)),
        png(8, 8, chunk(b"fcTL", struct.pack(">IIIII", 0, 6000, 6000, 0, 0) + bytes(6)), rows=bytes(100)),
        png(8, 8, chunk(b"teSt", b"") * 50_000, rows=bytes(100)),
        webp(b"VP8X", struct.pack("<I", 2) + b"\7\0\0\7\0\0", b"ANMF" + struct.pack("<I", 24) + b"\xff" * 24),
        webp(b"VP8X", struct.pack("<I", 0) + b"\7\0\0\7\0\0", b"VP8L\5\0\0\0\x2f\xff\xff\xff\xff\0"),
        webp(b"VP8X", struct.pack("<I", 0) + b"\7\0\0\7\0\0", b"junk\0\0\0\0" * 5000),
    ],
)  # fmt: skip
def test_sizes_have_to_agree_in_all_places(data: bytes) -> None:
    assert structure_error(data, MAX_PIXELS) != ""


def test_ordinary_files_are_let_through() -> None:
    files = [made(np.random.default_rng(seed)) for made in FAIR.values() for seed in range(3)]
    files += [encode(PHOTO, "JPEG", quality=95, progressive=p, subsampling=s) for p in (True, False) for s in (0, 2)]
    files += [encode(PHOTO, "JPEG", restart_marker_blocks=3), encode(PHOTO, "WEBP"), encode(PHOTO, "PNG")]
    files += [jpeg(0xC0, 20, 10, scan(1), scan(2), scan(3))]  # one scan for each component
    for data in files:
        assert structure_error(data, MAX_PIXELS) == ""
    assert structure_error(b"II*\0", MAX_PIXELS) == ""  # a kind that is not known here


@pytest.mark.parametrize("filling", [b"\xff\x00", b"\xff\xd0", b"\xff\xff", b"\xff\xfe\x00\x02", b"\x00\xff", START])
def test_a_walk_through_bytes_that_are_made_for_it_ends_soon(filling: bytes) -> None:
    data = jpeg(0xC0, 7000, 7000, scan(1, 2, 3), filling * ((8 << 20) // len(filling)))
    started = time.monotonic()
    structure_error(data, MAX_PIXELS)
    claimed_size(START + data[2:300] + filling * ((8 << 20) // len(filling)))
    assert time.monotonic() - started < 10
