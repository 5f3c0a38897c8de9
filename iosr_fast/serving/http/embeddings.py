"""POST /embeddings: images and texts in, embeddings out, in the shape that clients of embedding servers send."""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from iosr_fast.backbones.prompts import MAX_LENGTH
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import BadImageError
from iosr_fast.serving.batching.item import Text
from iosr_fast.serving.http import schemas
from iosr_fast.serving.http.errors import ApiError
from iosr_fast.serving.http.middleware import served_of
from iosr_fast.serving.http.predict import ask, known
from iosr_fast.serving.http.row_uploads import RowUploads
from iosr_fast.serving.http.site import ServedEncoder, Site
from iosr_fast.serving.http.uploads import content_type

_ANY = "default/not-specified"
_JSON = "JSON with `input`, a text or a data URL (data:image/jpeg;base64,...) or a list of them"
_ABOUT = (
    "POST JSON in the shape of OpenAI's embeddings, or a form with the file fields `images`. `input` is a data URL of "
    "an image, or a text where the encoder reads texts, or a list; nothing is fetched from an address. `embedding` "
    "is `plain`, which compares with texts, or `adapted`, which compares images alone, of an encoder with an adapter. "
    "Embeddings are L2-normalised float32, as numbers or as base64 of little-endian bytes. One image that can't be "
    "embedded refuses the request."
)


class _Asked(msgspec.Struct, forbid_unknown_fields=True):
    """A request. `dimensions` have to be the encoder's; 0 stands for them, and _ANY for the model, in infinity-emb's
    clients. `user` says nothing here."""

    input: str | list[str] = []
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    modality: Literal["image", "text"] | None = None
    embedding: Literal["plain", "adapted"] = "plain"
    dimensions: int | None = None
    user: str | None = None


def make_router(site: Site) -> APIRouter:
    """The route /embeddings, which heads without an encoder refuse."""
    makes = not isinstance(site.described.uploads, RowUploads)
    router = APIRouter(tags=["embeddings"], include_in_schema=makes)

    @router.post(
        "/embeddings",
        response_model=schemas.EmbeddingsAnswer,
        openapi_extra=schemas.embeddings_body(site.settings.max_images),
        summary="Embed images and texts",
        description=_ABOUT,
    )
    async def embeddings(served: Annotated[ServedEncoder, Depends(served_of)], request: Request) -> Response:
        asked, inputs = await _read(served, request)
        width = _check(served, asked, inputs)
        request.scope["iosr_fast.images"] = len(inputs)
        deadline_s = served.settings.deadline_ms / 1e3
        try:
            results = await ask(served, request, inputs, deadline_s, classifier=())
        except Exception as error:
            raise known(served, error) from None
        for i, result in enumerate(results):
            if isinstance(result, BadImageError):
                raise ApiError(422, "bad_image", f"image number {i}: {result.reason}")
            if isinstance(result, Exception):
                raise known(served, result)
        rows = [_row(result, asked.embedding) for result in results]
        assert all(row.shape == (width,) for row in rows)
        return schemas.long_answer(await asyncio.to_thread(_answer, served.model, rows, asked.encoding_format))

    return router


async def _read(served: ServedEncoder, request: Request) -> tuple[_Asked, Sequence[Any]]:
    """A request and what is to be embedded. Raises ApiError."""
    if isinstance(served.uploads, RowUploads):
        raise ApiError(404, "no_encoder", "a head has no encoder: it takes embeddings and makes none")
    kind = content_type(request)
    if kind == "application/json":
        body = await request.body()
        try:
            asked = await asyncio.to_thread(msgspec.json.decode, body, type=_Asked)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ApiError(422, "invalid_parameters", f"expected {_JSON}: {error}") from None
        listed = [asked.input] if isinstance(asked.input, str) else asked.input
        return asked, await asyncio.to_thread(_parse, served, listed, asked.modality)
    names = ("model", "encoding_format", "embedding")
    images, fields = await served.uploads.read_form(request, *names)
    try:
        return msgspec.convert({name: values[0] for name, values in fields.items()}, _Asked), images
    except msgspec.ValidationError as error:
        raise ApiError(422, "invalid_parameters", str(error)) from None


def _parse(served: ServedEncoder, listed: list[str], modality: str | None) -> list[Any]:
    """The images and texts of JSON, checked but not decoded. Raises ApiError."""
    if len(listed) > (most := served.settings.max_images):
        raise ApiError(413, "too_many_images", f"expected at most {most} inputs, got {len(listed)}")
    inputs = list[Any]()
    for i, one in enumerate(listed):
        is_image = one.startswith("data:")
        if modality not in (None, "image" if is_image else "text") or one.startswith(("http://", "https://")):
            wanted = "data URLs of images" if modality == "image" else "texts, or data URLs of images"
            raise ApiError(422, "invalid_parameters", f"expected {wanted}, got {one[:40]!r} as input {i}")
        if not is_image:
            if not 0 < len(one) <= MAX_LENGTH:
                message = f"expected texts of 1 to {MAX_LENGTH} characters, got {len(one)} as input {i}"
                raise ApiError(422, "invalid_parameters", message)
            inputs.append(Text(one))
            continue
        head, _, content = one.partition(",")
        try:
            if not head.endswith(";base64"):
                raise ValueError("it has no ;base64")
            data = base64.b64decode(content, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ApiError(422, "bad_image", f"expected a data URL with base64 as input {i}: {error}") from None
        image = served.uploads.check(data)
        if isinstance(image, ApiError):
            raise ApiError(422, image.code, f"image number {i}: {image.detail}")
        inputs.append(image)
    return inputs


def _check(served: ServedEncoder, asked: _Asked, inputs: Sequence[Any]) -> int:
    """The channels of an embedding. Raises ApiError for a request that the encoder can't answer."""
    encoder, has_texts = served.batching.encoder, any(isinstance(one, Text) for one in inputs)
    if not inputs:
        raise ApiError(400, "no_image", f"expected {_JSON}, or a form with images; got none")
    if asked.model not in (None, _ANY, *served.models):
        raise ApiError(404, "no_model", f"expected the model {served.model!r}, got {asked.model!r:.80}")
    if asked.dimensions not in (None, 0, encoder.width):
        expected = f"expected the encoder's {encoder.width} dimensions, got {asked.dimensions}"
        raise ApiError(422, "invalid_parameters", f"{expected}; leave `dimensions` out")
    if asked.embedding == "adapted" and (has_texts or not encoder.adapted):
        why = "texts have none" if has_texts else "the encoder that is open here has none"
        raise ApiError(422, "no_adapted", f"expected embedding=plain, as {why}; serve an engine with an adapter")
    if has_texts and not served.batching.reads_texts:
        raise ApiError(422, "no_texts", "expected data URLs of images: the encoder here reads no texts")
    return encoder.width


def _row(result: Embeddings, kind: str) -> np.ndarray:
    rows = result.adapted if kind == "adapted" else result.plain
    return np.asarray(rows, "<f4")[0]


def _answer(model: str, rows: Sequence[np.ndarray], encoding: str) -> dict[str, Any]:
    """An EmbeddingsAnswer. Tokens are not counted: images have none."""
    made = [row.tolist() if encoding == "float" else base64.b64encode(row.tobytes()).decode() for row in rows]
    data = [{"object": "embedding", "embedding": one, "index": i} for i, one in enumerate(made)]
    usage, now = {"prompt_tokens": 0, "total_tokens": 0}, int(time.time())
    answer = {"object": "list", "data": data, "model": model, "usage": usage}
    return answer | {"id": f"iosr_fast-{uuid.uuid4()}", "created": now}
