"""Logs of small changes of a small head."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from iosr_fast.head.head import Head
from iosr_fast.store.change_log import ChangeLog
from iosr_fast.store.changes import Change, RenameClass
from tests.store.live_parts import random_head


@functools.cache
def base(seed: int = 0) -> Head:
    return random_head(np.random.default_rng(seed), 3, 2, parameters={"alpha": 1.0, "beta": 2.0})


def changed(log: ChangeLog, state: Head, change: Change) -> Head:
    """A change as the classifier makes it."""
    before = log.settle(state)
    after = change.apply(before)
    log.append(change, before, after)
    return after


def renamed(log: ChangeLog, state: Head, name: str) -> Head:
    return changed(log, state, RenameClass.of(1, name))


def write_log(path: Path, changes: int = 3, name: str = "name") -> list[Head]:
    """A closed log; its states, the first without a change."""
    log, state = ChangeLog.open(path, base())
    states = [state]
    for number in range(changes):
        states.append(renamed(log, states[-1], f"{name} {number}"))
    log.close()
    return states


def reopened(path: Path) -> Head:
    log, state = ChangeLog.open(path, base())
    log.close()
    return state
