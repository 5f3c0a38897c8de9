"""POST /predict of a classifier, or of several that a request names: images in, predictions out."""

# Without `from __future__ import annotations`: models of queries depend on the server's settings, in a function.

import asyncio
import math
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from iosr_fast.exceptions import BadImageError, DeadlineExceededError, IosrFastError
from iosr_fast.head.predictions import Prediction
from iosr_fast.head.verdict import Abstention
from iosr_fast.methods.unknown import KEEP
from iosr_fast.serving.batching import BatchingClassifier
from iosr_fast.serving.http import schemas
from iosr_fast.serving.http.addresses import client_of
from iosr_fast.serving.http.errors import ApiError, busy, error_body, internal_error, of_library
from iosr_fast.serving.http.lists import KEEP_SHARE
from iosr_fast.serving.http.logs import CLASSIFIER, logger
from iosr_fast.serving.http.metrics import ClassifierMetrics
from iosr_fast.serving.http.middleware import BODY, Served
from iosr_fast.serving.http.site import ServedClassifier, ServedEncoder, Site
from iosr_fast.serving.http.uploads import Images
from iosr_fast.serving.limits import Deadlines
from iosr_fast.utils.text import abbreviate

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


class PredictQuery(BaseModel):
    """The query of a prediction; `deadline_ms` is bounded by the settings of a server."""

    model_config = ConfigDict(extra="forbid")  # with a misspelt `unknown` images of no class would keep a label

    top: int = Field(
        5, ge=1, le=100, description="classes to return, best first; all labels of an image where it may have several"
    )
    nearest: int = Field(0, ge=0, le=100, description="nearest support images to return")
    unknown: Literal["reject"] | None = Field(None, description="reject images of none of the classes")
    keep: float | None = Field(None, gt=0, lt=1, description=KEEP_SHARE)
    max_error: float | None = Field(
        None, gt=0, lt=1, description="share of wrong labels that accepted ones may have [default: the server's]"
    )
    deadline_ms: int = 0

    @model_validator(mode="after")
    def _check_keep(self) -> Self:
        if self.keep is not None and self.unknown is None:
            raise ValueError("expected keep only with unknown=reject")
        return self

    @property
    def abstention(self) -> Abstention:
        return Abstention(None if self.unknown is None else self.keep or KEEP, max_error=self.max_error)

    @classmethod
    def bounded(cls, site: Site, **fields: Any) -> Any:
        """This model with more `fields`: the deadline of a site, and where it takes images, boxes."""
        text, most = "time allowed for the answer, from the request's last byte", site.settings.max_deadline_ms
        deadline = Field(site.settings.deadline_ms, ge=1, le=most, description=text)
        more: Any = {"boxes": (str | None, Field(None, description=_BOXES))} if site.described.takes_changes else {}
        return create_model(cls.__name__, __base__=cls, deadline_ms=(int, deadline), **more, **fields)


def make_router(site: Site) -> APIRouter:
    """The route /predict of a classifier."""
    router, model = APIRouter(tags=["predict"]), PredictQuery.bounded(site)

    @router.post("/predict", name="predict", **_described(site, schemas.PredictAnswer))
    async def predict(served: Served, request: Request, query: Annotated[model, Query()]) -> Response:  # type: ignore[valid-type]
        _check_once(request)
        (answer,) = (await _ask([served], request, query)).values()
        if isinstance(answer, Exception):
            raise answer
        return schemas.long_answer(*answer)

    return router


def make_router_of_several(site: Site) -> APIRouter:
    """The route /v1/predict, of classifiers that a request names."""
    names = (list[str], Field(description=_NAMES, min_length=1))
    router, model = APIRouter(tags=["predict"]), PredictQuery.bounded(site, classifier=names)

    @router.post("/v1/predict", name="predict_by_several", **_described(site, schemas.PredictAnswers))
    async def predict(request: Request, query: Annotated[model, Query()]) -> Response:  # type: ignore[valid-type]
        _check_once(request, "classifier")
        return schemas.long_answer(*await _ask_several(site, request, query))

    return router


def _described(site: Site, model: Any) -> dict[str, Any]:
    """What OpenAPI says of a route with this answer."""
    uploads = site.described.uploads
    return {
        "response_model": model,
        "responses": {422: {"model": model | schemas.ErrorAnswer, "description": _ALL_BAD}},
        "openapi_extra": uploads.body or schemas.image_body(site.settings.max_images),
        "summary": "Classify images",
        "description": f"{uploads.sentence or _IMAGES} With unknown=reject, `unknown` has a score, and `label` and "
        "`class_id` are null if the image belongs to none of the classes. With max_error, `accepted` says whether "
        "nobody needs to look at the label: of accepted ones at most this share is wrong, with 95% confidence. 422 "
        "(no_promise) where there are too few support images for `keep` or `max_error`. A classifier that was "
        "fitted with several labels a picture answers with all of them as `top`, the most likely first, or none; "
        "`label` is the first of them, `accepted` a list with an entry for each, and unknown=reject is refused "
        "(no_promise)."
        + (" This server keeps whole uploads that need a look, for labelling." if site.settings.collect else ""),
    }


def _check_once(request: Request, *repeated: str) -> None:
    """Refuse a query parameter that stands twice, of which the framework takes one."""
    names = [name for name, _ in request.query_params.multi_items() if name not in repeated]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ApiError(422, "invalid_parameters", f"expected each query parameter once, got {abbreviate([*twice])}")


