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


def make_router(service: Service) -> APIRouter:
    """The route /v1/predict."""
    settings = service.settings
    router = APIRouter(tags=["predict"])

    @router.post(
        "/v1/predict",
        response_model=schemas.PredictAnswer,
        responses={422: {"model": schemas.PredictAnswer | schemas.ErrorAnswer, "description": _ALL_BAD}},
        openapi_extra=service.uploads.body or schemas.image_body(settings.max_images),
        summary="Classify images",
        description=(
            f"{service.uploads.sentence or _IMAGES} With unknown=reject, `unknown` has a score, and `label` and "
            "`class_id` are null if the image belongs to none of the classes. With max_error, `accepted` says whether "
            "nobody needs to look at the label: of accepted ones at most this share is wrong, with 95% confidence. 422 "
            "(no_promise) where there are too few support images for `keep` or `max_error`."
            + (" This server keeps whole uploads that need a look, for labelling." if settings.collect else "")
        ),
    )
    async def predict(
        request: Request,
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
        boxes: str | None = Query(None, description=_BOXES, include_in_schema=service.takes_changes),
    ) -> Response:
        _check_query(request)
        client = client_of(request.client)
        try:
            service.batching.check_room(client)  # before the body is read, which makes refusals cheap
            images = await service.uploads.read_images(request, boxes)
            start = time.perf_counter()
            request.scope["iosr_fast.images"] = len(images)
            good = [image for image in images if not isinstance(image, ApiError)]
            asked = {"top": top, "nearest": nearest, "client": client, "max_error": max_error}
            asked["keep"] = None if unknown is None else keep
            results = await _classify(service, request, good, deadline_ms / 1e3, asked)
        except IosrFastError as error:
            raise _request_error(service, error) from None
        return _answer(service, images, results, start)

    return router


def _check_query(request: Request) -> None:
    """Refuse a misspelt, repeated or useless parameter: images of no class would keep a label without a word."""
    counts = Counter(name for name, _ in request.query_params.multi_items())
    if wrong := [name for name, count in counts.items() if count > 1 or name not in _QUERY]:
        message = f"expected the query parameters {', '.join(_QUERY)}, each at most once, got {abbreviate(wrong)}"
        raise ApiError(422, "invalid_parameters", message)
    if "keep" in counts and "unknown" not in counts:
        raise ApiError(422, "invalid_parameters", "expected the query parameter keep only with unknown=reject")


async def _classify(
    service: Service, request: Request, images: Sequence[Any], deadline_s: float, options: dict[str, Any]
) -> Sequence[Prediction | Exception]:
    """A prediction or an error of each image. A client that disconnects gives up its places in the queue."""
    if not images:
        return []
    task = asyncio.ensure_future(service.batching.classify_many(images, deadline_s=deadline_s, **options))
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, timeout=deadline_s + _GRACE_S, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect if gone.done() else DeadlineExceededError("no answer in time")
    finally:
        task.cancel()
        gone.cancel()


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
