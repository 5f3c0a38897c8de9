"""The forms of requests and answers, for OpenAPI. Predictions are written without them, which is cheaper."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class ErrorInfo(BaseModel):
    """`code` is for programs, `message` for people."""

    code: str
    message: str


class ErrorAnswer(BaseModel):
    error: ErrorInfo


class ClassScore(BaseModel):
    """logit = zero_shot + cache: what the texts say, and what the support images add."""

    label: str
    class_id: str
    probability: float = Field(ge=0, le=1.0001)
    logit: float
    zero_shot: float
    cache: float


class Neighbour(BaseModel):
    """A support image near the query, by the cosine."""

    example_id: str
    label: str
    class_id: str
    similarity: float


class Prediction(ClassScore):
    """One image's label, and why."""

    top: list[ClassScore]
    nearest: list[Neighbour]
    version: int


class PredictAnswer(BaseModel):
    """`predictions` in the order of the images, each a prediction or what is wrong with that image; `latency_ms` from
    the request's last byte to its answer; `version` of the classes, the highest where two batches answered."""

    version: int
    latency_ms: float
    predictions: list[Prediction | ErrorAnswer]


class ClassInfo(BaseModel):
    class_id: str
    name: str
    examples: int


class ClassesAnswer(BaseModel):
    """A page of the `total` classes in the order of their ids; `next` is the `after` of the next page, null if there
    is none."""

    version: int
    total: int
    classes: list[ClassInfo]
    next: str | None


class ExamplesAnswer(BaseModel):
    """A page of a class's support images; `next` as for classes."""

    version: int
    class_id: str
    example_ids: list[str]
    next: str | None


class ChangeAnswer(BaseModel):
    """The version a change made; `class_id` is "" where it is about no class, `example_ids` came or went."""

    version: int
    class_id: str
    example_ids: list[str]


class StateAnswer(BaseModel):
    status: str
    detail: str = ""


class Rename(BaseModel):
    """`keep_text` changes what is shown and not what the class's text embedding is made of."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=200)
    keep_text: bool = False


_TOLD = {
    400: "The request is damaged, or lacks something",
    401: "The token is missing or wrong",
    403: "No token is set on the server: nobody can change classes",
    404: "There is no such class or example",
    408: "The body came too slowly",
    409: "The name is taken",
    413: "The body, or the number of images, is too large",
    415: "A Content-Type or Content-Encoding that is not taken",
    422: "A parameter or an image is refused",
    500: "The server failed",
    503: "Too much to do, loading, or shutting down: try again after Retry-After seconds",
    504: "The deadline passed before there was an answer",
    507: "The change was not made, because it can't be logged; predictions are still answered",
}
_RETRY = {"Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 1}}}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's responses for these statuses."""
    told: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        told[status] = {"model": ErrorAnswer, "description": _TOLD[status]}
        if status == 503:
            told[status]["headers"] = _RETRY
    return told


_IMAGE = {"type": "string", "format": "binary"}


def form_schema(texts: dict[str, dict[str, Any]], least: int, most: int) -> dict[str, Any]:
    """A multipart form with `images` and text fields."""
    images = {"type": "array", "items": _IMAGE, "minItems": least, "maxItems": most}
    required = [*texts, *(["images"] if least else [])]
    return {"schema": {"type": "object", "properties": {**texts, "images": images}, "required": required}}


def form_body(texts: dict[str, dict[str, Any]], least: int, most: int) -> dict[str, Any]:
    """openapi_extra of a route that takes such a form."""
    return {"requestBody": {"required": True, "content": {"multipart/form-data": form_schema(texts, least, most)}}}


def image_body(most: int) -> dict[str, Any]:
    """openapi_extra of a route that takes one image as it is, or a form with several."""
    one = {"schema": _IMAGE}
    content = {kind: one for kind in ("image/jpeg", "image/png", "image/webp", "application/octet-stream")}
    content["multipart/form-data"] = form_schema({}, 1, most)
    return {"requestBody": {"required": True, "content": content}}
