"""No state of a connection lasts: deadlines that no byte extends, room for the next client, responses in order."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from iosr_fast.serving.http.addresses import client_of
from iosr_fast.serving.http.listener import Newcomer
from iosr_fast.serving.http.turns import Peers
from iosr_fast.serving.limits import Deadlines, Limits
from tests.serving.http_edge import BIG, Site, read_all, read_answers, site, statuses
from tests.waiting import wait_until

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
BLOCK = GET.replace(b"/", b"/block", 1)
SLOW, LARGE, WHOLE = (GET.replace(b"/", path, 1) for path in (b"/slow", b"/big", b"/whole"))
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
CLOSE = GET[:-2] + b"Connection: close\r\n\r\n"
SHORT_S = 0.3  # the server's deadlines here, except those of whole seconds
LONG_S = 6.0  # until a test gives up on a deadline


@pytest.fixture(scope="module")
def shared() -> Iterator[Site]:
    with pytest.MonkeyPatch.context() as patch, site(body_timeout_s=1) as it:
        for name, seconds in {"linger_s": SHORT_S, "head_s": SHORT_S, "keep_alive_s": 1.0}.items():
            patch.setattr(f"iosr_fast.serving.limits.Deadlines.{name}", seconds)
        yield it


def until_closed(connection: socket.socket, trickle: bytes = b"", every_s: float = 0.02) -> bytes:
    """What comes until the server has closed, while `trickle` is sent again and again."""
    until, answer = time.monotonic() + LONG_S, b""
    connection.settimeout(every_s)
    while time.monotonic() < until:
        try:
            connection.sendall(trickle)
            part = connection.recv(65536)
        except TimeoutError:
            continue
        except ConnectionError:
            return answer
        answer += part
        if not part and not trickle:
            return answer
        if not part:
            time.sleep(every_s)  # half closed by the server; it must close wholly, whatever we send
    raise AssertionError(f"still open after {LONG_S} s: {answer!r}")


def test_no_bytes_but_a_whole_head_extend_a_deadline(shared: Site) -> None:
    begun = [(b"", b"A"), (b"G", b"A"), (b"\r\n", b"A"), (b"GET / HTTP/1.1\r\n", b"X: a\r\n"), (GET[:-2], b"X: a\r\n")]
    cases = [(first, trickle, [408]) for first, trickle in begun + [(GET + first, trickle) for first, trickle in begun]]
    cases += [(b"", b"", []), (GET + b"\r\n", b"", [])]
    cases += [(GET + b"\r\n", other, [400]) for other in (b"\r", b"\n", b"\r\n", b"\r\n\r\n", b" ", b"\0")]
    for last in (b"", b"Connection: close\r\n"):  # a body that trickles after its answer
        post = b"POST /unread HTTP/1.1\r\nHost: x\r\n" + last
        cases.append((post + b"Content-Length: 100000\r\n\r\n", b"a", [200]))
        cases.append((post + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n", [200]))

    def last_statuses(first: bytes, trickle: bytes, _: list[int]) -> list[int]:
        with shared.connect() as connection:
            connection.sendall(first)
            read_answers(connection, first.count(GET))
            return statuses(until_closed(connection, trickle))

    with ThreadPoolExecutor(len(cases)) as pool:
        for case, made in zip(cases, pool.map(last_statuses, *zip(*cases, strict=True)), strict=True):
            assert made == case[2], case


def test_the_first_byte_of_a_head_extends_no_deadline(shared: Site) -> None:
    with shared.connect() as connection:
        wait_until(lambda: len(shared.connections) == 1)
        (waiting,) = shared.connections
        deadline = waiting._timer.when()
        time.sleep(0.01)  # timers count whole milliseconds
        connection.sendall(b"G")
        wait_until(lambda: waiting._searched == 1)
        assert waiting._timer.when() == deadline
        connection.sendall(GET[1:])
        read_answers(connection, 1)
        deadline = wait_until(lambda: waiting._timer).when()  # of an idle connection
        connection.sendall(b"G")
        wait_until(lambda: waiting._searched == 1)
        assert waiting._timer.when() < deadline


def test_one_blank_line_before_a_request_is_ignored(shared: Site) -> None:
    assert statuses(shared.ask(b"\r\n" + GET + b"\r\n" + CLOSE)) == [200, 200]
    assert statuses(shared.ask(GET + b"\r", b"\n", CLOSE, pause_s=0.02)) == [200, 200]


@pytest.mark.parametrize(("request_", "takes", "half_closes"), [
    (LARGE, 0, False), (LARGE[:-2] + b"Connection: close\r\n\r\n", 512, False), (WHOLE, 512, False), (WHOLE, 0, True),
])  # fmt: skip
def test_a_client_that_reads_its_response_slowly_is_cut_off(
    shared: Site, request_: bytes, takes: int, half_closes: bool
) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", shared.port))
        connection.settimeout(LONG_S)
        connection.sendall(request_)
        if half_closes:
            connection.shutdown(socket.SHUT_WR)
        wait_until(lambda: len(shared.connections) == 1)
        until = time.monotonic() + LONG_S
        while shared.connections:
            assert time.monotonic() < until
            connection.recv(takes)
            time.sleep(0.02)
    assert len(shared.ask(request_ + CLOSE)) > BIG


@pytest.mark.parametrize(("sent", "answers"), [
    (b"", 0), (b"\r\n", 0), (b"GET / HT", 0), (POST, 0), (POST + b"abc", 0), (GET + POST, 1), (LARGE, 1),
    (SLOW, 1), (SLOW + GET, 1), (POST + bytes(1000), 1),
])  # fmt: skip
def test_a_client_that_closes_its_side_gets_the_answer_to_its_whole_request(
    shared: Site, sent: bytes, answers: int
) -> None:
    with shared.connect() as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        answer = read_all(connection)
        assert statuses(answer) == [200] * answers
        assert SLOW not in sent or b"connection: close" in answer
    wait_until(lambda: not shared.connections and not shared.server.server_state.tasks)


def test_the_application_hears_of_a_client_that_resets_its_connection(shared: Site) -> None:
    before = shared.gone
    posted = POST.replace(b"/", b"/slow", 1) + bytes(1000)
    for request in (SLOW, posted):
        with shared.connect() as connection:
            shared.seen.clear()
            connection.sendall(request)
            wait_until(lambda: shared.seen)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(lambda: shared.gone == before + 2)
    with pytest.MonkeyPatch.context() as patch, shared.connect() as connection:
        patch.setattr(Deadlines, "half_closed_s", 0.05)
        connection.sendall(SLOW)
        connection.shutdown(socket.SHUT_WR)  # as a client does that waits no longer
        wait_until(lambda: shared.gone == before + 3)
    with shared.connect() as connection:
        connection.sendall(posted + GET)
        assert [one["path"] for _, one in read_answers(connection, 2)] == ["/slow", "/"]
    assert shared.gone == before + 3


def test_pipelined_requests_are_answered_in_order_up_to_a_bound(shared: Site) -> None:
    post = b"POST /%d HTTP/1.1\r\nHost: x\r\nContent-Length: 2000\r\n\r\n" + GET * 60 + bytes(2000 - 60 * len(GET))
    requests = b"".join(post % i if i % 3 else GET.replace(b"/", b"/%d" % i, 1) for i in range(40))
    with shared.connect() as connection:
        connection.sendall(requests + CLOSE)
        answers = read_answers(connection, 41)
    assert len(requests) < Limits.head and [one["path"] for _, one in answers] == [f"/{i}" for i in range(40)] + ["/"]
    with shared.connect() as connection:
        connection.sendall(SLOW)
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                connection.sendall(GET * 1000)
    wait_until(lambda: not shared.connections)


def test_a_body_that_arrives_before_its_turn_is_read_whole(shared: Site) -> None:
    body = POST.replace(b"1000", b"3000000") + bytes(3_000_000)
    with shared.connect() as blocking, shared.connect() as first, shared.connect() as second:
        shared.go_on.clear()
        blocking.sendall(BLOCK)
        for connection in (first, second):
            threading.Thread(target=connection.sendall, args=(body,)).start()  # more than the kernel holds
        time.sleep(0.2)
        shared.go_on.set()
        for connection in (first, second):
            assert read_answers(connection, 1)[0][1]["size"] == 3_000_000


@pytest.mark.parametrize(("request_", "stays"), [(GET, True), (POST + bytes(1000), False)])
def test_a_client_does_not_wait_for_the_connections_of_another(shared: Site, request_: bytes, stays: bool) -> None:
    """The event loop stands still while they come, 200 of the other one, which it leaves open or not."""
    with contextlib.ExitStack() as opened:
        shared.go_on.clear()
        opened.enter_context(shared.connect("127.0.0.9")).sendall(BLOCK)
        wait_until(lambda: ("GET", "/block", 0) in shared.seen)
        shared.seen.clear()
        for _ in range(200):
            connection = opened.enter_context(shared.connect("127.0.0.2"))
            connection.sendall(request_)
            if not stays:
                connection.close()
        opened.enter_context(shared.connect()).sendall(GET.replace(b"/", b"/last", 1))
        shared.go_on.set()
        wait_until(lambda: ("GET", "/last", 0) in shared.seen)
    assert shared.seen.index(("GET", "/last", 0)) < 100


def test_a_refusal_reaches_a_client_that_still_sends(shared: Site) -> None:
    for bad in (CLOSE[16:], POST.replace(b"1000", b"x"), b"GET /" + b"a" * 20_000, POST[:-2] + b"a b\r\n"):
        with shared.connect() as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(bad + bytes(3 << 20))
            time.sleep(0.05)
            assert statuses(read_all(connection)) in ([400], [414], [431])


def test_a_client_that_sends_on_after_a_refusal_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iosr_fast.serving.limits.Deadlines.linger_s", 60.0)
    with site(max_body_mb=1, max_image_mb=1) as small, small.connect() as connection:
        connection.sendall(b"POST /unread HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n")
        read_answers(connection, 1)
        with pytest.raises(ConnectionError):
            for _ in range(100):
                connection.sendall(bytes(1 << 20))
                time.sleep(0.01)


@pytest.mark.parametrize(
    "begun",
    [b"", b"GET / HT", POST, GET, GET + b"\r\n", GET + POST, b"BAD\r\n\r\n", CLOSE, POST.replace(b"/ ", b"/unread ")],
)
def test_connections_that_wait_for_their_clients_make_room(begun: bytes) -> None:
    with site(max_connections=20) as crowded, contextlib.ExitStack() as opened:
        many = [opened.enter_context(crowded.connect()) for _ in range(60)]
        for connection in many:
            with contextlib.suppress(ConnectionError):
                connection.sendall(begun)
        wait_until(lambda: statuses(crowded.ask(CLOSE)) == [200])  # 503 while all are busy
        for _ in range(3):
            assert statuses(crowded.ask(CLOSE)) == [200]
        wait_until(lambda: len(crowded.connections) <= 20)


def test_a_client_loses_no_connection_to_another_that_has_more() -> None:
    with site(max_connections=20) as crowded, contextlib.ExitStack() as opened:
        upload = opened.enter_context(crowded.connect("127.0.0.2"))
        upload.sendall(POST + bytes(500))
        wait_until(lambda: len(crowded.connections) == 1)
        idle = [opened.enter_context(crowded.connect()) for _ in range(25)]
        assert [read_all(connection) for connection in idle[:6]] == [b""] * 6  # those that have waited longest
        upload.sendall(bytes(500))
        assert read_answers(upload, 1)[0][0] == 200


@pytest.mark.parametrize(("host", "client"), [
    ("10.0.0.7", "10.0.0.7"), ("::ffff:10.0.0.7", "10.0.0.7"), ("fe80::1%eth0", "fe80::/64"), ("a name", "a name"),
    ("1:2:3:5:2::3", "1:2:3:5::/64"), ("1:2:3:5:f::", "1:2:3:5::/64"), ("1:2:3:4::", "1:2:3:4::/64"),
])  # fmt: skip
def test_a_client_is_an_ipv4_address_or_an_ipv6_network(host: str, client: str) -> None:
    assert client_of((host, 1)) == client and client_of(None) == ""


@pytest.mark.parametrize(("source", "new", "old"), [("127.0.0.2", 200, [0] + [200] * 3), ("127.0.0.1", 503, [200] * 4)])
def test_where_all_connections_are_busy_the_client_with_most_loses_one(source: str, new: int, old: list[int]) -> None:
    """Its oldest one, or the newest if that is its own."""
    with site(max_connections=4) as crowded, contextlib.ExitStack() as opened:
        many = [opened.enter_context(crowded.connect(source)) for _ in range(4)]
        for connection in many:
            connection.sendall(CLOSE.replace(b"/", b"/slow", 1))
        wait_until(lambda: len(crowded.seen) == 4)
        answer = crowded.ask(CLOSE)
        assert statuses(answer) == [new] and (b"retry-after: 1\r\n" in answer) == (new == 503)
        assert sorted(sum(statuses(read_all(connection))) for connection in many) == old
        assert statuses(crowded.ask(CLOSE)) == [200]


def test_a_stop_answers_accepted_requests_and_closes_the_rest() -> None:
    running = Site()
    with running.connect() as idle, running.connect() as partial, running.connect() as busy, running.connect() as body:
        idle.sendall(GET)
        read_answers(idle, 1)
        partial.sendall(b"GET / HT")
        busy.sendall(SLOW + GET)
        body.sendall(POST)
        wait_until(lambda: ("GET", "/slow", 0) in running.seen)
        running.server.should_exit = True
        assert read_all(idle) == b"" and read_all(partial) == b""
        body.sendall(bytes(1000))
        for connection, size in ((busy, 0), (body, 1000)):
            answer = read_all(connection)
            assert statuses(answer) == [200] and b'"size":%d' % size in answer
            assert b"connection: close" in answer.lower()
    running.stop()


@pytest.mark.parametrize("half_closes", [False, True])
def test_a_request_whose_turn_has_not_come_is_answered_at_a_stop_or_half_close(
    half_closes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, late = Peers.put, list[object]()

    def put_later(peers: Peers, one: Any, loop: Any) -> None:
        if isinstance(one, Newcomer):
            put(peers, one, loop)
        else:
            late.append(loop.call_later(0.4, put, peers, one, loop))

    monkeypatch.setattr(Peers, "put", put_later)
    with site() as running, running.connect() as connection:
        connection.sendall(GET)
        wait_until(lambda: late)
        if half_closes:
            connection.shutdown(socket.SHUT_WR)
        else:
            running.server.should_exit = True
        answer = read_all(connection)
        assert statuses(answer) == [200] and b"connection: close" in answer


@pytest.mark.parametrize(
    ("trusted", "forwarded", "client"),
    [
        ((), [b"1.2.3.4"], "127.0.0.1"),
        (("127.0.0.1",), [b"1.2.3.4"], "1.2.3.4"),
        (("127.0.0.0/8", "10.0.0.0/8"), [b"6.6.6.6, 1.2.3.4, 10.0.0.1"], "1.2.3.4"),
        (("127.0.0.1", "10.0.0.1"), [b"6.6.6.6", b"1.2.3.4", b"10.0.0.1"], "1.2.3.4"),
        (("10.0.0.1",), [b"1.2.3.4"], "127.0.0.1"),
        (("127.0.0.1",), [], "127.0.0.1"),
    ],
)
def test_the_client_is_the_last_address_that_is_no_trusted_proxy(
    trusted: tuple[str, ...], forwarded: list[bytes], client: str
) -> None:
    with site(trusted_proxy=trusted) as behind:
        lines = b"".join(b"X-Forwarded-For: " + value + b"\r\n" for value in forwarded)
        answer = behind.ask(CLOSE[:-2] + lines + b"\r\n")
        assert b'"client":"%s"' % client.encode() in answer
