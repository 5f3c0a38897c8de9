"""What a request may bring: bytes, pixels, images and seconds have limits, and forms may be damaged."""

from __future__ import annotations

import asyncio
import time
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

PNG, MB, EXIF = b"\x89PNG\r\n\x1a\n", bytes(1 << 20), b"Exif\0\0MM\0*\0\0\0\x08\0\0"


def refusal(data: bytes, side: int = 64, **settings: Any) -> ApiError | None:
    found = Uploads(Settings(**settings), Geometry(side)).check(data)
    return found if isinstance(found, ApiError) else None


@pytest.fixture(scope="module")
def small() -> Any:
    """A server with limits that are easy to reach."""
    limits = {"max_body_mb": 0.3, "max_image_mb": 0.1, "max_images": 4, "max_pixels": 250_000}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("iosr_fast.serving.limits.Limits.bodies", 2)
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
    variants = {"JPEG": [{"progressive": True}], "PNG": [], "WEBP": [{"lossless": True}, {"exif": EXIF}]}
    for options in ({}, *variants[kind]):
        data = encode(image, kind, **options)
        assert refusal(data) is None
        below = refusal(data, max_pixels=size[0] * size[1] - 1, side=0)
        assert below is not None and below.code == "too_many_pixels" and f"{size[0]} x {size[1]}" in below.detail


def test_what_no_decoder_should_see_gets_a_code() -> None:
    rng = np.random.default_rng(0)
    bombs = [IMAGES[name](rng) for name in ("PNG bomb", "JPEG bomb", "WebP bomb", "PNG bomb that is true") * 10]
    other = [b"", b"RIFF\0\0\0\0WAVE" + bytes(40), encode(Image.new("RGB", (5, 5)), "GIF")]
    damaged = [PNG, png(0, 5), b"\xff\xd8\xff\xe0\x00\x00" * 3, webp(b"JUNK", b"\0" * 20)]
    codes = {"too_many_pixels": bombs, "unsupported_type": other, "bad_image": damaged, "too_large": [PNG + MB]}
    for code, cases in codes.items():
        for data in cases:
            refused = refusal(data, max_image_mb=1)
            assert refused is not None and refused.code == code, data[:40]
    # 60,000 pixels are few, but the shorter side of one pixel would be resized to 224.
    refused = refusal(IMAGES["thin PNG"](rng), side=224)
    assert refused is not None and "aspect ratio" in refused.detail


# --- how much, how many, how long ---


def test_a_body_that_is_too_large_is_a_413_announced_or_not(small: Client) -> None:
    for options in (
        {"content": bytes(320_001)},
        {"content": pieces(*[bytes(50_000)] * 7)},
        {"files": form(*[bytes(99_000)] * 4)},
    ):
        assert error_of(small.ask("POST", "/v1/predict", **options), 413) == "too_large"
    assert small.site.bodies.used == 0


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
        while not small.site.bodies.used or not refused:
            await asyncio.sleep(0.001)
        answers = [await other.post("/v1/predict", content=GREY) for _ in range(20)]
        go.set()
        await asyncio.gather(*attackers)
        await other.aclose()
        assert 503 in refused
        return answers

    assert [one.status_code for one in small.run(attack())] == [200] * 20
    assert small.site.bodies.used == 0


# --- types and forms ---


def test_the_type_says_what_a_body_is(small: Client) -> None:
    plain = ("image/whatever", "application/octet-stream", "IMAGE/JPEG; a=b", "image/png;", " image/png ;;", "")
    for headers in ({}, *({"Content-Type": kind} for kind in plain)):
        assert small.ask("POST", "/v1/predict", content=GREY, headers=headers).status_code == 200, headers
    others = ("text/plain", "multipart/mixed", "multipart/form-datax", "imagex/png", '"image/png"', "application/json")
    for headers in ({"Content-Encoding": "gzip"}, *({"Content-Type": kind} for kind in others)):
        response = small.ask("POST", "/v1/predict", content=GREY, headers=headers)
        assert error_of(response, 415) and headers.popitem()[1][:30] in response.json()["error"]["message"]


def part(content: bytes, header: str = 'form-data; name="images"') -> bytes:
    return b"--x\r\nContent-Disposition: " + header.encode("utf-8", "surrogateescape") + b"\r\n\r\n" + content + b"\r\n"


FORM = part(GREY) + b"--x--\r\n"


