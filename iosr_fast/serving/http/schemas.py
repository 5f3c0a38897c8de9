"""Models of requests and answers, for OpenAPI. What may be long (predictions, pages of lists) is written by msgspec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
from pydantic import BaseModel
from starlette.responses import Response

from iosr_fast.head.head import ClassInfo
from iosr_fast.head.predictions import Prediction


class ErrorInfo(BaseModel):
    """`code` is for programs, `message` for people."""

    code: str
    message: str


class ErrorAnswer(BaseModel):
    """The body of every error."""

    error: ErrorInfo


# `responses` of all routes. No "default": a generated client would read a picture, whose type it does not know, as one.
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "An error of the request. 401 and 403: no or a wrong token."},
    "5XX": {
        "model": ErrorAnswer,
        "description": (
            "An error of the server. 503: overloaded, loading or shutting down, try again after Retry-After seconds. "
            "504: the deadline passed. 507: a change was not made because it can't be logged; predictions continue."
        ),
        "headers": {"Retry-After": {"description": "of a 503", "schema": {"type": "integer", "minimum": 1}}},
    },
}


class PredictAnswer(BaseModel):
    """`predictions` has a prediction or an error for each image, in order. `latency_ms` is the time from the request's
    last byte to its answer. `version` is that of the classes, the highest one if several batches answered."""

    version: int
    latency_ms: float
    predictions: list[Prediction | ErrorAnswer]


class PredictAnswers(BaseModel):
    """For each classifier that was asked, in this order, its answer, or the error with which it failed."""

    classifiers: dict[str, PredictAnswer | ErrorAnswer]


@dataclass(frozen=True)
class Listed:
    """A classifier of several. `error` is why it does not answer, null if it does; of one that could not be opened
    nothing else is known. `model` is null of a head, which takes embeddings."""

    name: str
    error: str | None
    classes: int | None = None
    version: int | None = None
    model: str | None = None
    method: str | None = None


@dataclass(frozen=True)
class ClassifiersAnswer:
    """All classifiers of the server."""

    classifiers: list[Listed]


class Measured(BaseModel):
    """How many left-out images are right: `accuracy` of `images`, with its 95% `interval` (null if none could be left
    out); `summary` in words; `stale` if the classes have changed since."""

    accuracy: float | None
    interval: tuple[float, float] | None
    images: int
    protocol: str
    summary: str
    stale: bool


class Promise(BaseModel):
    """Whether rejection can keep a share `keep` of the pictures of known classes, and why, in a `sentence`."""

    promised: bool
    keep: float
    sentence: str


class Checked(BaseModel):
    """What checks of a random sample of accepted labels say of `max_error`: how many were checked, how many of them are
    `wrong`, and whether the promise is `refuted`. `beside` are labels of other pictures, which do not count."""

    checks: int
    wrong: int
    e_value: float
    refuted: bool
    beside: int
    sentence: str


class ClassifierAnswer(BaseModel):
    """`model` is the encoder. `measured` is null where nothing was. `doubts` say what speaks against promises.
    `max_error` is the share of wrong labels that accepted ones may have, where a request names none; null if labels are
    then not judged. `collects` is whether uploads that need a look are kept on the server, for labelling. `checked` is
    null unless it keeps a sample of accepted ones, too. `note` says when pictures have become stranger than the
    examples. `several_labels` is left out unless it is true: pictures may have several labels, or none, and
    `measured` counts labels."""

    version: int
    model: str | None
    method: str
    classes: int
    examples: int
    measured: Measured | None
    doubts: list[str]
    unknown: Promise
    max_error: float | None
    collects: bool
    checked: Checked | None
    note: str
    several_labels: bool = False


@dataclass(frozen=True)
class ClassesAnswer:
    """A page of the `total` classes in order of their ids; `next` is `after` of the next page, null on the last."""

    version: int
    total: int
    classes: list[ClassInfo]
    next: str | None


@dataclass(frozen=True)
class ExamplesAnswer:
    """A page of a class's support images; `next` as for classes."""

    version: int
    class_id: str
    example_ids: list[str]
    next: str | None


@dataclass(frozen=True)
class ExampleInfo:
    """A support image and its classes: one, or where pictures may have several labels any number."""

    example_id: str
    class_ids: list[str]


@dataclass(frozen=True)
class LabelledExamplesAnswer:
    """A page of the `total` support images that were asked for, in order of their ids; `next` as for classes."""

    version: int
    total: int
    examples: list[ExampleInfo]
    next: str | None


class EmbeddingItem(BaseModel):
    """An embedding: numbers, or base64 of little-endian float32."""

    object: str
    embedding: list[float] | str
    index: int


class Usage(BaseModel):
    """Always 0: tokens are not counted."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(BaseModel):
    """Embeddings in the order of what was sent, as OpenAI and infinity-emb answer."""

    object: str
    data: list[EmbeddingItem]
    model: str
    usage: Usage
    id: str
    created: int


class StateAnswer(BaseModel):
    """`status` is "ok" or the reason for a 503; `detail` explains it."""

    status: str
    detail: str = ""


def long_answer(answer: Any, status: int = 200) -> Response:
    """Dataclasses and dicts as JSON, in a tenth of json's time. Numbers have to be finite: NaN would become null."""
    return Response(msgspec.json.encode(answer), status, media_type="application/json")


_IMAGE = {"type": "string", "format": "binary"}


def images_field(least: int, most: int) -> dict[str, Any]:
    """The field `images` of a form_body."""
    return {"images": {"type": "array", "items": _IMAGE, "minItems": least, "maxItems": most}}


def form_body(fields: dict[str, dict[str, Any]], *required: str) -> dict[str, Any]:
    """openapi_extra of a route that takes a multipart form."""
    schema = {"type": "object", "properties": fields, "additionalProperties": False}
    form = {"schema": {**schema, "required": required} if required else schema}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": form}}}


def embeddings_body(max_images: int) -> dict[str, Any]:
    """openapi_extra of a route that takes data URLs and texts as JSON, or images in a form."""
    text, encoding = {"type": "string"}, {"type": "string", "enum": ["float", "base64"]}
    kind = {"type": "string", "enum": ["plain", "adapted"]}
    options: dict[str, Any] = {"model": text, "encoding_format": encoding, "embedding": kind}
    several = {"type": "array", "items": text, "minItems": 1, "maxItems": max_images}
    more = {"modality": {"type": "string", "enum": ["image", "text"]}, "dimensions": {"type": "integer"}, "user": text}
    fields = {"input": {"anyOf": [text, several]}, **options, **more}
    body = form_body(options | images_field(1, max_images), "images")
    schema = {"type": "object", "properties": fields, "additionalProperties": False, "required": ["input"]}
    body["requestBody"]["content"]["application/json"] = {"schema": schema}
    return body


def image_body(max_images: int) -> dict[str, Any]:
    """openapi_extra of a route that takes one image as the body, or a form with several."""
    boxes = {"boxes": {"type": "string", "contentMediaType": "application/json"}}
    body = form_body(boxes | images_field(1, max_images), "images")
    for kind in ("image/jpeg", "image/png", "image/webp", "application/octet-stream"):
        body["requestBody"]["content"][kind] = {"schema": _IMAGE}
    return body
