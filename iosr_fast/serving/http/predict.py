"""POST /v1/predict: images in, predictions out."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from fastapi import APIRouter, Query
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from iosr_fast.exceptions import BadImageError, DeadlineExceededError, IosrFastError
from iosr_fast.head.predictions import Prediction
from iosr_fast.serving.http import schemas
from iosr_fast.serving.http.addresses import client_of
from iosr_fast.serving.http.errors import ApiError, busy, error_body, of_library
from iosr_fast.serving.http.lists import KEEP_QUERY
from iosr_fast.serving.http.service import Service
from iosr_fast.serving.http.uploads import Images
from iosr_fast.utils.text import abbreviate

_QUERY = ("top", "nearest", "unknown", "keep", "max_error", "deadline_ms", "boxes")
_IMAGES = (
    "Send one image as the body, or several as the file fields `images` of a form. Formats are JPEG, PNG and WebP, "
    "recognised by the first bytes; only the first frame of an animation is used. EXIF orientation is applied if it "
    "was when the classifier was fit. An image that can't be classified yields an error in its place (too_large, "
    "unsupported_type, too_many_pixels or bad_image) and does not affect the others. With `boxes` one image is "
    "sent, and each box gets a prediction or an error: of the part in it alone."
)
_BOXES = (
    "JSON, [[x, y, width, height], ...]: parts of the only image, upright; in pixels, or as shares of its sides "
    "where neither width nor height exceeds 1; in a form, a field"
)
_ALL_BAD = "All images are bad (see predictions), or a parameter is invalid"
_GRACE_S = 0.25  # beyond the deadline, for a batch that started before it


def make_router(served: Served) -> APIRouter:
    """The route /v1/predict, of a classifier, or of several, which a request names."""
    settings, several = served.settings, not isinstance(served, Service)
    model: Any = schemas.AllAnswers if several else schemas.PredictAnswer
    body, sentence, takes_images = None, "", True
    if isinstance(served, Service):
        body, sentence, takes_images = served.uploads.body, served.uploads.sentence, served.takes_changes
    router = APIRouter(tags=["predict"])

    @router.post(
        "/v1/predict",
        response_model=model,
        responses={422: {"model": model | schemas.ErrorAnswer, "description": _ALL_BAD}},
        openapi_extra=body or schemas.image_body(settings.max_images),
        summary="Classify images",
        description=(
            f"{sentence or _IMAGES} With unknown=reject, `unknown` has a score, and `label` and "
            "`class_id` are null if the image belongs to none of the classes. With max_error, `accepted` says whether "
            "nobody needs to look at the label: of accepted ones at most this share is wrong, with 95% confidence. 422 "
            "(no_promise) where there are too few support images for `keep` or `max_error`."
            + (" This server keeps whole uploads that need a look, for labelling." if settings.collect else "")
        ),
    )
    async def predict(
        request: Request,
        classifier: list[str] = Query(... if several else [], description=_NAMES, include_in_schema=several),
        top: int = Query(5, ge=1, le=100, description="classes to return, best first"),
        nearest: int = Query(0, ge=0, le=100, description="nearest support images to return"),
        unknown: Literal["reject"] | None = Query(None, description="reject images of none of the classes"),
        keep: float = KEEP_QUERY,
        max_error: float | None = Query(
            None, gt=0, lt=1, description="share of wrong labels that accepted ones may have [default: the server's]"
        ),
        deadline_ms: int = Query(
            settings.deadline_ms,
            ge=1,
            le=settings.max_deadline_ms,
            description="time allowed for the answer, from the request's last byte",
        ),
        boxes: str | None = Query(None, description=_BOXES, include_in_schema=takes_images),
    ) -> Response:
        _check_query(request, several)
        asked = {"top": top, "nearest": nearest, "client": client_of(request.client), "max_error": max_error}
        asked |= {"keep": None if unknown is None else keep, "deadline_s": deadline_ms / 1e3}
        if isinstance(served, Front):
            return await _ask_each(served, classifier, request, boxes, asked)
        assert isinstance(served, Service)
        try:
            served.batching.check_room(asked["client"])  # before the body is read, which makes refusals cheap
            images = await served.uploads.read_images(request, boxes)
            start = time.perf_counter()
            results = await _classify([served], request, images, asked)
        except IosrFastError as error:
            raise _request_error(served, error) from None
        version, predictions = _answer(served, images, results)
        latency_ms = round((time.perf_counter() - start) * 1e3, 3)
        answer = {"version": version or served.classifier.version, "latency_ms": latency_ms, "predictions": predictions}
        return schemas.long_answer(answer, 200 if version else 422)

    return router


async def _ask_each(
    front: Front, names: list[str], request: Request, boxes: str | None, asked: dict[str, Any]
) -> Response:
    """The answers of several classifiers. Those of one engine are asked together, so that it encodes an image once; one
    that fails leaves the others' answers whole."""
    if len(set(names)) < len(names):
        raise ApiError(422, "invalid_parameters", f"expected each classifier once, got {abbreviate(names)}")
    outcomes: dict[str, Any] = dict.fromkeys(names)  # a version and predictions, or an error
    engines: dict[Any, list[Service]] = {}
    for name in names:
        if name in front.refused:
            outcomes[name] = front.refusal(name)
            continue
        service = front.find(name)
        try:
            Abstention(asked["keep"], max_error=asked["max_error"]).check(service.head)
            service.batching.check_room(asked["client"])
            engines.setdefault(service.batching, []).append(service)
        except IosrFastError as error:
            outcomes[name] = error
    if engines:
        await request.body()  # once
    start, reading = time.perf_counter(), dict[tuple[Service, ...], Images]()
    for services in engines.values():
        try:
            reading[*services] = await services[0].uploads.read_images(request, boxes)
        except ApiError as error:
            outcomes |= dict.fromkeys((one.name for one in services), error)
    classifying = [_classify(services, request, images, asked) for services, images in reading.items()]
    results = await asyncio.gather(*classifying, return_exceptions=True)
    for (services, images), result in zip(reading.items(), results, strict=True):
        for i, service in enumerate(services):
            try:
                if isinstance(result, BaseException):
                    raise result
                own = [one[i] if isinstance(one, tuple) else one for one in result]
                outcomes[service.name] = _answer(service, images, own)
            except ClientDisconnect:
                raise
            except Exception as error:
                outcomes[service.name] = error
    ...


