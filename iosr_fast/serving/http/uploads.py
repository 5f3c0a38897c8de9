"""Images of a request, from the body itself or from a multipart form, and their checks before decoding.

Nothing is written to disk. The checks read headers only and decode nothing.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any, TypeAlias

import msgspec
import numpy as np
from starlette.requests import Request

from iosr_fast.backbones.prompts import MAX_LENGTH, MAX_TEXTS
from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.crop import Box, Crop
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.limits import DAMAGED, claimed_size, image_kind
from iosr_fast.serving.batching.decoder import grey_png
from iosr_fast.serving.batching.item import Encoded
from iosr_fast.serving.http.errors import ApiError
from iosr_fast.serving.http.settings import Settings
from iosr_fast.serving.limits import Limits

_MAX_TEXT = 4 * MAX_LENGTH  # bytes of a text field in UTF-8
_FORMS = "multipart/form-data with file fields `images`"


def _header(value: bytes, name: bytes) -> re.Pattern[bytes]:
    """Matches a header `value` that has the parameter `name` once among others. Possessive repetitions take linear
    time."""
    others = rb'(?:[ \t]*+;[ \t]*+(?!%b=)[\w*.-]++=(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"|[^;" \t]*+))*+' % name
    one = rb'[ \t]*+;[ \t]*+%b=(?:"([^"\\]++)"|([^;" \t]++))' % name
    return re.compile(value + others + one + others + rb"[ \t]*+;?", re.IGNORECASE | re.DOTALL)


_FORM_TYPE, _DISPOSITION = _header(rb"multipart/form-data", b"boundary"), _header(rb"form-data", b"name")

# In order: encoded images, parts of one, or rows of embeddings; the error of an image that no decoder should see.
Images: TypeAlias = "list[Encoded | Crop | np.ndarray | ApiError]"


class Uploads:
    """Reads the images of requests. `max_pixels` of `settings` holds for an image as it is, and for what resizing to
    `geometry` makes of it."""

    # Where a request has no images: a sentence for / and OpenAPI, and the schema of the body.
    sentence = ""
    body: dict[str, Any] | None = None

    def __init__(self, settings: Settings, geometry: Geometry) -> None:
        self.max_body, self.probe = settings.max_body_bytes, grey_png()
        self._max_images, self._limits, self._geometry = settings.max_images, settings.decode_limits, geometry

    async def read_images(self, request: Request, boxes: str | None = None) -> Images:
        """Images to classify: one as the body (image/*, application/octet-stream, or no type), or a form. With `boxes`,
        of the query or a field of the form, the parts of the only image instead, or its error for each."""
        given = [] if boxes is None else [boxes]
        kind, body = content_type(request), await request.body()
        if kind == "multipart/form-data":
            images, texts = await asyncio.to_thread(self._read_parts, request, body, ("boxes",))
            given += texts.get("boxes", [])
        elif kind in ("", "application/octet-stream") or kind.startswith("image/"):
            images = [self.check(body)] if body else []
        else:
            raise wrong_type(kind, f"an image (image/* or application/octet-stream) or {_FORMS}")
        if not images:
            raise ApiError(400, "no_image", f"expected an image as the body, or {_FORMS}; got none")
        if not given:
            return images
        if len(given) > 1 or len(images) > 1:
            raise _bad_boxes(f"once, in the query or the form, and of one image; got {len(images)} images")
        (image,) = images
        return [image if isinstance(image, ApiError) else Crop(image, box) for box in self._read_boxes(given[0])]

    async def read_form(
        self, request: Request, *texts: str, repeated: tuple[str, ...] = ()
    ) -> tuple[list[Encoded], dict[str, list[str]]]:
        """Images and text fields of a form that has each of `texts` at most once, each of `repeated` up to MAX_TEXTS
        times. 400 for any other field, 422 for a refused image, because a change is made with all of its images or not
        at all."""
        if (kind := content_type(request)) != "multipart/form-data":
            raise wrong_type(kind, "multipart/form-data")
        images, fields = await asyncio.to_thread(self._read_parts, request, await request.body(), texts, repeated)
        for i, image in enumerate(images):
            if isinstance(image, ApiError):
                raise ApiError(422, image.code, f"image number {i}: {image.detail}")
        return [image for image in images if isinstance(image, Encoded)], fields

    def check(self, data: bytes) -> Encoded | ApiError:
        """An image, or why `data` must not reach a decoder. A decoder may still find damage."""
        if message := self._limits.bytes_error(len(data)):
            return ApiError(422, "too_large", message)
        if not image_kind(data):
            got = "a file of another kind; convert it to one of these" if data else "an empty file; send all of it"
            return ApiError(422, "unsupported_type", f"expected a JPEG, PNG or WebP image, got {got}")
        size = claimed_size(data)
        if size is None:
            return ApiError(422, "bad_image", DAMAGED)
        message = self._limits.size_error(size, self._geometry)
        return ApiError(422, "too_many_pixels", message) if message else Encoded(data, size)

    def _read_parts(
        self, request: Request, body: bytes, texts: tuple[str, ...] = (), repeated: tuple[str, ...] = ()
    ) -> tuple[Images, dict[str, list[str]]]:
        """For a thread, which gives way between parts: a form has up to a thousand, a JPEG hundreds of segments."""
        images: Images = []
        fields: dict[str, list[str]] = {}
        for name, content in _parts(body, request.headers["content-type"].encode("latin-1")):
            if name == "images":
                if len(images) == self._max_images:
                    raise ApiError(413, "too_many_images", f"expected at most {self._max_images} images, got more")
                images.append(self.check(content))
                continue
            values = fields.setdefault(name, [])
            if name not in repeated and (name not in texts or values):
                names = ", ".join([*(f"{text!r} once" for text in texts), *map(repr, ("images", *repeated))])
                raise ApiError(400, "unexpected_field", f"expected form fields {names}, got {name[:80]!r}")
            if len(values) == MAX_TEXTS:
                raise ApiError(413, "too_many_fields", f"expected at most {MAX_TEXTS} fields {name!r}, got more")
            if len(content) > (most := Limits.box_text * self._max_images if name == "boxes" else _MAX_TEXT):
                raise ApiError(413, "too_large", f"expected a field {name!r} of at most {most} bytes")
            try:
                values.append(content.decode())
            except UnicodeDecodeError:
                raise _bad_form(f"its field {name!r} is not UTF-8") from None
        return images, fields

    def _read_boxes(self, text: str) -> list[Box]:
        """Raises ApiError, which says where the first box is that is none, or what it is."""
        try:
            boxes = [Box.of(values) for values in msgspec.json.decode(text, type=list[list[float]])]
        except (msgspec.DecodeError, IosrFastError) as error:
            raise _bad_boxes(f"got another text: {error}") from None
        if not 1 <= len(boxes) <= self._max_images:
            raise _bad_boxes(f"from 1 to {self._max_images}, got {len(boxes)}")
        return boxes


def _parts(body: bytes, content_type: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of each part of a form (RFC 7578), whose body is in memory already.

    Strict: other text after a boundary, a second boundary and parts with two Content-Dispositions, of which a proxy
    may read the other one, are refused.
    """
    form_type = _FORM_TYPE.fullmatch(content_type.strip())
    boundary = form_type[1] or form_type[2] if form_type else b""
    delimiter = b"\r\n--" + boundary
    if not 0 < len(boundary) <= 70 or not body.startswith(delimiter[2:]):
        raise _bad_form("it does not begin with the boundary of its Content-Type, of at most 70 bytes")
    start = len(delimiter) - 2
    while not body.startswith(b"--", start):
        end, content = body.find(delimiter, start), body.find(b"\r\n\r\n", start, start + Limits.part_headers) + 4
        if end < 0:
            raise _bad_form("it ends before its last boundary")
        before, *lines = body[start : content - 4].split(b"\r\n") if start < content <= end else [b""]
        headers = [line.partition(b":") for line in lines]
        dispositions = [value.strip() for name, _, value in headers if name.lower() == b"content-disposition"]
        form_data = _DISPOSITION.fullmatch(dispositions[0]) if len(dispositions) == 1 else None
        if before.strip() or form_data is None:
            raise _bad_form("a part has no Content-Disposition: form-data with a name")
        yield (form_data[1] or form_data[2]).decode("utf-8", "replace"), body[content:end]
        start = end + len(delimiter)


def _bad_boxes(reason: str) -> ApiError:
    return ApiError(422, "invalid_parameters", f"expected boxes as JSON, [[x, y, width, height], ...]: {reason}")


def _bad_form(reason: str) -> ApiError:
    return ApiError(400, "bad_form", f"the multipart form is damaged: {reason}")


def wrong_type(kind: str, expected: str) -> ApiError:
    return ApiError(415, "unsupported_type", f"expected a Content-Type of {expected}, got {kind[:100] or 'none'}")


def content_type(request: Request) -> str:
    """The type of a body, without parameters. Raises ApiError for a compressed one."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(415, "unsupported_encoding", f"expected a body without Content-Encoding, got {encoding[:40]!r}")
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()
