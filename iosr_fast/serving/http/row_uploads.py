"""Embeddings of a request to a head, as rows of numbers in JSON, in the place of images (uploads.Uploads)."""

from __future__ import annotations

import asyncio

import msgspec
import numpy as np
from starlette.requests import Request

from iosr_fast.encoders.encoder import are_usable
from iosr_fast.encoders.rows import Rows
from iosr_fast.serving.http.errors import ApiError
from iosr_fast.serving.http.settings import Settings
from iosr_fast.serving.http.uploads import Images, Uploads, content_type, wrong_type

_NUMBER = 32  # bytes of a number in JSON, a comma and a line's indentation included
_QUICK = 1 << 16  # bytes that are read sooner than a thread has started


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    embeddings: list[msgspec.Raw]


class RowUploads(Uploads):
    """Reads at most `settings.max_images` rows a request. They are checked here, because a queue of rows has no
    decoder; one that is wrong refuses the request."""

    def __init__(self, settings: Settings, rows: Rows) -> None:
        most, width = settings.max_images, rows.width
        self._most, self._rows, self._row_bytes = most, rows, 1024 + width * _NUMBER
        self.max_body, self.probe = min(settings.max_body_bytes, 1024 + most * width * _NUMBER), rows.blank(1)[0]
        row = {"type": "array", "items": {"type": "number"}, "minItems": width, "maxItems": width}
        schema = {"embeddings": {"type": "array", "items": row, "minItems": 1, "maxItems": most}}
        content = {"schema": {"type": "object", "properties": schema, "required": ["embeddings"]}}
        self.body = {"requestBody": {"required": True, "content": {"application/json": content}}}
        self._form = f'{{"embeddings": [[...], ...]}}, at most {most} rows of {width} numbers'
        self.sentence = f"POST {self._form}, as application/json to /v1/predict."

    async def read_images(self, request: Request, boxes: str | None = None) -> Images:
        """The rows (width,) of a body. Raises ApiError."""
        if boxes is not None:
            raise ApiError(422, "invalid_parameters", "expected no boxes: this server takes embeddings and no images")
        if (kind := content_type(request)) != "application/json":
            expected = f"application/json, because this server takes embeddings and no images: {self._form}"
            raise wrong_type(kind, expected)
        body = await request.body()
        return self._decode(body) if len(body) <= _QUICK else await asyncio.to_thread(self._decode, body)

    def _decode(self, body: bytes) -> Images:
        """Rows and bytes are counted before numbers are made of them. One row after another, as a thread gives way
        between calls alone."""
        if (count := body.count(b"[") - 1) > self._most:
            raise ApiError(413, "too_many_images", f"expected {self._form}, got {count} rows")
        rows, where = list[np.ndarray](), ""
        try:
            for i, row in enumerate(msgspec.json.decode(body, type=_Body).embeddings):
                where = f" in row {i}"
                if len(row) > self._row_bytes:
                    raise self._refused(f"got more than {self._row_bytes} bytes{where}")
                numbers = msgspec.json.decode(row, type=list[float])
                if len(numbers) != self._rows.width:
                    raise self._refused(f"got {len(numbers)} numbers{where}")
                rows.append(np.array(numbers))
        except msgspec.ValidationError as error:
            raise self._refused(f"{error}{where}") from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # of a key, of deep nesting
            raise ApiError(400, "bad_json", f"expected {self._form}, got no JSON: {error}") from None
        if not rows:
            raise self._refused("got none")
        if not (usable := are_usable(np.stack(rows), self._rows.adapted)).all():
            raise self._refused(f"got zeros, which have no direction, in row {usable.argmin()}")
        return [*rows]

    def _refused(self, reason: str) -> ApiError:
        return ApiError(422, "bad_embeddings", f"expected {self._form}: {reason}")
