"""Where a request ends is never in doubt: upgrades, lengths, chunks, hosts and targets, over bare sockets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from iosr_fast.serving.http.errors import ApiError
from iosr_fast.serving.http.framing import Body
from tests.serving.http_edge import Site, read_all, read_answers, site, statuses

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
@pytest.mark.parametrize(
    "upgrade",
    [
        b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: AAAA\r\nSec-WebSocket-Version: 13\r\n",
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n",
        b"connection: keep-alive, UPGRADE\r\nupgrade: TLS/1.0, something/9\r\n",
        b"Connection: x\r\nConnection: upgrade\r\nUpgrade: h2c\r\nUpgrade: websocket\r\n",
        b"Connection: upgrade\r\n",
        b"Upgrade: websocket\r\n",
    ],
    ids=["websocket", "h2c", "list", "twice", "connection only", "upgrade only"],
)
def test_the_body_of_an_upgrade_does_not_run_as_a_request(shared: Site, upgrade: bytes, body: bytes) -> None:
    assert statuses(shared.ask(post(upgrade, body) * 2 + LAST)) == [200] * 3  # the second one is pipelined
    assert shared.seen == [("POST", "/", len(HIDDEN))] * 2 + [("GET", "/last", 0)]
    # Unread, answered before it has come, and byte by byte, it is no request either.
    data = post(upgrade, body, b"POST /unread HTTP/1.1")
    assert statuses(shared.ask(data[:-20], data[-20:] + LAST, pause_s=0.05)) == [200, 200]
    with shared.connect() as connection:
        for i in range(0, len(data), 7):
            connection.sendall(data[i : i + 7])
        connection.sendall(LAST)
        assert statuses(read_all(connection)) == [200, 200]
    assert "/hidden" not in {path for _, path, _ in shared.seen}


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"OPTIONS", b"DELETE"])
def test_a_body_of_any_method_is_a_body(shared: Site, method: bytes) -> None:
    for body in (SIZED, CHUNKED):
        for path in (b" / ", b" /unread "):
            assert statuses(shared.ask(post(b"", body, method + path + b"HTTP/1.1") + LAST)) == [200, 200]
    assert "/hidden" not in {path for _, path, _ in shared.seen}


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nhOST: a\r\n",
        b"GET / HTTP/1.0\r\nHost: a\r\nHost: a\r\n",
        *(b"GET / HTTP/1.1\r\nHost:" + bad + b"\r\n" for bad in (
            b"", b" ", b" a b", b" a,b", b" a/b", b" user@a", b" a:b", b" a:80:80", b" a:999999", b" [::1", b" ::1",
            b" http://a", b" a?b", b" a#b", b" \xe9", b' "a"', b" a\\b",
        )),
    ],
)  # fmt: skip
def test_a_request_for_no_host_or_two_is_refused(shared: Site, head: bytes) -> None:
    assert statuses(shared.ask(head + b"\r\n" + LAST)) == [400]
    assert not shared.seen


@pytest.mark.parametrize(("settings", "good", "bad"), [
    ({"host": "127.0.0.1"}, [b"localhost:80", b"LocalHost", b"127.9.9.9", b"[::1]:80"], [
        b"evil.example", b"evil.example:80", b"localhost.evil.example", b"127.0.0.1.evil.example", b"x", b"[::1",
    ]),
    ({"host": "localhost"}, [b"localhost"], [b"evil.example"]),
    ({"host": "::1", "public_host": ("Shop.example",)}, [b"shop.example:443", b"SHOP.EXAMPLE", b"localhost"], [
        b"evil.example", b"a.shop.example", b"shop.example.evil",
    ]),
    ({"host": "0.0.0.0", "public_host": ("a", "b")}, [b"b", b"10.0.0.7:80"], [b"evil.example"]),
    ({"host": "0.0.0.0"}, [b"evil.example", b"a", b"a.b-c_d:80", b"127.0.0.1:80", b"[::1]:80", b"  a  ", b"a:"], []),
])  # fmt: skip
def test_a_host_that_does_not_name_this_server_gets_400(
    settings: dict[str, Any], good: list[bytes], bad: list[bytes]
) -> None:
    with site(**settings) as guarded:
        for host in good:
            assert statuses(guarded.ask(post(b"Connection: close\r\n", line=b"GET / HTTP/1.1", host=host))) == [200]
        for host in bad:
            url = post(line=b"GET http://" + host + b"/ HTTP/1.1", host=b"localhost")
            for request in (post(line=b"GET / HTTP/1.1", host=host), url):
                answer = guarded.ask(request)
                assert statuses(answer) == [400] and b'{"error":{"code":"' in answer, host
        assert len(guarded.seen) == len(good)


@pytest.mark.parametrize(
    "framing",
    [
        *(b"Content-Length: " + bad + b"\r\n" for bad in (
            b"+5", b"-5", b"5 5", b"5,5", b"5, 5", b"5,6", b"0x5", b"5.0", b"", b"five", b"\xb5", b"9" * 25,
            b"9" * 5000,
        )),
        b"Content-Length: 5\r\nContent-Length: 5\r\n",
        b"Content-Length: 5\r\ncontent-length: 6\r\n",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 0\r\n",
        *(b"Transfer-Encoding: " + bad + b"\r\n" for bad in (
            b"gzip, chunked", b"chunked, chunked", b"chunked, gzip", b"gzip", b"identity", b"xchunked", b"chunkedx",
            b"", b",chunked", b"chunked,", b"chunked;a=b", b'"chunked"', b"\x0bchunked",
        )),
        b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\ntransfer-encoding: identity\r\n",
        b"Transfer-Encoding:\r\n chunked\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"Content-Length : 5\r\n",
        b" Content-Length: 5\r\n",
        b"X: a\r\n\tContent-Length: 5\r\n",
        b"X: a\nContent-Length: 5\r\n",
        b"X: a\rContent-Length: 5\r\n",
        b"Content-Length: 5\n",
        b"Content-Length\r\n",
        b": a\r\n",
        *(b"X: a" + bad + b"b\r\n" for bad in (b"\0", b"\x01", b"\x7f")),
        b"X\x00: a\r\n",
        b"X Y: a\r\n",
        b"X\xe9: a\r\n",
        b"(X): a\r\n",
    ],
)  # fmt: skip
def test_doubtful_framing_is_refused_and_what_follows_is_not_read(shared: Site, framing: bytes) -> None:
    data = post(framing, b"\r\n5\r\nhello\r\n0\r\n\r\n") + HIDDEN + LAST
    answer = shared.ask(data)
    assert statuses(answer) == [400] and b"connection: close" in answer.lower()
    assert not shared.seen
    assert statuses(shared.ask(post(line=b"GET / HTTP/1.1") + data)) == [200, 400]  # as a pipelined request, too


def test_transfer_encoding_is_none_of_http_1_0(shared: Site) -> None:
    assert statuses(shared.ask(post(line=b"POST / HTTP/1.0", rest=CHUNKED))) == [400]
    assert not shared.seen


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        *(size + b"\r\nhello\r\n0\r\n\r\n" for size in (
            b"+5", b"-5", b" 5", b"5 ", b"5\t", b"0x5", b"5_0", b"", b";a", b"5;", b"5;a", b"5;a=b", b'5;a="b"',
            b"5 ;a", b"10000000000000000000000005", b"0" * 16 + b"5", b"5;" + b"a" * 100_000,
        )),
        b"5\nhello\r\n0\r\n\r\n",
        b"5\r\nhello\n0\r\n\r\n",
        b"5\r\nhelloo\r\n0\r\n\r\n",
        b"5\r\nhell\r\n0\r\n\r\n\r\n",
        b"5\r\nhello0\r\n\r\n",
        b"5\r\nhello\r\n0\r\n\n",
        b"5\r\nhello\r\n0;a\r\n\r\n",
        b"0\r\n\n",
        b"0\r\nX: a\n\n",
        b"5\r\nhello\r\n0\r\nX: a\r\n\r\n",
        b"5\r\nhello\r\n0\r\nContent-Length: 5\r\n\r\n",
        b"5\r\nhello\r\n0\r\n" + b"X: a\r\n" * 20_000 + b"\r\n",
        b"1\r\na\r\n" * 10_000 + b"0\r\n\r\n",
    ],
)  # fmt: skip
def test_doubtful_chunks_are_refused_and_what_follows_is_not_read(shared: Site, body: bytes) -> None:
    for split in (len(body), len(body) - 1, len(body) // 2, 2):
        data = post(b"Transfer-Encoding: chunked\r\n", b"\r\n" + body + HIDDEN + LAST)
        at = data.index(b"\r\n\r\n") + 4 + split
        assert statuses(shared.ask(data[:at], data[at:], pause_s=0.01)) == [400]
    assert not shared.seen


@pytest.mark.parametrize(("begun", "read"), [
    (b"5;" + b"a" * 24_000, 2), (b'5;a="' + b"\\" * 24_000, 2), (b"0;a", 2), (b"5\r;", 3), (b"5\0", 2), (b"5 ", 2),
    (b"x", 1), (b"0" * 24_000, 17), (b"f" * 24_000, 17), (b"f" * 16 + b";", 17), (b"0" * 16 + b"\r\n\rX", 20),
    (b"0\r\nX", 4), (b"5\r\nhellox", 9), (b"1\r\na\r\n" * 10_000, 30_249),
])  # fmt: skip
def test_bytes_one_by_one_are_refused_at_the_first_that_no_chunk_has(begun: bytes, read: int) -> None:
    body = Body(None)
    for at in range(read - 1):
        body.read(begun[at : at + 1])
    with pytest.raises(ApiError):
        body.read(begun[read - 1 : read])


@pytest.mark.parametrize("size", [b"5", b"05", b"0" * 15 + b"5"])
def test_bytes_one_by_one_are_read_as_all_together(size: bytes) -> None:
    data, parts = size + b"\r\nhello\r\n" + b"0" * 16 + b"\r\n\r\n", []
    body, whole = Body(None), Body(None)
    for at in range(len(data)):
        assert not body.whole
        parts += body.read(data[at : at + 1])
    assert body.whole and b"".join(parts) == b"hello" and not body.rest
    assert whole.read(data + LAST) == [b"hello"] and whole.whole and whole.rest == LAST


def test_chunks_of_many_sizes_are_joined(shared: Site) -> None:
    body = b"".join(b"%X\r\n%s\r\n" % (size, bytes(size)) for size in [1] * 500 + [300] * 2000 + [70_000])
    data = post(b"Transfer-Encoding: Chunked\r\n", b"\r\n" + body + b"000\r\n\r\n")
    assert statuses(shared.ask(data + LAST)) == [200, 200]
    with shared.connect() as connection:  # cut anywhere
        for i in range(0, 3000, 7):
            connection.sendall(data[i : i + 7])
        connection.sendall(data[3003:] + LAST)
        assert statuses(read_all(connection)) == [200, 200]
    assert shared.seen == [("POST", "/", 500 + 600_000 + 70_000), ("GET", "/last", 0)] * 2


@pytest.mark.parametrize("line", [
    b"GET /", b"GET / HTTP/1.1 ", b"GET  / HTTP/1.1", b"GET / HTTP/1.1x", b"GET /\tHTTP/1.1", b" GET / HTTP/1.1",
    b"GET / HTTP/1", b"GET / HTTP/1.2", b"GET / HTTP/2.0", b"GET / http/1.1", b"GET / HTTP/01.1", b"GET /a b HTTP/1.1",
    b"GET /\x00 HTTP/1.1", b"GET /\xe9 HTTP/1.1", b"GET /#a HTTP/1.1", b"GET a HTTP/1.1", b"G(T / HTTP/1.1",
    b"GET * HTTP/1.1", b"OPTIONS * HTTP/1.1", b"GET x:80 HTTP/1.1", b"CONNECT x:80 HTTP/1.1", b"CONNECT / HTTP/1.1",
    b"GET http:///a HTTP/1.1", b"GET http://[::1 HTTP/1.1", b"GET http://u@x/ HTTP/1.1", b"GET ftp://x/ HTTP/1.1", b"",
    b"PRI * HTTP/2.0",
])  # fmt: skip
def test_a_line_that_asks_for_nothing_is_refused(shared: Site, line: bytes) -> None:
    assert statuses(shared.ask(b"\r\n" * (not line) + post(line=line) + LAST)) == [400]
    assert not shared.seen


@pytest.mark.parametrize("method", [b"X", b"get", b"GETS"])
def test_a_method_that_does_not_exist_is_a_501(shared: Site, method: bytes) -> None:
    assert statuses(shared.ask(post(line=method + b" / HTTP/1.1") + LAST)) == [501]
    assert not shared.seen


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
    assert statuses(shared.ask(b"GET /\r\n\r\n")) == [400]  # HTTP/0.9


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


def test_headers_are_bounded_in_number_and_bytes(shared: Site) -> None:
    assert statuses(shared.ask(post(b"X: a\r\n" * 99) + LAST)) == [200, 200]
    for count in (100, 5_000, 20_000):
        assert statuses(shared.ask(post(b"X: a\r\n" * count))) == [431]
    assert statuses(shared.ask(post(b"X: " + b"a" * 60_000 + b"\r\n") + LAST)) == [200, 200]
    for long in (b"X: ", b"X"):
        assert statuses(shared.ask(post(long + b"a" * 70_000))) == [431]
    assert statuses(shared.ask(post(line=b"GET /" + b"a" * 8_000 + b" HTTP/1.1") + LAST)) == [200, 200]
    for length in (8_200, 3_000_000):
        assert statuses(shared.ask(b"GET /" + b"a" * length)) == [414]
    for refused in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/1.1\nHost: x\n\n"):  # TLS; line feeds
        assert statuses(shared.ask(refused)) == [400]
