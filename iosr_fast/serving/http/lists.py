"""Routes that read facts, classes, support images and thumbnails of the classifier.

They are not `async`: threads build the lists, because there may be 100,000 classes.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from typing import Any

import numpy as np
from fastapi import APIRouter, Path, Query
from starlette.responses import Response

from iosr_fast.head.head import Head
from iosr_fast.head.ids import CLASS_ID, EXAMPLE_ID, example_id, example_number, uid_of
from iosr_fast.head.ids import class_id as make_class_id
from iosr_fast.methods.unknown import KEEP
from iosr_fast.serving.http import schemas
from iosr_fast.serving.http.errors import ApiError, no_class, no_example
from iosr_fast.serving.http.middleware import Served
from iosr_fast.serving.http.site import ServedClassifier
from iosr_fast.serving.limits import Limits

_NEXT = "`next` of the previous page; omit it for the first page"
_LIMIT = Query(Limits.page, ge=1, le=Limits.page, description="maximum number of entries")
CLASS_ID_PATH = Path(max_length=40, description="id of a class, from /v1/classes")
EXAMPLE_ID_PATH = Path(max_length=40, description="id of a support image, from /v1/classes/{class_id}/examples")
# Without a default in OpenAPI, which generated clients would send: /v1/predict refuses it without unknown=reject.
KEEP_SHARE = f"with unknown=reject: the share of known pictures that stay [default: {KEEP}]"
_NO_UNKNOWN = "pictures may have several labels: one of none of the classes gets none, and nothing is rejected"
KEEP_QUERY = Query(None, gt=0, lt=1, description=KEEP_SHARE)
router = APIRouter(tags=["classes"])  # GET routes about a classifier, its classes and their support images


@router.get(
    "/classifier",
    response_model_exclude_unset=True,  # several_labels
    summary="Model, method and measured accuracy",
)
async def classifier(served: Served, response: Response, keep: float | None = KEEP_QUERY) -> schemas.ClassifierAnswer:
    if not served.head.is_multi_label:
        await served.serve_unknown()
    response.headers["Cache-Control"] = "no-store"
    return await asyncio.to_thread(_overview, served, keep or KEEP)


@router.get("/classes", response_model=schemas.ClassesAnswer, summary="Classes, page by page")
def classes(
    served: Served, limit: int = _LIMIT, after: str | None = Query(None, pattern=f"^{CLASS_ID}$", description=_NEXT)
) -> Response:
    """Ids above `after`, which need not exist."""
    head = served.head
    start = -1 if after is None else uid_of(after)
    assert start is not None
    page = head.classes(start, limit)
    more = page and page[-1].class_id != make_class_id(head.uids[-1])
    following = page[-1].class_id if more else None
    return schemas.long_answer(schemas.ClassesAnswer(head.version, len(head.uids), page, following))


@router.get(
    "/classes/{class_id}/examples",
    response_model=schemas.ExamplesAnswer,
    summary="Support images of a class, page by page",
)
def examples(
    served: Served,
    class_id: str = CLASS_ID_PATH,
    limit: int = _LIMIT,
    after: str | None = Query(None, pattern=f"^{EXAMPLE_ID}$", description=_NEXT),
) -> Response:
    head = served.head
    numbers = head.examples_of(_uid(head, class_id))
    start = 0 if after is None else bisect_right(numbers, example_number(after) or 0)
    page = [example_id(number) for number in numbers[start : start + limit]]
    following = page[-1] if start + limit < len(numbers) else None
    return schemas.long_answer(schemas.ExamplesAnswer(head.version, class_id, page, following))


@router.get(
    "/examples",
    response_model=schemas.LabelledExamplesAnswer,
    name="labelled_examples",
    summary="Support images with their classes, page by page",
)
def labelled_examples(
    served: Served,
    limit: int = _LIMIT,
    after: str | None = Query(None, pattern=f"^{EXAMPLE_ID}$", description=_NEXT),
    class_id: str | None = Query(None, max_length=40, description="those of a class; empty: those of no class"),
) -> Response:
    head = served.head
    examples = head.examples
    rows = np.arange(len(examples))
    if class_id:
        rows = examples.rows_of(_uid(head, class_id))
    elif class_id is not None:
        rows = np.setdiff1d(rows, rows if examples.owners is None else examples.owners)
    rows = rows[np.argsort(examples.ids[rows])]
    numbers = examples.ids[rows].tolist()
    start = 0 if after is None else bisect_right(numbers, example_number(after) or 0)
    page = [
        schemas.ExampleInfo(example_id(number), [*map(make_class_id, examples.uids_of(row))])
        for number, row in zip(numbers[start : start + limit], rows[start : start + limit].tolist(), strict=True)
    ]
    following = page[-1].example_id if start + limit < len(numbers) else None
    return schemas.long_answer(schemas.LabelledExamplesAnswer(head.version, len(numbers), page, following))


@router.get(
    "/examples/{example_id}/picture",
    response_class=Response,
    responses={200: {"content": {"image/webp": {"schema": {"type": "string", "format": "binary"}}}}},
    summary="Thumbnail of a support image",
)
def picture(served: Served, example_id: str = EXAMPLE_ID_PATH) -> Response:
    try:
        thumbnail = served.classifier.picture(example_id)
    except ValueError:
        raise no_example(example_id) from None
    if not thumbnail:
        raise ApiError(404, "no_picture", f"no picture of {example_id!r} is stored")
    return Response(thumbnail, media_type="image/webp", headers={"Cache-Control": "private, max-age=3600"})


def _uid(head: Head, class_id: str) -> int:
    uid = uid_of(class_id)
    if uid is None or head.name_of(class_id) is None:
        raise no_class(class_id)
    return uid


def _overview(served: ServedClassifier, keep: float) -> schemas.ClassifierAnswer:
    head, source = served.head, served.classifier.encoder.source
    several: Any = {"several_labels": True} if head.is_multi_label else {}
    promise = schemas.Promise(promised=False, keep=keep, sentence=_NO_UNKNOWN)
    if not several:
        unknown = head.unknown
        promise = schemas.Promise(promised=unknown.can_promise(keep), keep=keep, sentence=unknown.summary(keep))
    return schemas.ClassifierAnswer(
        version=head.version,
        model=None if source is None else source.manifest["model"],
        method=head.config.method,
        classes=len(head.uids),
        examples=len(head.examples),
        measured=_measured(head),
        doubts=list(head.doubts),
        unknown=promise,
        max_error=served.settings.max_error,
        collects=served.settings.collect is not None,
        checked=_checked(served, head),
        note=served.recent.strangers.note,
        **several,
    )


def _measured(head: Head) -> schemas.Measured | None:
    """By left-out images or those of calibrate_on; without any, by the search of the parameters."""
    known, evidence = head.judged, head.evidence
    if known.count:
        return schemas.Measured(
            accuracy=known.reliability.accuracy,
            interval=head.accuracy_range,
            images=len(known.labels),
            protocol="loo" if head.calibration_images is None else "validation",
            summary=head.summary(),
            stale=False,
        )
    if evidence is None:
        return None
    return schemas.Measured(
        accuracy=evidence.accuracy,
        interval=evidence.interval,
        images=evidence.scored,
        protocol=evidence.protocol,
        summary=evidence.summary(),
        stale=evidence.stale,
    )


def _checked(served: ServedClassifier, head: Head) -> schemas.Checked | None:
    if served.collector is None or served.collector.checks is None:
        return None
    served.collector.read_labels(head)  # for the next answer
    result, beside = served.collector.checks.result, served.collector.checks.beside
    return schemas.Checked(**vars(result), refuted=result.refuted, beside=beside, sentence=str(result))
