"""What a request may bring: bytes, pixels, images and seconds have limits, forms may be damaged, odd images good."""

from __future__ import annotations

import asyncio
import tracemalloc
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iosr_fast.images.geometry import Geometry
from iosr_fast.serving.http.settings import Settings
from iosr_fast.serving.http.uploads import Refusal, check_image
from tests.pictures import GREY, encode
from tests.serving.hostile_images import FAIR, IMAGES, encoded, picture, png, webp
from tests.serving.http_client import AUTHORISED, Client, form, queries, serving

pytestmark = pytest.mark.slow


def refusal(
    data: bytes, max_image_bytes: int = 8 << 20, max_pixels: int = 50_000_000, side: int = 64
) -> Refusal | None:
    return check_image(data, Settings(max_image_bytes=max_image_bytes, max_pixels=max_pixels), Geometry(side))


@pytest.fixture(scope="module")
def small() -> Any:
    """A server with limits that are easy to reach."""
    limits = {"max_body_bytes": 300_000, "max_image_bytes": 100_000, "max_images": 4, "max_pixels": 250_000}
    with serving(max_buffered_bytes=400_000, **limits) as client:
        yield client


@pytest.fixture(scope="module")
def roomy() -> Any:
    """A server with the limits that it has by itself."""
    with serving() as client:
        yield client


def code_of(response: Any, status: int) -> str:
    assert response.status_code == status, response.text
    return response.json()["error"]["code"]


def image_code(response: Any) -> str:
    assert response.status_code == 422, response.text
    return response.json()["predictions"][0]["error"]["code"]


async def pieces(*parts: bytes, pause_s: float = 0.0) -> Any:
    """A body without Content-Length."""
    for part in parts:
        yield part
        await asyncio.sleep(pause_s)


# --- headers of images ---


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [(1, 1), (7, 300), (640, 481)])
def test_sizes_are_read_from_headers_as_pillow_reads_them(kind: str, size: tuple[int, int]) -> None:
    image = Image.effect_noise(size, 60).convert("RGB")
    variants = [{}, {"lossless": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}] if kind == "WEBP" else [{}]
    variants += [{"progressive": True}] if kind == "JPEG" else []
    for options in variants:
        data = encode(image, kind, **options)
        assert refusal(data, 1 << 20, 1_000_000) is None
        if size != (1, 1):
            below = refusal(data, max_pixels=size[0] * size[1] - 1, side=0)
            assert below is not None and below.code == "too_many_pixels" and f"{size[0]} x {size[1]}" in below.message


def test_claims_are_refused_before_a_decoder_sees_them() -> None:
    rng = np.random.default_rng(0)
    for name in ("PNG bomb", "JPEG bomb", "WebP bomb", "PNG bomb that is true"):
        for _ in range(10):
            refused = refusal(IMAGES[name](rng))
            assert refused is not None and refused.code == "too_many_pixels", name
    # 60,000 pixels are few, but the shorter side of one pixel would be resized to 224.
    refused = refusal(IMAGES["thin PNG"](rng), side=224)
    assert refused is not None and "aspect ratio" in refused.message
    assert refusal(png(10, 10, rows=bytes(110))) is None


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "unsupported_type"),
        (b"\x89PNG\r\n\x1a\n", "bad_image"),
        (png(0, 5), "bad_image"),
        (b"\xff\xd8\xff\xe0", "bad_image"),
        (b"\xff\xd8\xff\xe0\x00\x00" * 3, "bad_image"),
        (webp(b"VP8 ", b"\0" * 20), "bad_image"),
        (webp(b"JUNK", b"\0" * 20), "bad_image"),
        (b"RIFF\0\0\0\0WAVE" + bytes(40), "unsupported_type"),
        (encode(Image.new("RGB", (5, 5)), "GIF"), "unsupported_type"),
        (encode(Image.new("RGB", (5, 5)), "BMP"), "unsupported_type"),
        (b"\x89PNG\r\n\x1a\n" + bytes(1 << 21), "too_large"),
    ],
)
def test_what_is_no_image_gets_a_code(data: bytes, code: str) -> None:
    refused = refusal(data, 1 << 20, 1_000_000)
    assert refused is not None and refused.code == code


# --- images that are odd but good ---


@pytest.mark.parametrize("name", sorted(FAIR))
def test_odd_images_are_classified_as_the_library_does(roomy: Client, name: str) -> None:
    rng = np.random.default_rng(7)
    image = FAIR[name](rng)
    response = roomy.predict(image, query="?top=8")
    assert response.status_code == 200, response.text
    classifier = roomy.service.classifier
    told = {one["label"]: one["probability"] for one in response.json()["predictions"][0]["top"]}
    np.testing.assert_allclose([told[n] for n in classifier.classes_], classifier.predict_proba([image])[0], atol=1e-5)


