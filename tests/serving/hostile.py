"""Hostile uploads, and valid unusual ones; the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from tests.serving.hostile_images import FAIR, IMAGES, Rng, any_image

_MIB = 1 << 20


@dataclass(frozen=True)
class HostileUpload:
    """A POST to `path`. `fair`: its image is unusual but valid, so it must be classified."""

    kind: str
    body: bytes = field(repr=False)
    headers: dict[str, str]
    path: str
    fair: bool


def hostile_uploads(count: int, seed: int) -> Iterator[HostileUpload]:
    """HTTP requests that any client could send: `count` of them, all kinds in turn, with random details."""
    names = [*IMAGES, *FAIR, *FORMS, *REQUESTS]
    types = ("image/png", "image/jpeg", "application/octet-stream", "image/svg+xml")
    for i in range(count):
        rng, name, query = np.random.default_rng([seed, i]), names[i % len(names)], ""
        if name in FORMS:
            body, headers = FORMS[name](rng), {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY.decode()}"}
        elif name in REQUESTS:
            query, special = REQUESTS[name]
            body, headers = any_image(rng), {"Content-Type": "image/png", **special}
        else:
            body, headers = {**IMAGES, **FAIR}[name](rng), {"Content-Type": str(rng.choice(types))}
        yield HostileUpload(name, body, headers, f"/v1/predict{query}", fair=name in FAIR)


# --- forms ---

_BOUNDARY = b"a-boundary-of-no-meaning"
_HEADER = b'Content-Disposition: form-data; name="images"; filename="x.png"\r\nContent-Type: image/png\r\n\r\n'


def _part(content: bytes, header: bytes = _HEADER) -> bytes:
    return b"--" + _BOUNDARY + b"\r\n" + header + content + b"\r\n"


def _form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--" + _BOUNDARY + b"--\r\n"


def _good_form(rng: Rng) -> bytes:
    return _form(*(_part(any_image(rng)) for _ in range(3)))


def _mixed_form(rng: Rng) -> bytes:
    names = rng.choice(sorted(IMAGES), 4).tolist()
    return _form(*(_part(IMAGES[name](rng)) for name in names), _part(any_image(rng)))


def _flipped_form(rng: Rng) -> bytes:
    data = np.frombuffer(_good_form(rng), np.uint8).copy()
    data[rng.integers(0, 160, 3)] ^= np.uint8(1 << int(rng.integers(8)))
    return data.tobytes()


FORMS: dict[str, Callable[[Rng], bytes]] = {
    "form of good and bad": _mixed_form,
    "form flipped": _flipped_form,
    "form truncated": lambda rng: (data := _good_form(rng))[: int(rng.integers(1, len(data) - 5))],
    "form without an end": lambda rng: _part(any_image(rng)),
    "form of another boundary": lambda rng: _good_form(rng).replace(_BOUNDARY, b"another-boundary"),
    "form of line feeds": lambda rng: _form(_part(b"x")).replace(b"\r\n", b"\n"),
    "form without names": lambda rng: _form(_part(any_image(rng), b"Content-Disposition: form-data\r\n\r\n")),
    "form without headers": lambda rng: _form(_part(any_image(rng), b"\r\n")),
    "form of another field": lambda rng: _form(_part(any_image(rng), _HEADER.replace(b'"images"', b'"../passwd"'))),
    "form of a huge header": lambda rng: _form(_part(any_image(rng), b"X-Long: " + b"a" * _MIB + b"\r\n" + _HEADER)),
    "form of many headers": lambda rng: _form(_part(any_image(rng), b"X-More: a\r\n" * 20_000 + _HEADER)),
    "form of a strange name": lambda rng: _form(_part(any_image(rng), _HEADER.replace(b"images", rng.bytes(40)))),
    "form of too many": lambda rng: _form(*[_part(b"x")] * 1_000),
    "form of empty parts": lambda rng: _form(*[_part(b"")] * 5),
    "form of nothing": lambda rng: _form(),
    "form of dashes": lambda rng: b"--" * 200_000,
    "form of carriage returns": lambda rng: _part(b"\r\n--" * 100_000),
    "form within a form": lambda rng: _form(_part(_good_form(rng))),
}


# Each with a valid image: a query, and headers.
REQUESTS: dict[str, tuple[str, dict[str, str]]] = {
    "wrong type": ("", {"Content-Type": "text/html"}),
    "JSON": ("", {"Content-Type": "application/json"}),
    "strange type": ("", {"Content-Type": ";;;=,\x7f"}),
    "form without a boundary": ("", {"Content-Type": "multipart/form-data"}),
    "form of a long boundary": ("", {"Content-Type": f"multipart/form-data; boundary={'b' * 5000}"}),
    "gzip": ("", {"Content-Encoding": "gzip"}),
    "parts": (f"?boxes=[{','.join(['[0,0,1,60000],[-1e9,0,1e9,1],[0,0,1e-300,1e-300]'] * 20)}]", {}),
    "huge parts": ("?boxes=[[0,0,1e308,1e308]]", {}),
    "no parts": ("?boxes=[[[[", {}),
    "top of none": ("?top=0", {}),
    "top of words": ("?top=%00%ff&nearest=-1", {}),
    "no time": ("?deadline_ms=1", {}),
    "negative time": ("?deadline_ms=-5", {}),
    "long query": ("?" + "a" * 20_000, {}),
    "strange id": ("", {"X-Request-ID": '"}\x1b[31m{"'}),
}


def hostile_bytes(count: int, seed: int) -> Iterator[bytes]:
    """Bytes for a bare socket that no HTTP library would send."""
    post = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    hidden = b"GET /v1/classes HTTP/1.1\r\nHost: localhost\r\n\r\n"
    makers: list[Callable[[Rng], bytes]] = [
        lambda rng: rng.bytes(2_000),
        lambda rng: post + b"X-Long: " + b"a" * (4 * _MIB) + b"\r\n\r\n",
        lambda rng: b"GET /" + b"a" * (4 * _MIB),
        lambda rng: post + b"Content-Length: 1000\r\n\r\n" + rng.bytes(500),
        lambda rng: post + b"Content-Length: 10000000000\r\n\r\n" + rng.bytes(500),
        lambda rng: post + b"Transfer-Encoding: chunked\r\n\r\nfffffffff\r\n" + rng.bytes(500),
        lambda rng: post + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"a" * (4 * _MIB),
        lambda rng: post + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 50_000 + b"0\r\n\r\n",
        lambda rng: b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1_000,
        lambda rng: b"GET /static/../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
        lambda rng: b"GET /%ff%fe%00 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        lambda rng: post + b"Upgrade: h2c\r\nContent-Length: %d\r\n\r\n%s" % (len(hidden), hidden),
        lambda rng: (
            b"PATCH /v1/classes/c0 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 31000000\r\n\r\n" + b"[" * (4 * _MIB)
        ),
    ]
    for i in range(count):
        yield makers[i % len(makers)](np.random.default_rng([seed, i]))