async def _ask_several(site: Site, request: Request, query: Any) -> tuple[dict[str, Any], int]:
    """A PredictAnswers, with an error in the place of a classifier that has no answer, and its status. Those of one
    engine are asked together. Raises the error of the first one where none has an answer."""
    names = query.classifier
    if len(set(names)) < len(names):
        raise ApiError(422, "invalid_parameters", f"expected each classifier once, got {abbreviate(names)}")
    answers = dict[str, Any]()
    engines: dict[BatchingClassifier, list[ServedClassifier]] = {}
    for name in names:
        try:
            served: Any = site.find(name)
            engines.setdefault(served.batching, []).append(served)
        except ApiError as error:
            if error.status_code == 404:
                raise
            answers[name] = error
    if engines:
        await request.body()  # here, because an error in it is one of the request
    for part in await asyncio.gather(*(_ask(group, request, query) for group in engines.values())):
        answers |= part
    statuses = [answer[1] for answer in answers.values() if not isinstance(answer, Exception)]
    if not statuses:
        raise answers[names[0]]
    bodies = dict[str, Any]()
    for name in names:
        answer, metrics = answers[name], site.served[name].metrics if name in site.served else site.server_metrics
        if isinstance(answer, Exception) and not isinstance(answer, ApiError):
            logger.error("unexpected", exc_info=answer, extra={"facts": {"classifier": name}})
            answer = internal_error()
        bodies[name] = _in_place(metrics, answer) if isinstance(answer, ApiError) else answer[0]
    return {"classifiers": bodies}, min(statuses)


async def _ask(group: Sequence[ServedClassifier], request: Request, query: Any) -> dict[str, Any]:
    """For each of some classifiers on one engine a PredictAnswer and its status, or the exception that it answers."""
    answers = dict[str, Any]()
    asked = list[ServedClassifier]()
    try:
        images = await group[0].uploads.read_images(request, getattr(query, "boxes", None))
        request.scope["iosr_fast.images"] = len(images)
        good = [image for image in images if not isinstance(image, ApiError)]
        for served in group:
            try:
                if good:
                    await _check_promise(served, query.abstention)
                asked.append(served)
            except IosrFastError as error:
                answers[served.name] = error
        results: Sequence[Any] = []
        if good and asked:
            options = {"top": query.top, "nearest": query.nearest, "max_error": query.max_error}
            options |= {"keep": query.abstention.keep, "classifier": tuple(served.name for served in asked)}
            results = await ask(asked[0], request, good, query.deadline_ms / 1e3, **options)
    except ClientDisconnect:
        raise
    except Exception as error:
        answers, asked = dict.fromkeys((served.name for served in group), error), []
    for i, served in enumerate(asked):
        CLASSIFIER.set(served.name)
        own = [result[i] if isinstance(result, tuple) else result for result in results]
        try:
            answers[served.name] = _answer(served, request, images, own)
        except Exception as error:
            answers[served.name] = error
    return {one.name: known(one, answers[one.name]) for one in group}


async def _check_promise(served: ServedClassifier, abstention: Abstention) -> None:
    """Compute what `keep` rests on, if this is the first request for it. Raises IosrFastError for too few images."""
    if abstention.keep is not None:
        await served.serve_unknown()
    abstention.check(served.head)


async def ask(
    served: ServedEncoder, request: Request, images: Sequence[Any], deadline_s: float, **options: Any
) -> Sequence[Any]:
    """For each image its answer (batching.Query has the `options`), or an exception. `deadline_s` is that from the last
    byte of the request. A client that disconnects gives up its places in the queue."""
    deadline_s -= _since_body(request)
    if deadline_s <= 0:
        raise DeadlineExceededError("no answer in time")
    options |= {"client": client_of(request.client), "deadline_s": deadline_s}
    task = asyncio.ensure_future(served.batching.classify_many(images, **options))
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        timeout_s = deadline_s + Deadlines.after_deadline_s
        await asyncio.wait({task, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
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


def _answer(
    served: ServedClassifier, request: Request, images: Images, results: Sequence[Any]
) -> tuple[dict[str, Any], int]:
    """A PredictAnswer, and its status. Where it raises, nothing is counted."""
    classified, answers = iter(results), list[Prediction | ApiError]()
    for image in images:
        result = image if isinstance(image, ApiError) else next(classified)
        if isinstance(result, BadImageError):
            result = ApiError(422, "bad_image", result.reason)
        if not isinstance(result, Prediction | ApiError):
            raise result
        if isinstance(result, Prediction) and not math.isfinite(result.probability):  # a logit is not
            raise ValueError(f"expected finite logits, got a probability {result.probability} of {result.label!r}")
        answers.append(result)
    good, several = [one for one in answers if isinstance(one, Prediction)], served.head.is_multi_label
    for one in good:
        served.metrics.on_prediction(*(one.top if several else [one] if one.label is not None else ()))
        served.recent.add(one)
    body = {
        "version": max((one.version for one in good), default=served.classifier.version),
        "latency_ms": round(_since_body(request) * 1e3, 3),
        "predictions": [_in_place(served.metrics, one) if isinstance(one, ApiError) else one for one in answers],
    }
    return body, 200 if good else 422


def _in_place(metrics: ClassifierMetrics, error: ApiError) -> dict[str, Any]:
    """An error in the place of an answer, which is counted."""
    metrics.on_error(error.code)
    return error_body(error.code, error.detail)


def known(served: ServedEncoder, answer: Any) -> Any:
    """An answer; of an exception of the queue or of an image that did not cause it, the error of the whole request."""
    if isinstance(answer, ApiError) or not isinstance(answer, Exception):
        return answer
    error = of_library(answer, "no_promise")
    if error is answer and served.failure:
        return busy("engine_failed", "the engine fails at present; try again, or use another server", 5)
    return error