async def _classify(
    services: Sequence[Service], request: Request, images: Images, asked: dict[str, Any]
) -> Sequence[Any]:
    """Of each image a prediction or an error; of several services, which share an engine, a tuple of these or an error.
    A client that disconnects gives up its places in the queue."""
    request.scope["iosr_fast.images"] = len(images)
    good = [image for image in images if not isinstance(image, ApiError)]
    if not good:
        return []
    names, deadline_s = tuple(one.name for one in services), asked["deadline_s"]
    ...
async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _answer(service: Service, images: Images, results: Sequence[Prediction | Exception], start: float) -> Response:
    predictions: list[Prediction | dict[str, Any]] = []
    version = 0
    classified = iter(results)
    for image in images:
        result = image if isinstance(image, ApiError) else next(classified)
        if isinstance(result, Prediction):
            if not math.isfinite(result.probability):  # a logit is not
                raise ValueError(f"expected finite logits, got a probability {result.probability} of {result.label!r}")
            version = max(version, result.version)
            service.metrics.on_prediction(result)
            service.recent.add(result)
            predictions.append(result)
            continue
        if isinstance(result, BadImageError):
            result = ApiError(422, "bad_image", result.reason)
        if not isinstance(result, ApiError):
            raise _request_error(service, result)
        service.metrics.on_error(result.code)
        predictions.append(error_body(result.code, result.detail))
    latency_ms = round((time.perf_counter() - start) * 1e3, 3)
    body = {"version": version or service.classifier.version, "latency_ms": latency_ms, "predictions": predictions}
    return schemas.long_answer(body, 200 if version else 422)


def _request_error(service: Service, error: Exception) -> Exception:
    """The error of the whole request, for one of the queue or of an image that did not cause it."""
    known = of_library(error, "no_promise")
    if known is error and not service.batching.healthy:
        return busy("engine_failed", "the engine fails at present; try again, or use another server", 5)
    return known
