"""Where a request begins and ends: RFC 9112 to the letter, so that no proxy in front can see another end.

h11 parses heads and bodies. It forgives what the RFC lets a recipient forgive (bare line feeds, folded lines, control
characters, a Content-Length beside a Transfer-Encoding), and each of these is read in another way by some proxy. So it
only gets heads that pass `check_head` and its ends of bodies pass `Body`.
"""

from __future__ import annotations

import json
import re
from http import HTTPStatus
from urllib.parse import unquote

import h11

from iosr_fast.serving.http.errors import error_body

MAX_LINE = 8 << 10  # bytes of the request line
MAX_HEADERS = 100
_FRAMING = 24 << 10  # bytes of a chunked body that are not its content, beside an eighth of it: each chunk costs time

_TOKEN = rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+"
_HEAD = re.compile(rb"%s [!-~]+ HTTP/\d\.\d\r\n(?:%s:[\t -~\x80-\xff]*\r\n)*\r\n" % (_TOKEN, _TOKEN))
_BARE_LINE_FEED = re.compile(rb"(?<!\r)\n")
_AUTHORITY = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::\d{0,5})?")
_ABSOLUTE = re.compile(rb"(?i:https?)://([^/?]*)(.*)")
_LENGTH = re.compile(rb"\d{1,18}")


class Refused(Exception):
    """The connection can't go on: an HTTP status, a code for programs and a message for people."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code

    def answer(self) -> bytes:
        """What the client gets before its connection is closed: an error in the form of all others."""
        body = json.dumps(error_body(self.code, str(self))).encode()
        lines = [
            f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}",
            "Content-Type: application/json",
            "X-Content-Type-Options: nosniff",
            f"Content-Length: {len(body)}",
            "Connection: close",
            *(["Retry-After: 1"] if self.status == 503 else []),
        ]
        return "\r\n".join([*lines, "", ""]).encode() + body


def find_head(data: bytearray, searched: int, max_bytes: int) -> int:
    """The length of the head that `data` begins with; 0 where its end has not come yet. Raises Refused where it can't
    become one: junk is refused by what has come of it, without waiting for the rest.

    `searched` bytes of it were looked at before, so that a head that comes byte by byte costs no more than another.
    """
    end = data.find(b"\r\n\r\n", max(0, searched - 3), max_bytes) + 4
    found = end > 3
    come = end if found else len(data)
    if not 32 < data[0] < 127 or _BARE_LINE_FEED.search(data, searched, come):
        raise _bad("a request line and headers whose lines end with CR LF")
    if come > MAX_LINE and data.find(b"\r\n", 0, MAX_LINE + 2) < 0:
        raise Refused(414, "uri_too_long", f"expected a request line of at most {MAX_LINE} bytes")
    if not found and come >= max_bytes:
        raise Refused(431, "headers_too_large", f"Headers too large. Expected at most {max_bytes} bytes")
    return end if found else 0


def read_head(head: bytes) -> tuple[h11.Connection, h11.Request]:
    """The request of a whole head, and the connection that reads its body. Raises Refused."""
    check_head(head)
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(head)
    try:
        request = connection.next_event()
    except h11.RemoteProtocolError as error:
        raise Refused(error.error_status_hint, "bad_request", str(error)) from None
    assert isinstance(request, h11.Request)
    return connection, request


def check_head(head: bytes) -> None:
    """Raise Refused unless `head` is one by the RFC's grammar, without what is obsolete, and can be read in one way."""
    if head.count(b"\r\n") > MAX_HEADERS + 2:
        raise Refused(431, "headers_too_large", f"expected at most {MAX_HEADERS} headers")
    if not _HEAD.fullmatch(head):
        raise _bad("a request line and headers `Name: value` without control characters or folded lines")
    line, *fields = head[:-4].split(b"\r\n")
    method, _, version = line.split(b" ")
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise _bad(f"HTTP/1.1 or HTTP/1.0, got {version.decode()}")
    if method == b"CONNECT":
        raise _bad("a request to this server; CONNECT is for proxies")
    hosts: list[bytes] = []
    lengths: list[bytes] = []
    codings: list[bytes] = []
    for field in fields:
        name, _, value = field.partition(b":")
        found = {b"host": hosts, b"content-length": lengths, b"transfer-encoding": codings}.get(name.lower())
        if found is not None:
            found.append(value.strip(b" \t"))
    if (len(hosts) != 1 and (hosts or version == b"HTTP/1.1")) or any(not _AUTHORITY.fullmatch(host) for host in hosts):
        raise _bad("one Host header, a name or address with or without a port")
    if len(lengths) > 1 or any(not _LENGTH.fullmatch(length) for length in lengths):
        raise _bad("at most one Content-Length, a whole number")
    if codings and (lengths or version == b"HTTP/1.0" or [coding.lower() for coding in codings] != [b"chunked"]):
        raise _bad("no Transfer-Encoding but one `chunked`, and none in HTTP/1.0 or beside a Content-Length")


