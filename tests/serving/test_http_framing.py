"""Where a request ends is never in doubt: upgrades, lengths, chunks, hosts and targets, over bare sockets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import h11
import pytest

from iosr_fast.serving.http.errors import ApiError
from iosr_fast.serving.http.framing import Body, check_head, find_head
from tests.serving.http_edge import Site, read_answers, site, statuses

HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
SIZED = b"Content-Length: %d\r\n\r\n%s" % (len(HIDDEN), HIDDEN)
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN)


@pytest.fixture(scope="module")
def shared() -> Iterator[Site]:
    with site() as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_seen(shared: Site) -> None:
    shared.seen.clear()


def post(headers: bytes = b"", rest: bytes = b"\r\n", line: bytes = b"POST / HTTP/1.1", host: bytes = b"x") -> bytes:
    return line + b"\r\nHost: " + host + b"\r\n" + headers + rest


@pytest.mark.slow
@pytest.mark.parametrize("body", [SIZED, CHUNKED], ids=["sized", "chunked"])
@pytest.mark.parametrize("upgrade", [
    b"", b"Connection: upgrade\r\n", b"Upgrade: websocket\r\n",
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: AAAA\r\nSec-WebSocket-Version: 13\r\n",
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n",
    b"connection: keep-alive, UPGRADE\r\nupgrade: TLS/1.0, something/9\r\n",
    b"Connection: x\r\nConnection: upgrade\r\nUpgrade: h2c\r\nUpgrade: websocket\r\n",
])  # fmt: skip
def test_a_body_does_not_run_as_a_request(shared: Site, upgrade: bytes, body: bytes) -> None:
    """Of any method, of an upgrade, pipelined, unread, answered before it has come, and in pieces."""
    for method in (b"POST", b"GET", b"HEAD", b"OPTIONS", b"DELETE"):
        read, unread = (post(upgrade, body, method + path + b" HTTP/1.1") for path in (b" /", b" /unread"))
        assert statuses(shared.ask(read + unread + LAST)) == [200] * 3
        assert statuses(shared.ask(unread[:-20], unread[-20:] + LAST, pause_s=0.02)) == [200, 200]
    assert statuses(shared.ask(*(read[i : i + 7] for i in range(0, len(read), 7)), LAST)) == [200, 200]
    assert ("DELETE", "/", len(HIDDEN)) in shared.seen and "/hidden" not in {path for _, path, _ in shared.seen}


# --- one reading of heads and bodies, that of another parser ---

ODD = [bytes([byte]) for byte in b" \t\0\x0b\x7f\xe9\r\n,;:+-_'\"()0159aAX#/"]


def changes(request: bytes) -> Iterator[bytes]:
    """The request, without any of its bytes, or with an odd byte in its place or before it."""
    yield request
    for at in range(len(request)):
        yield request[:at] + request[at + 1 :]
        for byte in ODD:
            yield request[:at] + byte + request[at + 1 :]
            yield request[:at] + byte + request[at:]


def reading(data: bytes, step: int) -> tuple[bytes, bytes | None] | None:
    """The content of the first request, and what follows, None while it is incomplete; None if it is refused."""
    try:
        at, content, rest = find_head(bytearray(data), 0), b"", b""
        body = Body(check_head(data[:at], lambda _: True))
        while not body.whole and at < len(data):
            content += b"".join(body.read(data[at : at + step]))
            at, rest = at + step, body.rest
    except ApiError:
        return None
    return content, rest + data[at:] if body.whole else None


def reading_of_h11(data: bytes) -> tuple[bytes, bytes | None]:
    reader, content = h11.Connection(h11.SERVER), b""
    reader.receive_data(data)
    assert isinstance(reader.next_event(), h11.Request)
    while isinstance(event := reader.next_event(), h11.Data):
        content += bytes(event.data)
    return content, reader.trailing_data[0] if isinstance(event, h11.EndOfMessage) else None


@pytest.mark.parametrize("request_", [
    post(b"X: a\r\nContent-Length: 12\r\n", b"\r\n0\r\n\r\nhello\r\n"),
    post(b"Transfer-Encoding: chunked\r\n", b"\r\n5\r\nhello\r\n" + b"0" * 16 + b"\r\n\r\n"),
    post(b"Transfer-Encoding: chunked\r\n", b"\r\n1\r\na\r\nA\r\n" + b"9" * 10 + b"\r\n00\r\n\r\n"),
    post(b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n", b"\r\n0\r\n\r\n"),
])  # fmt: skip
def test_what_is_accepted_reads_as_another_parser_reads_it_and_however_it_is_cut(request_: bytes) -> None:
    accepted = 0
    for changed in changes(request_):
        made = reading(changed + LAST, len(request_) * 9)
        assert made == reading(changed + LAST, 1)
        if made is not None:
            accepted += 1
            assert made == reading_of_h11(changed + LAST)
    assert accepted > 100


# --- what other parsers read in different ways is refused, and so is all that follows ---


@pytest.mark.parametrize("framing", [
    *(b"Content-Length: " + bad + b"\r\n" for bad in (b"+5", b"5,5", b"5, 5", b"", b"9" * 25, b"9" * 5000)),
    b"Content-Length: 5\r\nContent-Length: 5\r\n", b"Content-Length: 5\r\ncontent-length: 6\r\n",
    b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", b"Transfer-Encoding: chunked\r\nContent-Length: 0\r\n",
    *(b"Transfer-Encoding: " + bad + b"\r\n" for bad in (b"gzip, chunked", b"identity", b"", b"chunked;a=b")),
    b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n", b"Transfer-Encoding:\r\n chunked\r\n",
    b"Transfer-Encoding : chunked\r\n", b"X: a\r\n\tContent-Length: 5\r\n", b"X: a\nContent-Length: 5\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n+", b"Transfer-Encoding: chunked\r\n\r\n5;a\r\nhello",
])  # fmt: skip
def test_doubtful_framing_is_refused(shared: Site, framing: bytes) -> None:
    data = post(framing, b"\r\n5\r\nhello\r\n0\r\n\r\n") + HIDDEN + LAST
    answer = shared.ask(data)
    assert statuses(answer) == [400] and b"connection: close" in answer.lower()
    assert not shared.seen
    assert statuses(shared.ask(post(line=b"GET / HTTP/1.1") + data)) == [200, 400]  # as a pipelined request, too


@pytest.mark.parametrize(("begun", "read"), [
    (b"5;" + b"a" * 24_000, 2), (b"0;a", 2), (b"5 ", 2), (b"5\r;", 3), (b"0" * 24_000, 17), (b"f" * 24_000, 17),
    (b"0" * 16 + b"\r\n\rX", 20), (b"0\r\nX: a", 4), (b"0\r\n\n", 4), (b"5\r\nhellox", 9), (b"5\r\nhello\n", 9),
    (b"1\r\na\r\n" * 10_000, 30_249),  # which cost more time than one large chunk
])  # fmt: skip
def test_chunks_are_refused_at_the_first_byte_that_none_has(begun: bytes, read: int) -> None:
    body = Body(None)
    for at in range(read - 1):
        body.read(begun[at : at + 1])
    with pytest.raises(ApiError):
        body.read(begun[read - 1 : read])


def test_a_body_may_have_a_few_small_chunks_and_many_of_some_size() -> None:
    sizes, body = [1] * 500 + [300] * 2000 + [70_000], Body(None)
    parts = body.read(b"".join(b"%X\r\n%s\r\n" % (size, bytes(size)) for size in sizes) + b"000\r\n\r\n")
    assert body.whole and [len(one) for one in parts] == sizes


LINES = [
    b"", b"GET / HTTP/1.1 ", b"GET /\xe9 HTTP/1.1", b"GET / HTTP/1.2", b"GET / HTTP/2.0", b"GET /#a HTTP/1.1",
    b"GET a HTTP/1.1", b"OPTIONS * HTTP/1.1", b"GET x:80 HTTP/1.1", b"CONNECT x:80 HTTP/1.1", b"CONNECT / HTTP/1.1",
    b"GET http:///a HTTP/1.1", b"GET http://[::1 HTTP/1.1", b"GET http://u@x/ HTTP/1.1", b"GET ftp://x/ HTTP/1.1",
]  # fmt: skip
HOSTS = [
    b"",
    b" ",
    b"a b",
    b"a,b",
    b"a/b",
    b"user@a",
    b"a:b",
    b"a:80:80",
    b"a:999999",
    b"[::1",
    b"::1",
    b"http://a",
    b"a?b",
]
HOSTS += [b"a#b", b"\xe9", b'"a"', b"a\\b", b"a\r\nHost: b", b"a\r\nhOST: a"]


@pytest.mark.parametrize(("head", "status"), [
    *((b"\r\n" * (not line) + post(line=line), 400) for line in LINES),
    *((post(line=b"GET / HTTP/1.1", host=host), 400) for host in HOSTS),
    (b"GET / HTTP/1.1\r\n\r\n", 400), (b"GET / HTTP/1.0\r\nHost: a\r\nHost: a\r\n\r\n", 400),
    (post(line=b"POST / HTTP/1.0", rest=CHUNKED), 400), (b"GET /\r\n\r\n", 400),  # HTTP/0.9
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400), (b"GET / HTTP/1.1\nHost: x\n\n", 400),  # TLS; line feeds
    *((post(line=method + b" / HTTP/1.1"), 501) for method in (b"X", b"get", b"GETS")),
    *((post(b"X: a\r\n" * count), 431) for count in (100, 20_000)),
    *((post(long + b"a" * 70_000), 431) for long in (b"X: ", b"X")),
    *((b"GET /" + b"a" * length, 414) for length in (8_200, 3_000_000)),
])  # fmt: skip
def test_a_head_that_is_none_is_refused(shared: Site, head: bytes, status: int) -> None:
    assert statuses(shared.ask(head)) == statuses(shared.ask(head + LAST)) == [status]
    assert not shared.seen


def test_a_head_may_almost_reach_its_limits(shared: Site) -> None:
    for head in (b"X: a\r\n" * 99, b"X: " + b"a" * 60_000 + b"\r\n"):
        assert statuses(shared.ask(post(head) + LAST)) == [200, 200]
    assert statuses(shared.ask(post(line=b"GET /" + b"a" * 8_000 + b" HTTP/1.1") + LAST)) == [200, 200]


@pytest.mark.parametrize(("settings", "good", "bad"), [
    ({"host": "127.0.0.1"}, [b"localhost:80", b"LocalHost", b"127.9.9.9", b"[::1]:80"], [
        b"evil.example", b"evil.example:80", b"localhost.evil.example", b"127.0.0.1.evil.example", b"x", b"[::1",
    ]),
    ({"host": "::1", "public_host": ("Shop.example",)}, [b"shop.example:443", b"SHOP.EXAMPLE", b"localhost"], [
        b"evil.example", b"a.shop.example", b"shop.example.evil",
    ]),
    ({"host": "localhost"}, [], [b"evil.example"]),
    ({"public_host": ("a", "b")}, [b"b", b"10.0.0.7:80"], [b"evil.example"]),
    ({"host": "0.0.0.0"}, [b"evil.example", b"a", b"a.b-c_d:80", b"127.0.0.1:80", b"[::1]:80", b"  a  ", b"a:"], []),
])  # fmt: skip
def test_a_host_names_this_server(settings: dict[str, Any], good: list[bytes], bad: list[bytes]) -> None:
    with site(**settings) as guarded:
        for host in good:
            assert statuses(guarded.ask(post(b"Connection: close\r\n", line=b"GET / HTTP/1.1", host=host))) == [200]
        for host in bad:
            url = post(line=b"GET http://" + host + b"/ HTTP/1.1", host=b"localhost")
            for request in (post(line=b"GET / HTTP/1.1", host=host), url):
                answer = guarded.ask(request)
                assert statuses(answer) == [400] and b'{"error":{"code":"' in answer, host
        assert len(guarded.seen) == len(good)


def test_a_target_may_be_a_url_whose_host_counts(shared: Site) -> None:
    with shared.connect() as connection:
        for target in (b"http://a.b:80/c?d=e", b"HTTP://a", b"http://a?b"):
            connection.sendall(post(line=b"GET " + target + b" HTTP/1.1"))
        answers = [(one["path"], one["host"]) for _, one in read_answers(connection, 3)]
    assert answers == [("/c", "a.b:80"), ("/", "a"), ("/", "a")]


def test_http_1_0_is_answered_and_closed(shared: Site) -> None:
    for headers in (b"", b"Host: x\r\n", b"Connection: keep-alive\r\n", b"Expect: 100-continue\r\n"):
        answer = shared.ask(b"GET /old HTTP/1.0\r\n" + headers + b"\r\n")
        assert statuses(answer) == [200] and b"connection: close" in answer.lower()


def test_an_answer_to_head_has_no_body(shared: Site) -> None:
    head, _, rest = shared.ask(post(line=b"HEAD /a HTTP/1.1") + LAST).partition(b"\r\n\r\n")
    assert b"content-length: " in head.lower() and rest.startswith(b"HTTP/1.1 200")


def test_100_continue_is_sent_when_the_body_is_read_and_only_then(shared: Site) -> None:
    head = b"Content-Length: 5\r\nExpect: 100-continue\r\n"
    with shared.connect() as connection:
        for _ in range(2):
            connection.sendall(post(head))
            assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(b"hello")
            assert read_answers(connection, 1)[0][1]["size"] == 5
    refused = shared.ask(post(head, line=b"POST /unread HTTP/1.1"))  # closed: would the body come or a request?
    assert statuses(refused) == [200] and b"connection: close" in refused.lower()
    assert statuses(shared.ask(post(head, b"\r\nhello") + LAST)) == [200, 200]
