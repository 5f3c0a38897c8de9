"""Shares and turns: no client keeps others out, and none waits for more than one turn of each other one."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from iosr_fast.serving.fairness import Shares, Turns

Thing = tuple[str, int, int]  # of a client, its request, and a number


@pytest.mark.parametrize("clients", [1, 2, 5, 20])
def test_clients_that_take_all_they_may_leave_as_much_to_the_next_one(clients: int) -> None:
    shares = Shares(1000)
    while sum(shares.take(str(client), 1) for client in range(clients)):
        pass
    fair = 1000 / (clients + 1)
    assert all(abs(shares.held(str(client)) - fair) < 3 for client in range(clients))
    assert shares.fits("another", fair / 2 - 3) and not shares.fits("another", fair / 2 + 3)
    for client in range(clients):
        shares.add(str(client), -shares.held(str(client)))
    assert shares.used == 0 and not shares._held


def test_clients_take_turns_and_so_do_their_requests() -> None:
    rng, turns = np.random.default_rng(0), Turns[Thing](lambda thing: thing[:2])
    sizes = {
        (client, request): int(rng.integers(1, 9)) for client in "abcd" for request in range(int(rng.integers(1, 5)))
    }
    things = [(*key, number) for key, size in sizes.items() for number in range(size)]
    for thing in things:
        turns.put(thing)
    taken, left = list[Thing](), set(things)
    while turns:
        head = next(turns.heads())
        turns.take(head)
        taken.append(head)
        left.remove(head)
        assert len(turns) == len(left) and turns.clients == {client for client, *_ in left}
        clients, requests = Counter(client for client, *_ in taken), Counter(thing[:2] for thing in taken)
        assert max(clients.values()) - min((clients[client] for client in turns.clients), default=99) <= 1
        for client, request, number in left:
            assert max(requests[key] for key in sizes if key[0] == client) - requests[client, request] <= 1
            assert number >= requests[client, request], "in order"


def test_heads_leave_out_clients_that_are_blocked_and_what_is_discarded() -> None:
    turns = Turns[Thing](lambda thing: thing[:2])
    a, other, b = ("a", 0, 0), ("a", 1, 0), ("b", 0, 0)
    for thing in (a, ("a", 0, 1), other, b):
        turns.put(thing)
    assert list(turns.heads()) == [a, other, b] and list(turns.heads({"a"})) == [b]
    assert turns.request_of(a) == [a, ("a", 0, 1)]
    turns.discard(a, a, b)
    assert list(turns.heads()) == [("a", 0, 1), other]
    turns.take(*turns.request_of(("a", 0, 1)))
    turns.discard(other)
    assert not turns and not turns.clients