def test_only_the_first_frame_counts_and_pictures_are_turned_upright(small: Client) -> None:
    rng = np.random.default_rng(3)
    first, second = picture(rng, side=40), picture(rng, side=40)
    still = small.predict(encoded(first, "WEBP", lossless=True)).json()["predictions"]
    moving = encoded(first, "WEBP", lossless=True, save_all=True, append_images=[second] * 3)
    assert small.predict(moving).json()["predictions"] == still
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = encoded(first.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    assert small.predict(turned).json()["predictions"] == small.predict(encoded(first, "PNG")).json()["predictions"]
    assert small.predict(encoded(first, "PNG", exif=exif)).json()["predictions"] != still


# --- how much, how many, how long ---


def test_a_body_that_is_too_large_is_a_413_announced_or_not(small: Client) -> None:
    large = bytes(300_001)
    assert code_of(small.ask("POST", "/v1/predict", content=large), 413) == "too_large"
    assert code_of(small.ask("POST", "/v1/predict", content=pieces(*[bytes(50_000)] * 7)), 413) == "too_large"
    assert code_of(small.ask("POST", "/v1/predict", files=form(*[bytes(99_000)] * 4)), 413) == "too_large"
    # The framework reads this one's body, not the server.
    response = small.ask("PATCH", "/v1/classes/~0", content=pieces(*[b" " * 50_000] * 7), headers=AUTHORISED)
    assert code_of(response, 413) == "too_large"
    assert small.service.budget.used == 0


def test_an_image_that_is_too_large_fails_alone(small: Client) -> None:
    large = GREY + bytes(100_001)
    assert image_code(small.predict(large)) == "too_large"
    made = small.predict(GREY, large).json()["predictions"]
    assert "label" in made[0] and made[1]["error"]["code"] == "too_large"
    wide = encode(Image.new("RGB", (501, 500)))
    made = small.predict(wide, GREY).json()["predictions"]
    assert made[0]["error"]["code"] == "too_many_pixels" and "label" in made[1]


def test_too_many_images_are_a_413(small: Client) -> None:
    assert len(small.predict(*[GREY] * 4).json()["predictions"]) == 4
    assert code_of(small.predict(*[GREY] * 5), 413) == "too_many_images"


def test_a_body_that_comes_too_slowly_is_a_408() -> None:
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    with serving(body_timeout_s=0.3) as client:
        for parts, headers in (
            ([GREY[:10]] * 500, {}),  # something comes all the time
            ([GREY[:10], b"", *[b""] * 500], {}),  # nothing does
            ([b"--x\r\nContent-Disp", b"osition", *[b""] * 500], kind),
        ):
            response = client.ask("POST", "/v1/predict", content=pieces(*parts, pause_s=0.02), headers=headers)
            assert code_of(response, 408) == "body_too_slow"
    with serving(body_timeout_s=30) as client:
        assert client.ask("POST", "/v1/predict", content=pieces(GREY[:50], GREY[50:], pause_s=0.3)).status_code == 200


def test_all_bodies_together_are_bounded(small: Client) -> None:
    async def half(go: asyncio.Event) -> Any:
        yield bytes(200_000)
        await go.wait()
        yield bytes(10)

    async def both() -> list[Any]:
        go = asyncio.Event()
        first = asyncio.ensure_future(small._client.post("/v1/predict", content=half(go)))
        while small.service.budget.used < 200_000:
            await asyncio.sleep(0.001)
        second = await small._client.post("/v1/predict", content=bytes(250_000))
        go.set()
        return [await first, second]

    first, second = small.run(both())
    assert code_of(second, 503) == "busy" and int(second.headers["Retry-After"]) >= 1
    assert first.status_code == 422 and small.service.budget.used == 0


def test_a_refused_part_is_not_held(small: Client) -> None:
    """Of an image beyond its limit nothing is kept while the rest of it arrives."""
    with serving(max_body_bytes=40 << 20, max_image_bytes=1 << 20) as client:
        head = b'--x\r\nContent-Disposition: form-data; name="images"\r\n\r\n'
        piece = bytes(1 << 20)
        tracemalloc.start()
        try:
            response = client.ask(
                "POST",
                "/v1/predict",
                content=pieces(head, *[piece] * 30, b"\r\n--x--\r\n"),
                headers={"Content-Type": "multipart/form-data; boundary=x"},
            )
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert image_code(response) == "too_large" and peak < 12 << 20


# --- types and forms ---


@pytest.mark.parametrize("kind", ["image/png", "image/whatever", "application/octet-stream", "IMAGE/JPEG; a=b", None])
def test_types_that_a_body_may_have(small: Client, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    assert small.ask("POST", "/v1/predict", content=GREY, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/json", "application/x-www-form-urlencoded", "multipart/mixed"]
)
def test_types_that_it_may_not_have(small: Client, kind: str) -> None:
    response = small.ask("POST", "/v1/predict", content=GREY, headers={"Content-Type": kind})
    assert code_of(response, 415) == "unsupported_type" and kind in response.json()["error"]["message"]


def test_compressed_bodies_are_not_taken(small: Client) -> None:
    for encoding in ("gzip", "br", "deflate, gzip"):
        response = small.ask("POST", "/v1/predict", content=GREY, headers={"Content-Encoding": encoding})
        assert code_of(response, 415) == "unsupported_encoding"
    assert small.ask("POST", "/v1/predict", content=GREY, headers={"Content-Encoding": "identity"}).status_code == 200


def test_no_image_is_a_400(small: Client) -> None:
    assert code_of(small.ask("POST", "/v1/predict"), 400) == "no_image"
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    assert code_of(small.ask("POST", "/v1/predict", content=b"--x--\r\n", headers=kind), 400) == "no_image"


def part(content: bytes, header: str = 'form-data; name="images"') -> bytes:
    return b"--x\r\nContent-Disposition: " + header.encode() + b"\r\n\r\n" + content + b"\r\n"


@pytest.mark.parametrize(
    ("body", "boundary", "code"),
    [
        (part(GREY), "x", "bad_form"),  # no end
        (part(GREY) + b"--x--\r\n", "y", "bad_form"),
        (part(GREY) + b"--x--\r\n", "", "bad_form"),
        (part(GREY) + b"--x--\r\n", "b" * 5000, "bad_form"),
        (part(GREY, "form-data") + b"--x--\r\n", "x", "bad_form"),
        (part(GREY, 'attachment; name="images"') + b"--x--\r\n", "x", "bad_form"),
        (part(GREY, 'form-data; name="image"') + b"--x--\r\n", "x", "unexpected_field"),
        (part(GREY, f'form-data; name="images"; a="{"b" * 100_000}"') + b"--x--\r\n", "x", "bad_form"),
        (b"--x\r\n\r\n\r\n--x--", "x", "bad_form"),
        (b"--x\r\n: \r\n\r\n--x--", "x", "bad_form"),
        (b"\0" * 1000, "x", "bad_form"),
        (b"", "x", "bad_form"),
    ],
)
def test_damaged_forms_are_named(small: Client, body: bytes, boundary: str, code: str) -> None:
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    for content in (body, pieces(*(body[i : i + 7] for i in range(0, min(len(body), 2000), 7)), body[2002:])):
        assert code_of(small.ask("POST", "/v1/predict", content=content, headers=kind), 400) == code


def test_a_form_may_be_cut_anywhere(small: Client) -> None:
    """Pieces of any size, also within boundaries, give the same images; parts need no filename."""
    images = queries()[:3]
    body = b"".join(map(part, images)) + b"--x--\r\nepilogue"
    truth = small.predict(*images).json()["predictions"]
    for size in (1013, 61, 7):
        content = pieces(*(body[i : i + size] for i in range(0, len(body), size)))
        response = small.ask(
            "POST", "/v1/predict", content=content, headers={"Content-Type": 'multipart/form-data; boundary="x"'}
        )
        made = response.json()["predictions"]
        assert [one["label"] for one in made] == [one["label"] for one in truth]
        np.testing.assert_allclose([one["logit"] for one in made], [one["logit"] for one in truth], atol=1e-4)


def test_names_of_classes_have_to_be_utf8_and_short(small: Client) -> None:
    kind = {"Content-Type": "multipart/form-data; boundary=x", **AUTHORISED}
    for name, code, status in ((b"\xff\xfe", "bad_form", 400), (b"a" * 5000, "too_large", 413)):
        body = part(name, 'form-data; name="name"') + part(GREY) + b"--x--\r\n"
        assert code_of(small.ask("POST", "/v1/classes", content=body, headers=kind), status) == code
    twice = part(b"a", 'form-data; name="name"') * 2 + part(GREY) + b"--x--\r\n"
    assert code_of(small.ask("POST", "/v1/classes", content=twice, headers=kind), 400) == "unexpected_field"
