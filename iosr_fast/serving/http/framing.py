"""Strict framing of requests by RFC 9112, so that this server and a proxy in front agree on where each request ends.

h11 parses heads and bodies. It accepts everything that the RFC lets a recipient accept (bare line feeds, folded lines,
control characters, Content-Length beside Transfer-Encoding), and proxies interpret these in different ways. Therefore
`check_head` checks each head first, and `Body` the end of each body.
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
_FRAMING = 24 << 10  # bytes of chunk headers allowed beyond an eighth of the content, because each chunk costs time

_TOKEN = rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+"
_HEAD = re.compile(rb"%s [!-~]+ HTTP/\d\.\d\r\n(?:%s:[\t -~\x80-\xff]*\r\n)*\r\n" % (_TOKEN, _TOKEN))
_BARE_LINE_FEED = re.compile(rb"(?<!\r)\n")
_AUTHORITY = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::\d{0,5})?")
_ABSOLUTE = re.compile(rb"(?i:https?)://([^/?]*)(.*)")
_LENGTH = re.compile(rb"\d{1,18}")


class Refused(Exception):
    """The connection must be closed: an HTTP status, a code for programs and a message for people."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code

    def answer(self) -> bytes:
        """The last answer of the connection, in the form of all errors."""
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
    """The length of the head at the start of `data`; 0 while it is incomplete. Raises Refused as soon as `data` can't
    become a valid head.

    The first `searched` bytes were checked before, so a head that arrives byte by byte costs no more than a whole one.
    """
    end = data.find(b"\r\n\r\n", max(0, searched - 3), max_bytes) + 4
    complete = end > 3
    size = end if complete else len(data)
    if not 32 < data[0] < 127 or _BARE_LINE_FEED.search(data, searched, size):
        raise _bad("a request line and headers whose lines end with CR LF")
    if size > MAX_LINE and data.find(b"\r\n", 0, MAX_LINE + 2) < 0:
        raise Refused(414, "uri_too_long", f"expected a request line of at most {MAX_LINE} bytes")
    if not complete and size >= max_bytes:
        raise Refused(431, "headers_too_large", f"expected a request line and headers of at most {max_bytes} bytes")
    return end if complete else 0


def read_head(head: bytes) -> tuple[h11.Connection, h11.Request]:
    """The request of a complete head, and the h11 connection that reads its body. Raises Refused."""
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
    """Raise Refused unless `head` follows the RFC's grammar, without its obsolete parts, and is unambiguous."""
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
        values = {b"host": hosts, b"content-length": lengths, b"transfer-encoding": codings}.get(name.lower())
        if values is not None:
            values.append(value.strip(b" \t"))
    if (len(hosts) != 1 and (hosts or version == b"HTTP/1.1")) or any(not _AUTHORITY.fullmatch(host) for host in hosts):
        raise _bad("one Host header, a name or address with or without a port")
    if len(lengths) > 1 or any(not _LENGTH.fullmatch(length) for length in lengths):
        raise _bad("at most one Content-Length with a whole number")
    if codings and (lengths or version == b"HTTP/1.0" or [coding.lower() for coding in codings] != [b"chunked"]):
        raise _bad("at most one Transfer-Encoding, `chunked`, and none in HTTP/1.0 or beside a Content-Length")


def split_target(request: h11.Request) -> tuple[str, bytes, bytes, list[tuple[bytes, bytes]]]:
    """Path (decoded and raw), query and headers; the authority of an absolute URL replaces Host."""
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
    """Reads the body of `request` incrementally; `connection` has read its head."""

    def __init__(self, connection: h11.Connection, request: h11.Request) -> None:
        self._connection = connection
        self._chunked = any(name == b"transfer-encoding" for name, _ in request.headers)
        self._received = self._size = self._chunks = 0  # all bytes, bytes of content, chunks
        self._last = b""  # the last four bytes
        self.whole = False
        self.rest = b""  # bytes after the body, once it is whole

    def read(self, data: bytes) -> list[bytes]:
        """The parts of the body in `data`. Raises Refused."""
        parts = []
        if data:
            self._received += len(data)
            self._connection.receive_data(data)
        try:
            while (event := self._connection.next_event()) is not h11.NEED_DATA:
                if isinstance(event, h11.Data):
                    self._size += len(event.data)
                    self._chunks += event.chunk_start
                    self._check_framing(5 * self._chunks)  # the minimum size of their headers
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
            raise _bad("larger chunks with shorter chunk extensions")

    def _check_end(self, event: h11.EndOfMessage, read: bytes) -> None:
        """A chunked body ends with an empty chunk and an empty line; h11 also accepts trailers and a bare LF."""
        if self._chunked and (event.headers or not (self._last + read[-4:]).endswith(b"\r\n\r\n")):
            raise _bad("no trailers after the last chunk")


def _bad(expected: str) -> Refused:
    return Refused(400, "bad_request", f"expected {expected}")