@pytest.mark.parametrize(("parameters", "read"), [
    ("; boundary=x", True), (';boundary="x"', True), (" ;\tBoundary=x ; charset=utf-8;", True),
    (r'; a="\"; boundary=y; \\"; boundary=x; b=', True), ("; xboundary=y; boundary*=utf-8''y; boundary=x", True),
    ("", False), (";", False), ("; boundary", False), ("; boundary=", False), ('; boundary=""', False),
    ("; boundary = x", False), ("; boundary='x'", False), ('; boundary="x', False), (r'; boundary="\x"', False),
    ('; boundary=x"', False), ("; boundary=x boundary=x", False), ("; boundary=x; boundary=x", False),
    ("; boundary=y; Boundary=x", False), ('; a="b" boundary=x', False), (r'; a="\"; boundary=x', False),
    ("; boundary=x, a/b", False), ('; a="'.ljust(60_000, ";"), False), ("; a=b" * 12_000 + "; boundary=y", False),
    (';a="' + "\\" * 60_000, False),
])  # fmt: skip
def test_a_form_has_one_boundary(small: Client, parameters: str, read: bool) -> None:
    kind, start = {"Content-Type": "Multipart/Form-Data" + parameters}, time.process_time()
    response = small.ask("POST", "/v1/predict", content=FORM, headers=kind)
    assert response.status_code == 200 if read else error_of(response, 400) == "bad_form"
    assert time.process_time() - start < 2  # quadratic time would be a minute


@pytest.mark.parametrize("body", [
    b"", part(GREY), part(GREY)[:-1], part(GREY) + b"--x-\r\n", part(GREY) + b"--xy\r\n\r\n--x--",  # no end
    b"--xy" + FORM[3:], b"--x\r\nX: a\r\n" + FORM, FORM.replace(b"\r\n\r\n", b"\r\n", 1),
    b"--x\r\n\r\n\r\n--x--", b"--x\r\n: \r\n\r\n--x--", b"\0" * 1000, b"--" * 100_000, part(b"\r\n--" * 70_000),
    *(part(GREY, header) + b"--x--\r\n" for header in (
        "form-data", 'attachment; name="images"', 'form-data; name=""', 'form-data; name="images"; filename="a" b"',
        'form-data; name="a"\r\nContent-Disposition: form-data; name="images"',
        'form-data; name="a"; filename="b"; Name="images"', f'form-data; name="images"; a="{"b" * 100_000}"',
        'form-data; name="images"' + "\r\nX: a" * 20_000,
    )),
])  # fmt: skip
def test_a_damaged_form_is_refused(small: Client, body: bytes) -> None:
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    assert error_of(small.ask("POST", "/v1/predict", content=body, headers=kind), 400) == "bad_form"


def test_a_boundary_has_at_most_70_bytes(small: Client) -> None:
    for length, status in ((70, 200), (71, 400)):
        boundary = "b" * length
        kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        response = small.ask(
            "POST", "/v1/predict", content=FORM.replace(b"--x", b"--" + boundary.encode()), headers=kind
        )
        assert response.status_code == status


def test_parts_keep_every_byte_and_need_no_filename(small: Client) -> None:
    images = queries()[:3]
    odd = r"""Form-Data; filename*=utf-8''%e2%82%ac.png; name="images" ;filename="a\"; name=b;"; """
    body = part(images[0], odd) + b"".join(map(part, images[1:]))
    body += part(GREY + b"\r\n--\r\n\r\n", "form-data;name=images") + b"--x--\r\nepilogue"
    truth = small.predict(*images, GREY).json()["predictions"]
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    response = small.ask("POST", "/v1/predict", content=body, headers=kind)
    assert [one["label"] for one in response.json()["predictions"]] == [one["label"] for one in truth]


@pytest.mark.parametrize(("method", "fields", "status", "code"), [
    ("predict", [("image", b"")], 400, "unexpected_field"),
    ("predict", [("\udcff", b"")], 400, "unexpected_field"),
    ("predict", None, 400, "no_image"),
    ("classes", [("name", b"\xff\xfe")], 400, "bad_form"),
    ("classes", [("name", b"a" * 9000)], 413, "too_large"),
    ("classes", [("name", b"a")] * 2, 400, "unexpected_field"),
    ("classes", [("name", b"a"), *[("description", b"")] * 1001], 413, "too_many_fields"),
])  # fmt: skip
def test_fields_are_known_utf8_short_and_few(small: Client, method: str, fields: Any, status: int, code: str) -> None:
    kind = {"Content-Type": "multipart/form-data; boundary=x", **AUTHORISED}
    body = b"".join(part(text, f'form-data; name="{name}"') for name, text in fields or ())
    body += b"--x--\r\n" if fields is None else FORM
    assert error_of(small.ask("POST", f"/v1/{method}", content=body, headers=kind), status) == code
