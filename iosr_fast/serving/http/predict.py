"""POST /v1/predict: images in, predictions out."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, Query
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from iosr_fast.exceptions import BadImageError, DeadlineExceededError, IosrFastError
from iosr_fast.head.predictions import Prediction
from iosr_fast.head.verdict import Abstention
from iosr_fast.methods.unknown import KEEP
from iosr_fast.serving.http import schemas
from iosr_fast.serving.http.addresses import client_of
from iosr_fast.serving.http.errors import ApiError, busy, error_body, internal_error, of_library
from iosr_fast.serving.http.lists import KEEP_QUERY
from iosr_fast.serving.http.logs import CLASSIFIER, logger
from iosr_fast.serving.http.middleware import BODY
from iosr_fast.serving.http.service import Front, Served, Service
from iosr_fast.serving.http.uploads import Images
from iosr_fast.utils.text import abbreviate

if TYPE_CHECKING:
    from iosr_fast.serving.batching import BatchingClassifier

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
_NAMES = "classifier of /v1/classifiers to ask; may be repeated: the images are encoded once, and each one answers"
_ALL_BAD = "All images are bad (see predictions), or a parameter is invalid"
_GRACE_S = 0.25  # beyond the deadline, for a batch that started before it


def make_router(served: Served) -> APIRouter:
    """The route /v1/predict, of a classifier, or of several, which a request names."""
    settings, several = served.settings, not isinstance(served, Service)
    model: Any = schemas.PredictAnswers if several else schemas.PredictAnswer
    names: Any = Query(... if several else [], description=_NAMES, include_in_schema=several)
    router = APIRouter(tags=["predict"])

    @router.post(
        "/v1/predict",
        response_model=model,
        responses={422: {"model": model | schemas.ErrorAnswer, "description": _ALL_BAD}},
        openapi_extra=served.uploads.body or schemas.image_body(settings.max_images),
        name="predict_by_several" if several else "predict",
        summary="Classify images",
        description=(
            f"{served.uploads.sentence or _IMAGES} With unknown=reject, `unknown` has a score, and `label` and "
            "`class_id` are null if the image belongs to none of the classes. With max_error, `accepted` says whether "
            "nobody needs to look at the label: of accepted ones at most this share is wrong, with 95% confidence. 422 "
            "(no_promise) where there are too few support images for `keep` or `max_error`. A classifier that was "
            "fitted with several labels a picture answers with all of them as `top`, the most likely first, or none; "
            "`label` is the first of them, `accepted` a list with an entry for each, and unknown=reject is refused "
            "(no_promise)."
            + (" This server keeps whole uploads that need a look, for labelling." if settings.collect else "")
        ),
    )
    async def predict(
        request: Request,
        classifier: list[str] = names,
        top: int = Query(
            5,
            ge=1,
            le=100,
            description="classes to return, best first; all labels of an image where it may have several",
        ),
        nearest: int = Query(0, ge=0, le=100, description="nearest support images to return"),
        unknown: Literal["reject"] | None = Query(None, description="reject images of none of the classes"),
        keep: float | None = KEEP_QUERY,
        max_error: float | None = Query(
            None, gt=0, lt=1, description="share of wrong labels that accepted ones may have [default: the server's]"
        ),
        deadline_ms: int = Query(
            settings.deadline_ms,
            ge=1,
            le=settings.max_deadline_ms,
            description="time allowed for the answer, from the request's last byte",
        ),
        boxes: str | None = Query(None, description=_BOXES, include_in_schema=served.takes_changes),
    ) -> Response:
        _check_query(request, several)
        asked: dict[str, Any] = {"top": top, "nearest": nearest, "max_error": max_error}
        asked |= {"client": client_of(request.client), "deadline_s": deadline_ms / 1e3}
        asked["keep"] = None if unknown is None else keep or KEEP
        try:
            if isinstance(served, Front):
                return schemas.long_answer(*await _ask_several(served, classifier, request, boxes, asked))
            assert isinstance(served, Service)
            images = await served.uploads.read_images(request, boxes)
            results = await _classify(served, request, images, {"classifier": served.name, **asked})
        except IosrFastError as error:
            raise _request_error(served, error) from None
        return schemas.long_answer(*_answer(served, request, images, results))

    return router


def _check_query(request: Request, several: bool) -> None:
    """Refuse a misspelt, repeated or useless parameter: images of no class would keep a label without a word."""
    counts = Counter(name for name, _ in request.query_params.multi_items())
    if several:
        del counts["classifier"]
    if wrong := [name for name, count in counts.items() if count > 1 or name not in _QUERY]:
        message = f"expected the query parameters {', '.join(_QUERY)}, each at most once, got {abbreviate(wrong)}"
        raise ApiError(422, "invalid_parameters", message)
    if "keep" in counts and "unknown" not in counts:
        raise ApiError(422, "invalid_parameters", "expected the query parameter keep only with unknown=reject")


async def _classify(service: Service, request: Request, images: Images, asked: dict[str, Any]) -> Sequence[Any]:
    """What BatchingClassifier gives for each image that is no error. A client that disconnects gives up its places in
    the queue."""
    request.scope["iosr_fast.images"] = len(images)
    if asked["keep"] is not None:
        await service.serve_unknown()
    good = [image for image in images if not isinstance(image, ApiError)]
    if not good:
        return []
    asked["deadline_s"] -= _since_body(request)
    if asked["deadline_s"] <= 0:
        raise DeadlineExceededError("no answer in time")
    task = asyncio.ensure_future(service.batching.classify_many(good, **asked))
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, timeout=asked["deadline_s"] + _GRACE_S, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect if gone.done() else DeadlineExceededError("no answer in time")
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _since_body(request: Request) -> float:
    """Seconds since the last byte of a request."""
    return time.perf_counter() - float(request.scope[BODY].whole_at)


def _answer(service: Service, request: Request, images: Images, results: Sequence[Any]) -> tuple[dict[str, Any], int]:
    """A PredictAnswer, and its status. Where it raises, nothing is counted."""
    classified, answers = iter(results), list[Prediction | ApiError]()
    for image in images:
        result = image if isinstance(image, ApiError) else next(classified)
        if isinstance(result, BadImageError):
            result = ApiError(422, "bad_image", result.reason)
        if not isinstance(result, Prediction | ApiError):
            raise _request_error(service, result)
        if isinstance(result, Prediction) and not math.isfinite(result.probability):  # a logit is not
            raise ValueError(f"expected finite logits, got a probability {result.probability} of {result.label!r}")
        answers.append(result)
    good, several = [one for one in answers if isinstance(one, Prediction)], service.head.is_multi_label
    for one in good:
        service.metrics.on_prediction(*(one.top if several else [one] if one.label is not None else ()))
        service.recent.add(one)
    body = {
        "version": max((one.version for one in good), default=service.classifier.version),
        "latency_ms": round(_since_body(request) * 1e3, 3),
        "predictions": [_in_place(service, one) if isinstance(one, ApiError) else one for one in answers],
    }
    return body, 200 if good else 422


def _in_place(served: Served, error: ApiError) -> dict[str, Any]:
    """An error in the place of an answer, which is counted."""
    served.metrics.on_error(error.code)
    return error_body(error.code, error.detail)


def _request_error(service: Served, error: Exception) -> Exception:
    """The error of the whole request, for one of the queue or of an image that did not cause it."""
    known = of_library(error, "no_promise")
    if known is error and isinstance(service, Service) and service.failure:
        return busy("engine_failed", "the engine fails at present; try again, or use another server", 5)
    return known


async def _ask_several(
    front: Front, names: list[str], request: Request, boxes: str | None, asked: dict[str, Any]
) -> tuple[dict[str, Any], int]:
    """A PredictAnswers, with an error in the place of a classifier that has no answer, and its status. Those of one
    engine are asked together. Raises the error of the first one where none has an answer."""
    if len(set(names)) < len(names):
        raise ApiError(422, "invalid_parameters", f"expected each classifier once, got {abbreviate(names)}")
    answers: dict[str, Any] = {name: front.find(name) for name in names}
    engines: dict[BatchingClassifier, list[Service]] = {}
    for name, found in answers.items():
        if isinstance(found, ApiError) and found.status_code == 404:
            raise found
        if isinstance(found, Service):
            try:
                if asked["keep"] is not None:
                    await found.serve_unknown()
                Abstention(asked["keep"], max_error=asked["max_error"]).check(found.head)
                engines.setdefault(found.batching, []).append(found)
            except IosrFastError as error:
                answers[name] = _failed(found, error)
    if engines:
        await request.body()  # here, because an error in it is one of the request
    for part in await asyncio.gather(*(_ask_engine(services, request, boxes, asked) for services in engines.values())):
        answers |= part
    statuses = [answer[1] for answer in answers.values() if not isinstance(answer, ApiError)]
    if not statuses:
        raise answers[names[0]]
    bodies = {
        name: _in_place(front.services.get(name, front), answer) if isinstance(answer, ApiError) else answer[0]
        for name, answer in answers.items()
    }
    return {"classifiers": bodies}, min(statuses)


async def _ask_engine(
    services: Sequence[Service], request: Request, boxes: str | None, asked: dict[str, Any]
) -> dict[str, Any]:
    """The _answer of each, or an ApiError."""
    answers = dict[str, Any]()
    try:
        images = await services[0].uploads.read_images(request, boxes)
        names = tuple(service.name for service in services)
        results = await _classify(services[0], request, images, {"classifier": names, **asked})
    except ClientDisconnect:
        raise
    except Exception as error:
        return {service.name: _failed(service, error) for service in services}
    for i, service in enumerate(services):
        CLASSIFIER.set(service.name)
        own = [result[i] if isinstance(result, tuple) else result for result in results]
        try:
            answers[service.name] = _answer(service, request, images, own)
        except Exception as error:
            answers[service.name] = _failed(service, error)
    return answers


def _failed(service: Service, error: Exception) -> ApiError:
    """The answer of one of several classifiers that fails."""
    known = error if isinstance(error, ApiError) else _request_error(service, error)
    if not isinstance(known, ApiError):
        logger.error("unexpected", exc_info=error, extra={"facts": {"classifier": service.name}})
        known = internal_error()
    return known
