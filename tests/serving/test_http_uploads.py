"""What a request may bring: bytes, pixels, images and seconds have limits, and forms may be damaged."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iosr_fast.images.geometry import Geometry
from iosr_fast.serving.http.errors import ApiError
from iosr_fast.serving.http.settings import Settings
from iosr_fast.serving.http.uploads import Uploads
from tests.pictures import GREY, encode
from tests.serving.hostile_images import IMAGES, png, webp
from tests.serving.http_client import AUTHORISED, Client, error_of, form, httpx, queries, serving


def refusal(data: bytes, side: int = 64, **settings: Any) -> ApiError | None:
    found = Uploads(Settings(**settings), Geometry(side)).check(data)
    return found if isinstance(found, ApiError) else None


@pytest.fixture(scope="module")
def small() -> Any:
    """A server with limits that are easy to reach."""
    limits = {"max_body_mb": 0.3, "max_image_mb": 0.1, "max_images": 4, "max_pixels": 250_000}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("iosr_fast.serving.http.service._BODIES", 2)
        with serving(**limits) as client:
            yield client


def image_code(response: Any) -> str:
    assert response.status_code == 422, response.text
    return response.json()["predictions"][0]["error"]["code"]


async def pieces(*parts: bytes) -> Any:
    """A body without Content-Length."""
    for part in parts:
        yield part


# --- headers of images ---


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [(7, 300), (640, 481)])
def test_sizes_are_read_from_headers_as_pillow_reads_them(kind: str, size: tuple[int, int]) -> None:
    image = Image.effect_noise(size, 60).convert("RGB")
    variants = [{}, {"lossless": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}] if kind == "WEBP" else [{}]
    variants += [{"progressive": True}] if kind == "JPEG" else []
    for options in variants:
        data = encode(image, kind, **options)
        assert refusal(data) is None
        below = refusal(data, max_pixels=size[0] * size[1] - 1, side=0)
        assert below is not None and below.code == "too_many_pixels" and f"{size[0]} x {size[1]}" in below.detail


def test_claims_are_refused_before_a_decoder_sees_them() -> None:
    rng = np.random.default_rng(0)
    for name in ("PNG bomb", "JPEG bomb", "WebP bomb", "PNG bomb that is true"):
        for _ in range(10):
            refused = refusal(IMAGES[name](rng))
            assert refused is not None and refused.code == "too_many_pixels", name
    # 60,000 pixels are few, but the shorter side of one pixel would be resized to 224.
    refused = refusal(IMAGES["thin PNG"](rng), side=224)
    assert refused is not None and "aspect ratio" in refused.detail


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "unsupported_type"),
        (b"\x89PNG\r\n\x1a\n", "bad_image"),
        (png(0, 5), "bad_image"),
        (b"\xff\xd8\xff\xe0\x00\x00" * 3, "bad_image"),
        (webp(b"JUNK", b"\0" * 20), "bad_image"),
        (b"RIFF\0\0\0\0WAVE" + bytes(40), "unsupported_type"),
        (encode(Image.new("RGB", (5, 5)), "GIF"), "unsupported_type"),
        (b"\x89PNG\r\n\x1a\n" + bytes(1 << 21), "too_large"),
    ],
)
def test_a_file_that_is_no_image_gets_a_code(data: bytes, code: str) -> None:
    refused = refusal(data, max_image_mb=1)
    assert refused is not None and refused.code == code


# --- how much, how many, how long ---


def test_a_body_that_is_too_large_is_a_413_announced_or_not(small: Client) -> None:
    for options in (
        {"content": bytes(320_001)},
        {"content": pieces(*[bytes(50_000)] * 7)},
        {"files": form(*[bytes(99_000)] * 4)},
    ):
        assert error_of(small.ask("POST", "/v1/predict", **options), 413) == "too_large"
    assert small.service.bodies.used == 0


def test_an_image_that_is_too_large_fails_alone(small: Client) -> None:
    large, wide = GREY + bytes(110_001), encode(Image.new("RGB", (501, 500)))
    assert image_code(small.predict(large)) == "too_large"
    made = small.predict(GREY, large, wide).json()["predictions"]
    assert "label" in made[0] and [one["error"]["code"] for one in made[1:]] == ["too_large", "too_many_pixels"]


def test_too_many_images_are_a_413(small: Client) -> None:
    assert len(small.predict(*[GREY] * 4).json()["predictions"]) == 4
    assert error_of(small.predict(*[GREY] * 5), 413) == "too_many_images"


def test_one_client_with_many_held_bodies_keeps_no_other_out(small: Client) -> None:
    """Eight bodies, each a few bytes short of the limit, and renewed as soon as they are refused."""

    async def attack() -> list[Any]:
        other = httpx.AsyncClient(transport=httpx.ASGITransport(small.app, client=("10.0.0.9", 1)), base_url="http://x")
        go, refused = asyncio.Event(), []

        async def held() -> Any:
            yield bytes(300_000)
            await go.wait()

        async def hold() -> None:
            while not go.is_set():
                response = await small._client.post("/v1/predict", content=held())
                refused.append(response.status_code)
                await asyncio.sleep(0.01)

        attackers = [asyncio.ensure_future(hold()) for _ in range(8)]
        while not small.service.bodies.used or not refused:
            await asyncio.sleep(0.001)
        answers = [await other.post("/v1/predict", content=GREY) for _ in range(20)]
        go.set()
        await asyncio.gather(*attackers)
        await other.aclose()
        assert 503 in refused
        return answers

    assert [one.status_code for one in small.run(attack())] == [200] * 20
    assert small.service.bodies.used == 0


# --- types and forms ---


@pytest.mark.parametrize("kind", ["image/whatever", "application/octet-stream", "IMAGE/JPEG; a=b", None])
def test_types_that_a_body_may_have(small: Client, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    assert small.ask("POST", "/v1/predict", content=GREY, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers", [{"Content-Type": "text/plain"}, {"Content-Type": "multipart/mixed"}, {"Content-Encoding": "gzip"}]
)
def test_other_types_and_compressed_bodies_are_refused(small: Client, headers: dict[str, str]) -> None:
    response = small.ask("POST", "/v1/predict", content=GREY, headers=headers)
    assert error_of(response, 415) and headers.popitem()[1] in response.json()["error"]["message"]


@pytest.mark.parametrize(("length", "status"), [(1024, 200), (1025, 415), (60_000, 415)])
def test_a_long_type_is_refused_before_it_is_parsed(small: Client, length: int, status: int) -> None:
    kind = 'image/png; x="'.ljust(length, ";")  # takes quadratic time
    response = small.ask("POST", "/v1/predict", content=GREY, headers={"Content-Type": kind})
    assert response.status_code == status


def part(content: bytes, header: str = 'form-data; name="images"') -> bytes:
    return b"--x\r\nContent-Disposition: " + header.encode() + b"\r\n\r\n" + content + b"\r\n"


@pytest.mark.parametrize(
    ("body", "boundary", "code"),
    [
        (part(GREY), "x", "bad_form"),  # no end
        (part(GREY)[:-1], "x", "bad_form"),
        (part(GREY) + b"--x--\r\n", "y", "bad_form"),
        (part(GREY) + b"--x--\r\n", "", "bad_form"),
        (part(GREY) + b"--x--\r\n", "b" * 71, "bad_form"),
        (part(GREY) + b"--x-\r\n", "x", "bad_form"),
        (part(GREY) + b"--xy\r\n\r\n--x--", "x", "bad_form"),
        (b"--xy" + part(GREY)[3:] + b"--x--\r\n", "x", "bad_form"),
        (b"--x\r\nX: a\r\n" + part(GREY) + b"--x--\r\n", "x", "bad_form"),
        (part(GREY).replace(b"\r\n\r\n", b"\r\n", 1) + b"--x--\r\n", "x", "bad_form"),
        (part(GREY, "form-data") + b"--x--\r\n", "x", "bad_form"),
        (part(GREY, 'attachment; name="images"') + b"--x--\r\n", "x", "bad_form"),
        (
            part(GREY, 'form-data; name="a"\r\nContent-Disposition: form-data; name="images"') + b"--x--",
            "x",
            "bad_form",
        ),
        (part(GREY, 'form-data; name="image"') + b"--x--\r\n", "x", "unexpected_field"),
        (part(GREY).replace(b"images", b"\xff", 1) + b"--x--\r\n", "x", "unexpected_field"),
        (part(GREY, 'form-data; name="a"; filename="b"; Name="images"') + b"--x--\r\n", "x", "bad_form"),
        (part(GREY, 'form-data; name="images"; filename="a" b"') + b"--x--\r\n", "x", "bad_form"),
        (part(GREY, 'form-data; name=""') + b"--x--\r\n", "x", "bad_form"),
        (part(GREY, f'form-data; name="images"; a="{"b" * 100_000}"') + b"--x--\r\n", "x", "bad_form"),
        (b"--x\r\n\r\n\r\n--x--", "x", "bad_form"),
        (b"--x\r\n: \r\n\r\n--x--", "x", "bad_form"),
        (b"\0" * 1000, "x", "bad_form"),
        (b"--" * 100_000, "x", "bad_form"),
        (part(b"\r\n--" * 70_000), "x", "bad_form"),
        (part(GREY, 'form-data; name="images"' + "\r\nX: a" * 20_000) + b"--x--\r\n", "x", "bad_form"),
        (b"--x--\r\n", "x", "no_image"),
        (b"", "x", "bad_form"),
    ],
)
def test_damaged_forms_are_named(small: Client, body: bytes, boundary: str, code: str) -> None:
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    assert error_of(small.ask("POST", "/v1/predict", content=body, headers=kind), 400) == code


def test_parts_keep_every_byte_and_need_no_filename(small: Client) -> None:
    images = queries()[:3]
    odd = r"""Form-Data; filename*=utf-8''%e2%82%ac.png; name="images" ;filename="a\"; name=b;"; """
    body = part(images[0], odd) + b"".join(map(part, images[1:]))
    body += part(GREY + b"\r\n--\r\n\r\n", "form-data;name=images") + b"--x--\r\nepilogue"
    truth = small.predict(*images, GREY).json()["predictions"]
    response = small.ask(
        "POST", "/v1/predict", content=body, headers={"Content-Type": 'multipart/form-data; boundary="x"'}
    )
    assert [one["label"] for one in response.json()["predictions"]] == [one["label"] for one in truth]


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ([("name", b"\xff\xfe")], 400, "bad_form"),
        ([("name", b"a" * 9000)], 413, "too_large"),
        ([("name", b"a")] * 2, 400, "unexpected_field"),
        ([("name", b"a"), *[("description", b"")] * 1001], 413, "too_many_fields"),
    ],
)
def test_text_fields_are_utf8_short_and_few(small: Client, fields: Any, status: int, code: str) -> None:
    kind = {"Content-Type": "multipart/form-data; boundary=x", **AUTHORISED}
    body = b"".join(part(text, f'form-data; name="{name}"') for name, text in fields) + part(GREY) + b"--x--\r\n"
    assert error_of(small.ask("POST", "/v1/classes", content=body, headers=kind), status) == code
