"""Clients take turns at beginning requests, and one that floods leaves half of the event loop to others."""

from __future__ import annotations

import asyncio
import time

import pytest

from iosr_fast.serving.http.turns import Peers


class Connection:
    """Begins requests again and again, which keep the loop's thread busy for `cost_s`; `seconds` says how long."""

    def __init__(self, peers: Peers, peer: str, cost_s: float = 0.0) -> None:
        self.peer, self.cost_s, self.seconds, self._peers = peer, cost_s, 0.0, peers
        peers.add(self)

    def ask(self) -> None:
        self._peers.put(self, asyncio.get_running_loop())

    def begin(self) -> None:
        until = time.thread_time() + self.cost_s
        while time.thread_time() < until:
            pass
        self.seconds += self.cost_s
        self.ask()

    def abort(self) -> None:
        """Nobody calls it here."""


def shares(flooding: int, beside: int, cost_s: float = 0.002, seconds: float = 0.5) -> list[float]:
    """Of the loop's time, what each of `flooding` clients takes that always ask, beside others whose requests run."""

    async def flood() -> list[float]:
        peers = Peers()
        many = [Connection(peers, f"flood {i}", cost_s) for i in range(flooding) for _ in range(20)]
        for i in range(beside):
            peers.runs(Connection(peers, f"other {i}"))
        for one in many:
            one.ask()
        start = time.perf_counter()
        await asyncio.sleep(seconds)
        took = time.perf_counter() - start
        return [sum(one.seconds for one in many if one.peer == f"flood {i}") / took for i in range(flooding)]

    return asyncio.run(flood())


@pytest.mark.parametrize(("flooding", "beside"), [(1, 1), (1, 10), (3, 1)])
def test_clients_leave_the_loop_to_those_whose_requests_run(flooding: int, beside: int) -> None:
    """Upper bounds alone, which a busy machine keeps, too."""
    found = shares(flooding, beside)
    fair = 1 / (flooding + beside)
    assert all(0 < share < 1.2 * max(fair, 0.5 / flooding) + 0.02 for share in found)


def test_a_client_that_is_alone_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule, waits = Peers._schedule, list[float]()
    monkeypatch.setattr(Peers, "_schedule", lambda *given: waits.append(given[-1]) or schedule(*given))
    shares(1, 0, seconds=0.1)
    assert waits and not any(waits)


@pytest.mark.parametrize(("clients", "first"), [("a", 16 * "a"), ("ab", "ab")])
def test_a_pass_begins_several_requests_of_a_lone_client_and_one_of_the_next_of_others(
    clients: str, first: str
) -> None:
    begun = list[str]()

    class Once(Connection):
        def begin(self) -> None:
            begun.append(self.peer)

    async def passes() -> str:
        peers = Peers()
        peers._cost_s = 60.0  # as if one took a minute, of which nobody has to wait for a share
        for one in [Once(peers, name) for name in clients for _ in range(20)]:
            one.ask()
        for _ in range(2):
            await asyncio.sleep(0)
        return "".join(begun)

    assert asyncio.run(passes()) == first


def test_what_is_removed_never_begins_and_leaves_nothing_behind() -> None:
    async def remove() -> Peers:
        peers = Peers()
        many = [Connection(peers, f"client {i % 3}") for i in range(9)]
        for one in many:
            one.ask()
            peers.runs(one)
        for one in many:
            peers.remove(one)
            peers.remove(one)
        await asyncio.sleep(0.01)
        assert not any(one.seconds for one in many)
        return peers

    peers = asyncio.run(remove())
    assert peers.count == 0 and not (peers._peers or peers._ready or peers._running)


def test_the_client_with_most_connections_loses_its_oldest_one() -> None:
    peers = Peers()
    few, many = [Connection(peers, "few") for _ in range(2)], [Connection(peers, "many") for _ in range(3)]
    assert peers.oldest_of_largest() is many[0]
    peers._peers["many"].waiting[many[2]] = None  # one that waits for its client goes first
    assert peers.oldest_of_largest() is many[2]
    peers.remove(many[2])
    peers._peers["few"].waiting[few[1]] = None
    assert peers.oldest_of_largest() is few[1]
