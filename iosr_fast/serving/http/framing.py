"""Strict framing of requests by RFC 9112, so that this server and a proxy in front agree on where each request ends.

llhttp parses heads (connection.py). It accepts some of what proxies read in different ways, so `check_head` checks each
head first. `Body` finds the end of a body.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from iosr_fast.serving.http.errors import ApiError, error_response
from iosr_fast.serving.limits import Limits

_TOKEN = rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+"
_HEAD = re.compile(rb"(%s) ([!-~]+) HTTP/(\d\.\d)\r\n(?:%s:[\t -~\x80-\xff]*\r\n)*\r\n" % (_TOKEN, _TOKEN))
_BARE_LINE_FEED = re.compile(rb"(?<!\r)\n")
_HOST = rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::\d{0,5})?"
_AUTHORITY = re.compile(_HOST)
TARGET = re.compile(rb"(?i:https?)://(%s)([/?][^#]*)?|(/[^#]*)" % _HOST)  # a URL, or a path and a query
_LENGTH = re.compile(rb"\d{1,18}")

# The size line of a chunk, with the CR LF that ends the chunk before it, or the end of the body. No client of
# pictures sends chunk extensions, so they are refused: at most 22 bytes are matched again at each byte that arrives.
_CHUNK = re.compile(rb"\r\n(?:0{1,16}\r\n\r\n|(?!0{1,16}\r)([0-9A-Fa-f]{1,16})\r\n)")
_BEGUN_CHUNK = re.compile(rb"\r?|\r\n[0-9A-Fa-f]{0,16}|\r\n[0-9A-Fa-f]{1,16}\r|\r\n0{1,16}\r\n\r?")


def last_answer(error: ApiError) -> bytes:
    """The answer to a request that no application sees; the connection is closed after it."""
    response = error_response({}, error)
    response.headers.update({"X-Content-Type-Options": "nosniff", "Connection": "close"})
    headers = [b"%s: %s\r\n" % header for header in response.raw_headers]
    return b"".join([STATUS_LINE[error.status_code], *headers, b"\r\n", bytes(response.body)])


def bad_request(expected: str) -> ApiError:
    return ApiError(400, "bad_request", f"expected {expected}")


def find_head(data: bytearray, searched: int) -> int:
    """The length of the head at the start of `data`; 0 while it is incomplete. Raises ApiError as soon as `data` can't
    become a valid head.

    The first `searched` bytes were checked before, so a head that arrives byte by byte costs no more than a whole one.
    """
    end = data.find(b"\r\n\r\n", max(0, searched - 3), Limits.head) + 4
    complete = end > 3
    size = end if complete else len(data)
    if not 32 < data[0] < 127 or _BARE_LINE_FEED.search(data, searched, size):
        raise bad_request("a request line and headers whose lines end with CR LF")
    if size > Limits.request_line and data.find(b"\r\n", 0, Limits.request_line + 2) < 0:
        raise ApiError(414, "uri_too_long", f"expected a request line of at most {Limits.request_line} bytes")
    if not complete and size >= Limits.head:
        raise ApiError(431, "headers_too_large", f"expected a request line and headers of at most {Limits.head} bytes")
    return end if complete else 0


def check_head(head: bytes, serves: Callable[[str], bool]) -> int | None:
    """The length of the body of a complete head; None: chunked.

    Raises ApiError unless the head follows the RFC's grammar, without its obsolete parts, is unambiguous, and `serves`
    takes its host; HTTP/1.0 needs none, and no browser speaks it.
    """
    if head.count(b"\r\n") > Limits.headers + 2:
        raise ApiError(431, "headers_too_large", f"expected at most {Limits.headers} headers")
    grammar = _HEAD.fullmatch(head)
    if grammar is None:
        raise bad_request("a request line and headers `Name: value` without control characters or folded lines")
    method, target, version = grammar.groups()
    if version not in (b"1.1", b"1.0"):
        raise bad_request(f"HTTP/1.1 or HTTP/1.0, got HTTP/{version.decode()}")
    url = TARGET.fullmatch(target)
    if method == b"CONNECT" or url is None:
        raise bad_request("a path that begins with a slash, or a URL with a host, without a fragment")
    found: dict[bytes, list[bytes]] = {b"host": [], b"content-length": [], b"transfer-encoding": []}
    for field in head[:-4].split(b"\r\n")[1:]:
        name, _, value = field.partition(b":")
        if (name := name.lower()) in found:
            found[name].append(value.strip(b" \t"))
    hosts, lengths, codings = found.values()
    if (len(hosts) != 1 and (hosts or version == b"1.1")) or any(not _AUTHORITY.fullmatch(host) for host in hosts):
        raise bad_request("one Host header, a name or address with or without a port")
    if (host := url[1] or b"".join(hosts)) and not serves(host.decode()):
        expected = "expected a Host that is an address, localhost, or a name given by --public-host"
        raise ApiError(400, "wrong_host", f"{expected}, got {host.decode()[:80]!r}")
    if len(lengths) > 1 or any(not _LENGTH.fullmatch(length) for length in lengths):
        raise bad_request("at most one Content-Length with a whole number")
    if not codings:
        return int(lengths[0]) if lengths else 0
    if lengths or version == b"1.0" or [coding.lower() for coding in codings] != [b"chunked"]:
        raise bad_request("at most one Transfer-Encoding, `chunked`, and none in HTTP/1.0 or beside a Content-Length")
    return None


class Body:
    """Reads a body of `length` bytes, or a chunked one (None), incrementally."""

    def __init__(self, length: int | None) -> None:
        self._chunked = length is None
        self._left = length or 0  # of the body, or of the current chunk
        self._pending = b"\r\n" if self._chunked else b""  # of a size line that is incomplete
        self._content = self._framing = 0
        self.whole = length == 0
        self.rest = b""  # bytes after the body, once it is whole

    def read(self, data: bytes) -> list[bytes]:
        """The parts of the body in `data`. Raises ApiError."""
        data, at, parts = self._pending + data, 0, []
        while not self.whole and at < len(data):
            if self._left:
                parts.append(data[at : at + self._left])
                size = len(parts[-1])
                at, self._left, self._content = at + size, self._left - size, self._content + size
                self.whole = not (self._left or self._chunked)
            elif line := _CHUNK.match(data, at):
                at, self._framing = line.end(), self._framing + len(line[0])
                self._left = int(line[1] or b"0", 16)
                self.whole = not self._left
                if self._framing > Limits.chunk_framing + self._content // 8:
                    raise bad_request("larger chunks")
            elif _BEGUN_CHUNK.fullmatch(data, at):
                break
            else:
                raise bad_request("chunks by RFC 9112, sizes of at most 16 digits, no extensions and no trailers")
        self._pending, self.rest = (b"", data[at:]) if self.whole else (data[at:], b"")
        return parts
