"""Images of a request, from the body itself or from a multipart form, and their checks before decoding.

Nothing is written to disk. The checks read headers only and decode nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from iosr_fast.images.geometry import Geometry
from iosr_fast.images.limits import DAMAGED, DecodeLimits, claimed_size, image_kind
from iosr_fast.serving.http.errors import ApiError
from iosr_fast.serving.http.settings import Settings

_MAX_TEXT = 4096  # bytes of a text field
_FORMS = "multipart/form-data with file fields `images`"


@dataclass(frozen=True)
class Refusal:
    """Why an image is not classified; `code` is too_large, unsupported_type, bad_image or too_many_pixels."""

    code: str
    message: str


@dataclass
class Upload:
    """`images` in order, each as bytes or a Refusal; `texts`, the text fields of the form."""

    images: list[bytes | Refusal] = field(default_factory=list, repr=False)
    texts: dict[str, str] = field(default_factory=dict)


def check_image(data: bytes, settings: Settings, geometry: Geometry) -> Refusal | None:
    """Why `data` must not reach a decoder; None if it may. Decoders check all of it and may still find damage.

    `max_pixels` holds for the image as it is, and for what resizing to `geometry` makes of it.
    """
    if len(data) > settings.max_image_bytes:
        return _too_large(len(data), settings.max_image_bytes)
    if not image_kind(data):
        got = "a file of another kind; convert it to one of these" if data else "an empty file; send all of it"
        return Refusal("unsupported_type", f"expected a JPEG, PNG or WebP image, got {got}")
    size = claimed_size(data)
    if size is None:
        return Refusal("bad_image", DAMAGED)
    message = settings.decode_limits.size_error(size, geometry)
    return Refusal("too_many_pixels", message) if message else None


def _too_large(count: int, limit: int) -> Refusal:
    return Refusal("too_large", DecodeLimits(limit).bytes_error(count))


async def read_images(request: Request, settings: Settings) -> Upload:
    """Images to classify: one as the body (image/*, application/octet-stream, or no type), or a form."""
    kind, options = _content_type(request)
    if kind == b"multipart/form-data":
        upload = await _read_form(request, options, settings, ())
    elif kind in (b"", b"application/octet-stream") or kind.startswith(b"image/"):
        body = await request.body()
        image = _too_large(len(body), settings.max_image_bytes) if len(body) > settings.max_image_bytes else body
        upload = Upload([image] if body else [])
    else:
        raise _wrong_type(kind, f"an image (image/* or application/octet-stream) or {_FORMS}")
    if not upload.images:
        raise ApiError(400, "no_image", f"expected an image as the body, or {_FORMS}; got none")
    return upload


async def read_form(request: Request, settings: Settings, texts: tuple[str, ...] = ()) -> Upload:
    """A form with images and the text fields `texts`, all required. 400 for any other field."""
    kind, options = _content_type(request)
    if kind != b"multipart/form-data":
        raise _wrong_type(kind, _FORMS)
    upload = await _read_form(request, options, settings, texts)
    missing = [name for name in texts if name not in upload.texts]
    if missing:
        raise ApiError(400, "missing_field", f"expected the form field {missing[0]!r}, got none")
    return upload


def _wrong_type(kind: bytes, expected: str) -> ApiError:
    got = kind.decode("latin-1")[:100] or "none"
    return ApiError(415, "unsupported_type", f"expected a Content-Type of {expected}, got {got}")


def _content_type(request: Request) -> tuple[bytes, dict[bytes, bytes]]:
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(415, "unsupported_encoding", f"expected a body without Content-Encoding, got {encoding[:40]!r}")
    return parse_options_header(request.headers.get("content-type"))


async def _read_form(
    request: Request, options: dict[bytes, bytes], settings: Settings, texts: tuple[str, ...]
) -> Upload:
    form = _Form(settings, texts)
    try:
        parser = MultipartParser(options.get(b"boundary", b""), form.callbacks())  # type: ignore[arg-type]
        if not options.get(b"boundary"):
            raise FormParserError("its Content-Type names no boundary")
        async for chunk in request.stream():
            parser.write(chunk)
        parser.finalize()
        if not form.ended:
            raise FormParserError("it ends before its last boundary")
    except FormParserError as error:
        raise ApiError(400, "bad_form", f"the multipart form is damaged: {error}") from error
    return form.upload


class _Form:
    """Callbacks of python-multipart: collect the parts, each up to its own limit."""

    def __init__(self, settings: Settings, texts: tuple[str, ...]) -> None:
        self._settings, self._allowed = settings, texts
        self.upload = Upload()
        self.ended = False
        self._header, self._value, self._disposition = b"", b"", b""
        self._name = ""
        self._parts: list[bytes] = []
        self._size = self._limit = 0

    def callbacks(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in dir(self) if name.startswith("on_")}

    def on_part_begin(self) -> None:
        self._disposition, self._parts, self._size = b"", [], 0

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def on_headers_finished(self) -> None:
        kind, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if kind != b"form-data" or not self._name:
            raise FormParserError("a part has no Content-Disposition: form-data with a name")
        if self._name == "images":
            if len(self.upload.images) >= self._settings.max_images:
                limit = self._settings.max_images
                raise ApiError(413, "too_many_images", f"expected at most {limit} images a request, got more")
            self._limit = self._settings.max_image_bytes
        elif self._name in self._allowed and self._name not in self.upload.texts:
            self._limit = _MAX_TEXT
        else:
            expected = ", ".join(repr(name) for name in ("images", *self._allowed))
            raise ApiError(
                400,
                "unexpected_field",
                f"expected form fields {expected} (all but images once), got {self._name[:80]!r}",
            )

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        if self._size <= self._limit:
            self._parts.append(data[start:end])
        elif self._parts:
            self._parts = []  # the part is refused, so its bytes are dropped

    def on_part_end(self) -> None:
        content = b"".join(self._parts)
        if self._name == "images":
            self.upload.images.append(content if self._size <= self._limit else _too_large(self._size, self._limit))
        elif self._size > self._limit:
            raise ApiError(413, "too_large", f"expected a field {self._name!r} of at most {self._limit} bytes")
        else:
            try:
                self.upload.texts[self._name] = content.decode()
            except UnicodeDecodeError:
                raise ApiError(400, "bad_form", f"expected UTF-8 in the field {self._name!r}") from None
        self._parts = []

    def on_end(self) -> None:
        self.ended = True
