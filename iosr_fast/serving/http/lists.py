"""Routes that read facts, classes, support images and thumbnails of a classifier or of a replica behind an ingress."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Path, Query
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from iosr_fast.head.head import HeadData
from iosr_fast.head.ids import CLASS_ID, EXAMPLE_ID, class_id, example_id, example_number, uid_of
from iosr_fast.methods.conformal import images_needed
from iosr_fast.methods.unknown import KEEP
from iosr_fast.serving.http import schemas
from iosr_fast.serving.http.errors import ApiError, no_class, no_example

if TYPE_CHECKING:
    from iosr_fast.classifier import Classifier

PAGE = 1_000
_NEXT = "`next` of the previous page; omit it for the first page"
_LIMIT = Query(PAGE, ge=1, le=PAGE, description="maximum number of entries")
_AFTER_CLASS = Query(None, pattern=f"^{CLASS_ID}$", description=_NEXT)
_AFTER_EXAMPLE = Query(None, pattern=f"^{EXAMPLE_ID}$", description=_NEXT)
CLASS_ID_PATH = Path(max_length=40, description="id of a class, from /v1/classes")
EXAMPLE_ID_PATH = Path(max_length=40, description="id of a support image, from /v1/classes/{class_id}/examples")


KEEP_QUERY = Query(KEEP, gt=0, lt=1, description="with unknown=reject: the share of known pictures that stay")


class ClassifierLists:
    """Lists of `classifier`, which a subclass provides. Threads build them, because there may be 100,000 classes.

    `examples` and `picture` return None for an unknown id; `picture` returns b"" if none is stored.
    """

    @property
    def classifier(self) -> Classifier:
        raise NotImplementedError

    async def overview(self, keep: float = KEEP) -> dict[str, Any]:
        return await run_in_threadpool(overview_of, self.classifier, keep)

    async def classes(self, limit: int = PAGE, after: str | None = None) -> dict[str, Any]:
        return await run_in_threadpool(class_page, self.classifier.snapshot(), limit, after)

    async def examples(self, class_id: str, limit: int = PAGE, after: str | None = None) -> dict[str, Any] | None:
        return await run_in_threadpool(example_page, self.classifier.snapshot(), class_id, limit, after)

    async def picture(self, example_id: str) -> bytes | None:
        try:
            return await run_in_threadpool(self.classifier.picture, example_id) or b""
        except ValueError:
            return None


def make_router(lists: ClassifierLists, cache_control: str, *statuses: int) -> APIRouter:
    """GET routes over `lists`: `cache_control` is the header of pictures, `statuses` the errors but 404, 422, 500."""
    router = APIRouter(tags=["classes"])
    statuses = (404, 422, 500, *statuses)

    @router.get(
        "/v1/classifier",
        response_model=schemas.ClassifierAnswer,
        responses=schemas.errors(*statuses[1:]),
        summary="Model, method and measured accuracy",
    )
    async def classifier(keep: float = KEEP_QUERY) -> Response:
        return JSONResponse(await lists.overview(keep), headers={"Cache-Control": "no-store"})

    @router.get(
        "/v1/classes",
        response_model=schemas.ClassesAnswer,
        responses=schemas.errors(*statuses[1:]),
        summary="Classes, page by page",
    )
    async def classes(limit: int = _LIMIT, after: str | None = _AFTER_CLASS) -> Response:
        return await run_in_threadpool(JSONResponse, await lists.classes(limit, after))

    @router.get(
        "/v1/classes/{class_id}/examples",
        response_model=schemas.ExamplesAnswer,
        responses=schemas.errors(*statuses),
        summary="Support images of a class, page by page",
    )
    async def examples(
        class_id: str = CLASS_ID_PATH, limit: int = _LIMIT, after: str | None = _AFTER_EXAMPLE
    ) -> Response:
        page = await lists.examples(class_id, limit, after)
        if page is None:
            raise no_class(class_id)
        return await run_in_threadpool(JSONResponse, page)

    @router.get(
        "/v1/examples/{example_id}/picture",
        response_class=Response,
        responses={
            200: {"content": {"image/webp": {"schema": {"type": "string", "format": "binary"}}}},
            **schemas.errors(*statuses),
        },
        summary="Thumbnail of a support image",
    )
    async def picture(example_id: str = EXAMPLE_ID_PATH) -> Response:
        thumbnail = await lists.picture(example_id)
        if thumbnail is None:
            raise no_example(example_id)
        if not thumbnail:
            raise ApiError(404, "no_picture", f"no picture of {example_id!r} is stored")
        return Response(thumbnail, media_type="image/webp", headers={"Cache-Control": cache_control})

    return router


def overview_of(classifier: Classifier, keep: float) -> dict[str, Any]:
    """The body of /v1/classifier. What would have to be fitted first is None."""
    head, source = classifier.snapshot(), classifier.encoder.source
    tuned, unknown = head.tuned, head.computed("unknown")
    return {
        "version": head.version,
        "model": None if source is None else source.manifest["model"],
        "method": head.config.method,
        "classes": len(head.uids),
        "examples": int(head.counts.sum()),
        "measured": tuned
        and {
            "accuracy": None if tuned.interval is None else tuned.accuracy,
            "interval": tuned.interval,
            "images": tuned.scored,
            "protocol": tuned.protocol,
            "summary": tuned.summary(),
            "stale": tuned.stale,
        },
        "unknown": unknown
        and {
            "promised": len(unknown.left_out) >= images_needed(keep),
            "keep": keep,
            "sentence": unknown.summary(keep),
        },
    }


def class_page(head: HeadData, limit: int, after: str | None) -> dict[str, Any]:
    """At most `limit` classes with ids above `after` (which need not exist); `next` is None on the last page."""
    start = -1 if after is None else uid_of(after)
    assert start is not None
    page = head.classes(start, limit)
    more = bool(page) and page[-1].class_id != class_id(head.uids[-1])
    return {
        "version": head.version,
        "total": len(head.uids),
        "classes": [asdict(info) for info in page],
        "next": page[-1].class_id if more else None,
    }


def example_page(head: HeadData, identifier: str, limit: int, after: str | None) -> dict[str, Any] | None:
    """At most `limit` support images of a class, with ids above `after`; None for an unknown class."""
    uid = uid_of(identifier)
    if uid is None or head.name_of(identifier) is None:
        return None
    numbers = head.examples_of(uid)
    start = 0 if after is None else bisect_right(numbers, example_number(after) or 0)
    page = numbers[start : start + limit]
    return {
        "version": head.version,
        "class_id": identifier,
        "example_ids": [example_id(number) for number in page],
        "next": example_id(page[-1]) if start + limit < len(numbers) else None,
    }
