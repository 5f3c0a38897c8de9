"""Classes and their support images: lists, which all may read, and changes, which need the token."""

from __future__ import annotations

import errno
from collections.abc import Callable

from fastapi import APIRouter, Depends, Path
from fastapi.security import HTTPBearer
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from iosr_fast.classifier import Classifier
from iosr_fast.images.preprocess import BadImageError
from iosr_fast.serving.http import schemas
from iosr_fast.serving.http.errors import ApiError
from iosr_fast.serving.http.images import Refusal
from iosr_fast.serving.http.lists import AFTER_CLASS, AFTER_EXAMPLE, LIMIT, class_page, example_page
from iosr_fast.serving.http.logs import log
from iosr_fast.serving.http.service import Service, UndecodedImage
from iosr_fast.serving.http.uploads import read_form
from iosr_fast.state.changes import ChangeResult
from iosr_fast.state.ids import class_id as make_class_id
from iosr_fast.state.log_writer import LogWriteError

_MAX_NAME = 200
_CHANGE_ERRORS = (400, 401, 403, 408, 413, 415, 422, 500, 503, 507)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLASS_ID = Path(max_length=40, description="as /v1/classes has it")
_EXAMPLE_ID = Path(max_length=40, description="as /v1/classes/{class_id}/examples has it")
_NAME = {"name": {"type": "string", "minLength": 1, "maxLength": _MAX_NAME}}


def make_router(service: Service) -> APIRouter:
    most = service.settings.max_images
    router = APIRouter(tags=["classes"])
    _add_lists(router, service)
    bearer = HTTPBearer(auto_error=False, description="the token that the server was started with")
    # It documents the scheme; serving.middleware.Authorisation decides, before a body is read.
    changes = APIRouter(tags=["changes"], dependencies=[Depends(bearer)])
    _add_changes_of_classes(changes, service, most)
    _add_changes_of_examples(changes, service, most)
    router.include_router(changes)
    return router


def _add_lists(router: APIRouter, service: Service) -> None:
    # Not `async`: what looks through all classes or images does so in a thread.
    @router.get(
        "/v1/classes",
        response_model=schemas.ClassesAnswer,
        responses=schemas.errors(422, 500),
        summary="Classes, page by page",
    )
    def classes(limit: int = LIMIT, after: str | None = AFTER_CLASS) -> Response:
        return JSONResponse(class_page(service.classifier.snapshot(), limit, after))

    @router.get(
        "/v1/classes/{class_id}/examples",
        response_model=schemas.ExamplesAnswer,
        responses=schemas.errors(404, 422, 500),
        summary="A class's support images, page by page",
    )
    def examples(class_id: str = _CLASS_ID, limit: int = LIMIT, after: str | None = AFTER_EXAMPLE) -> Response:
        found = example_page(service.classifier.snapshot(), class_id, limit, after)
        if found is None:
            raise _no_class(class_id)
        return JSONResponse(found)

    @router.get(
        "/v1/examples/{example_id}/picture",
        response_class=Response,
        responses={
            200: {"content": {"image/webp": {"schema": {"type": "string", "format": "binary"}}}},
            **schemas.errors(404, 422, 500),
        },
        summary="A support image, small",
    )
    def picture(example_id: str = _EXAMPLE_ID) -> Response:
        try:
            kept = service.classifier.picture(example_id)
        except ValueError:
            raise _no_example(example_id) from None
        if kept is None:
            raise ApiError(404, "no_picture", f"no picture of {example_id!r} is kept")
        return Response(kept, media_type="image/webp", headers={"Cache-Control": "private, max-age=3600"})


