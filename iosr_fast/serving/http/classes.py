"""Routes that change classes and their support images. The middleware requires the token for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from fastapi import APIRouter, Depends
from fastapi.security import HTTPBearer
from starlette.requests import Request

from iosr_fast.backbones.prompts import MAX_LENGTH, MAX_TEXTS
from iosr_fast.classifier import Classifier
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.class_tree import DEEPEST, Parent
from iosr_fast.head.head import Head
from iosr_fast.head.ids import class_id as make_class_id
from iosr_fast.head.names import LONGEST, name_fault
from iosr_fast.serving.batching.item import Encoded
from iosr_fast.serving.http import schemas
from iosr_fast.serving.http.addresses import client_of
from iosr_fast.serving.http.errors import ApiError, no_class, no_example, of_library
from iosr_fast.serving.http.lists import CLASS_ID_PATH, EXAMPLE_ID_PATH
from iosr_fast.serving.http.logs import log
from iosr_fast.serving.http.middleware import Served
from iosr_fast.serving.http.site import ServedClassifier, Site
from iosr_fast.serving.limits import Deadlines
from iosr_fast.store.change_log import LogWriteError
from iosr_fast.store.changes import ChangeResult

if TYPE_CHECKING:
    import numpy as np

_ANY_NAME = {"type": "string", "maxLength": LONGEST}
_NAME = {**_ANY_NAME, "minLength": 1}
_NODE = "one: a node by its name; several: names from the root down, which may be new; the first may be empty, the root"
_PARENT = {"type": "array", "items": _ANY_NAME, "maxItems": DEEPEST, "description": _NODE}
_DESCRIPTION = {"type": "array", "items": {"type": "string", "maxLength": MAX_LENGTH}, "maxItems": MAX_TEXTS}
_TEXTS = {"name": _NAME, "description": _DESCRIPTION, "parent": _PARENT}
_SEVERAL = (
    "ids of the classes that the images have: one; where pictures may have several labels any number, or one empty"
)
_CLASS_IDS = {"class_id": {"type": "array", "items": {"type": "string", "maxLength": 40}, "description": _SEVERAL}}
_TEXT_FIELDS = "description", "parent"  # that a form may repeat
_KEEP_TEXT = {"type": "boolean", "description": "true: only the displayed name changes, not the text embedding"}


def make_router(site: Site) -> APIRouter:
    """Routes that add, rename and remove classes, add and remove support images, and retune. A server that takes no
    changes has them, too, so that it refuses in words (middleware.check_token)."""
    # HTTPBearer only documents the scheme; the middleware checks the token before a body is read.
    bearer = HTTPBearer(auto_error=False, description="the token that the server was started with")
    router = APIRouter(tags=["changes"], dependencies=[Depends(bearer)], include_in_schema=site.described.takes_changes)
    max_images = site.settings.max_images

    @router.post(
        "/classes",
        summary="Add a class from a few images",
        status_code=201,
        openapi_extra=schemas.form_body(_TEXTS | schemas.images_field(0, max_images), "name"),
    )
    async def add_class(served: Served, request: Request) -> ChangeResult:
        images, texts = await served.uploads.read_form(request, "name", repeated=_TEXT_FIELDS)
        if "name" not in texts:
            raise ApiError(400, "missing_field", "expected the form field 'name', got none")
        name, own, parent = _check_name(texts["name"][0]), texts.get("description"), _parent(texts.get("parent", []))
        added = lambda it: it.add_class(name, _decoded(served, request, images), None, own, parent)  # noqa: E731
        return await _change(served, "add_class", added, new_name=name)

    @router.patch(
        "/classes/{class_id}",
        summary="Rename a class, or move it in the tree",
        description="A new `name`, from which and from `description` follows the text embedding; or a `parent` alone.",
        openapi_extra=schemas.form_body({**_TEXTS, "keep_text": _KEEP_TEXT}),
    )
    async def rename_class(served: Served, request: Request, class_id: str = CLASS_ID_PATH) -> ChangeResult:
        images, texts = await served.uploads.read_form(request, "name", "keep_text", repeated=_TEXT_FIELDS)
        if images:
            raise ApiError(400, "unexpected_field", "expected no images: /v1/classes/{class_id}/examples takes them")
        if texts.keys() == {"parent"}:
            parent = _parent(texts["parent"])
            return await _change(served, "move_class", lambda it: it.move_class(class_id, parent), class_id)
        if "name" not in texts or "parent" in texts:
            raise ApiError(422, "invalid_parameters", "expected a new name, or a parent alone: one change a request")
        name, own = _check_name(texts["name"][0]), texts.get("description")
        keep = _flag(texts.get("keep_text", ["false"])[0])
        return await _change(
            served, "rename_class", lambda it: it.rename_class(class_id, name, None, keep, own), class_id, new_name=name
        )

    @router.delete(
        "/classes/{class_id}",
        summary="Remove a class and its support images",
        description="Where pictures may have several labels, they stay without it.",
    )
    async def remove_class(served: Served, class_id: str = CLASS_ID_PATH) -> ChangeResult:
        return await _change(served, "remove_class", lambda it: it.remove_class(class_id), class_id)

    @router.post("/retune", summary="Choose the method's parameters again on the current support images")
    async def retune(served: Served) -> ChangeResult:
        return await _change(served, "retune", lambda it: it.retune())

    @router.post(
        "/classes/{class_id}/examples",
        summary="Add support images to a class",
        openapi_extra=schemas.form_body(schemas.images_field(1, max_images), "images"),
    )
    async def add_examples(served: Served, request: Request, class_id: str = CLASS_ID_PATH) -> ChangeResult:
        images, _ = await served.uploads.read_form(request)
        if not images:
            raise ApiError(400, "no_image", "expected file fields `images`, got none")
        return await _change(
            served, "add_examples", lambda it: it.add_examples(class_id, _decoded(served, request, images)), class_id
        )

    @router.post(
        "/examples",
        summary="Add support images with their labels",
        description="All of them get the classes of `class_id`.",
        openapi_extra=schemas.form_body(_CLASS_IDS | schemas.images_field(1, max_images), "class_id", "images"),
    )
    async def add_labelled_examples(served: Served, request: Request) -> ChangeResult:
        images, fields = await served.uploads.read_form(request, repeated=("class_id",))
        ids, labels = _labels(served.head, fields)
        if not images:
            raise ApiError(400, "no_image", "expected file fields `images`, got none")
        return await _change(
            served, "add_examples", lambda it: it.add_examples(labels, _decoded(served, request, images)), *ids
        )

    @router.patch(
        "/examples/{example_id}",
        summary="Give a support image other labels, instead of its own",
        openapi_extra=schemas.form_body(_CLASS_IDS, "class_id"),
    )
    async def relabel_example(served: Served, request: Request, example_id: str = EXAMPLE_ID_PATH) -> ChangeResult:
        images, fields = await served.uploads.read_form(request, repeated=("class_id",))
        if images:
            raise ApiError(400, "unexpected_field", "expected no images: the support image stays")
        ids, labels = _labels(served.head, fields)
        return await _change(
            served, "relabel", lambda it: it.relabel([example_id], labels), *ids, example_id=example_id
        )

    @router.delete("/examples/{example_id}", summary="Remove a support image")
    async def remove_example(served: Served, example_id: str = EXAMPLE_ID_PATH) -> ChangeResult:
        return await _change(
            served, "remove_examples", lambda it: it.remove_examples([example_id]), example_id=example_id
        )

    return router


async def _change(
    served: ServedClassifier,
    name: str,
    act: Callable[[Classifier], ChangeResult],
    *class_ids: str,
    new_name: str = "",
    example_id: str = "",
) -> ChangeResult:
    """Make a change of classes and of a support image, which must exist, to a name, which must be free."""

    def checked(classifier: Classifier) -> ChangeResult:
        head = classifier.snapshot()
        for class_id in class_ids:
            if head.name_of(class_id) is None:
                raise no_class(class_id)
        if example_id:
            try:
                head.find_examples([example_id])
            except IosrFastError:
                raise no_example(example_id) from None
        if new_name in head.class_names and (owner := make_class_id(head.find_class(new_name))) not in class_ids:
            raise ApiError(409, "name_taken", f"class {owner} is named {new_name!r} already; choose another name")
        return act(classifier)

    try:
        made = await served.change(checked)
    except (IosrFastError, LogWriteError) as error:
        raise of_library(error, "refused") from error
    log("change", change=name, version=made.version, class_id=made.class_id, examples=len(made.example_ids))
    return made


def _decoded(served: ServedClassifier, request: Request, images: list[Encoded]) -> Iterator[np.ndarray]:
    """The images one after another, as 64 large ones would take gigabytes. Decoder processes decode them."""
    client = client_of(request.client)
    for i, image in enumerate(images):
        decode = partial(served.batching.decode_whole, classifier=served.name, client=client)
        yield decode(image, i, deadline_s=Deadlines.change_decode_s).result()


def _check_name(text: str) -> str:
    name = text.strip()
    if fault := name_fault(name):
        raise ApiError(422, "bad_name", f"expected a class name, got {text[:80]!a}, {fault}")
    return name


def _labels(head: Head, fields: dict[str, list[str]]) -> tuple[list[str], str | list[str]]:
    """The ids of classes in fields `class_id`, as _SEVERAL says, and the same as changes take them."""
    given = fields.get("class_id", [])
    if head.is_multi_label and given:
        ids = [] if given == [""] else given
        return ids, ids
    if len(given) != 1 or not given[0]:
        number = "any number, or one empty for no label" if head.is_multi_label else "one of one label a picture"
        raise ApiError(422, "invalid_parameters", f"expected form fields 'class_id', {number}; got {given[:3]}")
    return given, given[0]


def _parent(names: list[str]) -> Parent:
    """The place in the tree that fields `parent` name, as _NODE says."""
    if len(names) == 1 and names[0]:
        return names[0]
    return names[1:] if names[:1] == [""] else names


def _flag(text: str) -> bool:
    """A truth value: Python's clients write True, others true."""
    if text.lower() not in ("true", "false"):
        raise ApiError(422, "invalid_parameters", f"expected keep_text to be true or false, got {text[:80]!r}")
    return text.lower() == "true"