def split_target(request: h11.Request) -> tuple[str, bytes, bytes, list[tuple[bytes, bytes]]]:
    """Path (decoded and raw), query and headers; of an absolute URL the authority takes the place of Host."""
    target, headers = request.target, list(request.headers)
    if absolute := _ABSOLUTE.fullmatch(target):
        authority, target = absolute.groups()
        target = target if target.startswith(b"/") else b"/" + target
        if not _AUTHORITY.fullmatch(authority):
            raise _bad("a URL with a host")
        headers = [(name, authority if name == b"host" else value) for name, value in headers]
    if not target.startswith(b"/") or b"#" in target:
        raise _bad("a path that begins with a slash, or a URL, without a fragment")
    raw_path, _, query = target.partition(b"?")
    return unquote(raw_path.decode("ascii")), raw_path, query, headers


class Body:
    """The body of `request`, which `connection` has read, from bytes as they come."""

    def __init__(self, connection: h11.Connection, request: h11.Request) -> None:
        self._connection = connection
        self._chunked = any(name == b"transfer-encoding" for name, _ in request.headers)
        self._received = self._size = self._chunks = 0  # bytes of it, of its content, and chunks
        self._last = b""  # the four bytes that were read last
        self.whole = False
        self.rest = b""  # once it is whole: what came after it

    def read(self, data: bytes) -> list[bytes]:
        """Its parts that are in `data`. Raises Refused."""
        parts = []
        if data:
            self._received += len(data)
            self._connection.receive_data(data)
        try:
            while (event := self._connection.next_event()) is not h11.NEED_DATA:
                if isinstance(event, h11.Data):
                    self._size += len(event.data)
                    self._chunks += event.chunk_start
                    self._check_framing(5 * self._chunks)  # each took as much at least
                    parts.append(bytes(event.data))
                elif isinstance(event, h11.EndOfMessage):
                    self.whole, self.rest = True, self._connection.trailing_data[0]
                    self._received -= len(self.rest)
                    self._check_end(event, data[: len(data) - len(self.rest)])
                    break
        except h11.RemoteProtocolError as error:
            raise Refused(error.error_status_hint, "bad_request", str(error)) from None
        self._check_framing(self._received - self._size)
        self._last = (self._last + data[-4:])[-4:]
        return parts

    def _check_framing(self, count: int) -> None:
        if count > _FRAMING + self._size // 8:
            raise _bad("larger chunks and shorter extensions of them")

    def _check_end(self, event: h11.EndOfMessage, read: bytes) -> None:
        """A chunked body ends with an empty chunk and an empty line; h11 takes trailers and a bare LF for it, too."""
        if self._chunked and (event.headers or not (self._last + read[-4:]).endswith(b"\r\n\r\n")):
            raise _bad("no trailers after the last chunk")


def _bad(expected: str) -> Refused:
    return Refused(400, "bad_request", f"expected {expected}")