def _add_changes_of_classes(router: APIRouter, service: Service, most: int) -> None:
    @router.post(
        "/v1/classes",
        status_code=201,
        response_model=schemas.ChangeAnswer,
        responses=schemas.errors(409, *_CHANGE_ERRORS),
        openapi_extra=schemas.form_body(_NAME, 0, most),
        summary="A new class from a few images",
    )
    async def add_class(request: Request) -> Response:
        upload = await read_form(request, service.settings, ("name",))
        name, images = _check_name(upload.texts["name"]), _all_good(service, upload.images)

        def act(classifier: Classifier) -> ChangeResult:
            _require_free(classifier, name)
            return classifier.add_class(name, images)

        return await _change(service, "add_class", act, 201)

    @router.patch(
        "/v1/classes/{class_id}",
        response_model=schemas.ChangeAnswer,
        responses=schemas.errors(404, 409, *_CHANGE_ERRORS),
        summary="Rename a class",
    )
    async def rename_class(body: schemas.Rename, class_id: str = _CLASS_ID) -> Response:
        name = _check_name(body.name)

        def act(classifier: Classifier) -> ChangeResult:
            _require_class(classifier, class_id)
            _require_free(classifier, name, but=class_id)
            return classifier.rename_class(class_id, name, keep_text=body.keep_text)

        return await _change(service, "rename_class", act)

    @router.delete(
        "/v1/classes/{class_id}",
        response_model=schemas.ChangeAnswer,
        responses=schemas.errors(404, *_CHANGE_ERRORS),
        summary="Take a class out, with its support images",
    )
    async def remove_class(class_id: str = _CLASS_ID) -> Response:
        def act(classifier: Classifier) -> ChangeResult:
            _require_class(classifier, class_id)
            return classifier.remove_class(class_id)

        return await _change(service, "remove_class", act)

    @router.post(
        "/v1/retune",
        response_model=schemas.ChangeAnswer,
        responses=schemas.errors(*_CHANGE_ERRORS),
        summary="Choose the method's parameters again, on the support images as they are now",
    )
    async def retune() -> Response:
        return await _change(service, "retune", lambda classifier: classifier.retune())


def _add_changes_of_examples(router: APIRouter, service: Service, most: int) -> None:
    @router.post(
        "/v1/classes/{class_id}/examples",
        response_model=schemas.ChangeAnswer,
        responses=schemas.errors(404, *_CHANGE_ERRORS),
        openapi_extra=schemas.form_body({}, 1, most),
        summary="More support images of a class",
    )
    async def add_examples(request: Request, class_id: str = _CLASS_ID) -> Response:
        images = _all_good(service, (await read_form(request, service.settings)).images)
        if not images:
            raise ApiError(400, "no_image", "expected file fields `images`, got none")

        def act(classifier: Classifier) -> ChangeResult:
            _require_class(classifier, class_id)
            return classifier.add_examples(class_id, images)

        return await _change(service, "add_examples", act)

    @router.delete(
        "/v1/examples/{example_id}",
        response_model=schemas.ChangeAnswer,
        responses=schemas.errors(404, *_CHANGE_ERRORS),
        summary="Take a support image out",
    )
    async def remove_example(example_id: str = _EXAMPLE_ID) -> Response:
        def act(classifier: Classifier) -> ChangeResult:
            try:
                classifier.snapshot().find_examples([example_id])
            except ValueError:
                raise _no_example(example_id) from None
            return classifier.remove_examples([example_id])

        return await _change(service, "remove_examples", act)


async def _change(
    service: Service, what: str, act: Callable[[Classifier], ChangeResult], status: int = 200
) -> Response:
    try:
        change = await service.change(act)
    except BadImageError as error:
        raise ApiError(422, "bad_image", f"image {error.where}: {error.reason}") from error
    except ValueError as error:
        raise ApiError(422, "refused", str(error)) from error
    except LogWriteError as error:
        code = "storage_full" if error.errno in _FULL else "log_failed"
        message = f"{error.strerror}; predictions are still answered, and a change works again when the log does"
        raise ApiError(507, code, message) from error
    answer = {"version": change.version, "class_id": change.class_id, "example_ids": list(change.example_ids)}
    log("change", change=what, version=change.version, class_id=change.class_id, examples=len(change.example_ids))
    return JSONResponse(answer, status)


def _all_good(service: Service, images: list[bytes | Refusal]) -> list[UndecodedImage]:
    """Of a change all images have to be good: half a change is none."""
    good: list[UndecodedImage] = []
    for i, image in enumerate(service.check(images)):
        if isinstance(image, Refusal):
            raise ApiError(422, image.code, f"image number {i}: {image.message}")
        good.append(service.to_decode(image, i))
    return good


def _check_name(given: str) -> str:
    name = given.strip()
    if not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        raise ApiError(
            422, "bad_name", f"expected a class name of 1 to {_MAX_NAME} printable characters, got {given[:80]!r}"
        )
    return name


def _require_class(classifier: Classifier, class_id: str) -> None:
    if classifier.snapshot().name_of(class_id) is None:
        raise _no_class(class_id)


def _require_free(classifier: Classifier, name: str, but: str = "") -> None:
    state = classifier.snapshot()
    if name in state.class_names and (taken := make_class_id(state.find_class(name))) != but:
        raise ApiError(409, "name_taken", f"the class {taken} is called {name!r} already; choose another name")


def _no_class(class_id: str) -> ApiError:
    return ApiError(404, "no_class", f"no class has the id {class_id!r}; /v1/classes lists those that are there")


def _no_example(example_id: str) -> ApiError:
    return ApiError(404, "no_example", f"no support image has the id {example_id!r}")
