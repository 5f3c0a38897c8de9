"""Shared by the tests of the audit log: a log of small lines, and system calls that fail."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iosr_fast.head.head import Head
from iosr_fast.store.audit import open_log
from iosr_fast.store.changes import Change
from iosr_fast.store.log_writer import AuditLog
from tests.store.live_parts import random_head


@functools.cache
def base(seed: int = 0) -> Head:
    return random_head(np.random.default_rng(seed), 3, 2, parameters={"alpha": 1.0, "beta": 2.0})


def renamed(log: AuditLog, state: Head, name: str) -> Head:
    """A change as the classifier makes it."""
    update = Change("rename_class", 1, name=name)
    log.compact(state)
    made = update.apply(state)
    try:
        log.append(update, state, made)
    except BaseException:
        log.try_to_settle(state)
        raise
    return made


def write_log(path: Path, changes: int = 3, seed: int = 0, names: str = "name") -> list[Head]:
    """A closed log; the states by the number of changes."""
    log, state = open_log(path, base(seed))
    states = [state]
    for number in range(changes):
        states.append(renamed(log, states[-1], f"{names} {number}"))
    log.close(states[-1])
    return states


def reopened(path: Path, seed: int = 0, recover: bool = False) -> Head:
    log, state = open_log(path, base(seed), recover)
    log.close(state)
    return state


def head_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.head")


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}


class Crash(BaseException):
    """The process is gone: nothing that comes later reaches the disk."""


CALLS = ("write", "fsync", "replace", "ftruncate", "lseek", "unlink", "open")


@contextmanager
def failing(
    monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException, once: bool, after: bool = False
) -> Iterator[Any]:
    """The system call number `at` raises `error`, before it is made or `after`; `once`, or that and all that follow.
    Yields a list of the calls made."""
    made: list[str] = []
    with monkeypatch.context() as patch:
        for name in CALLS:
            real = getattr(os, name)

            def call(*args: Any, _name: str = name, _real: Any = real, **options: Any) -> Any:
                made.append(_name)
                here = len(made) - 1 == at or (not once and len(made) - 1 > at)
                if here and not after:
                    raise error
                result = _real(*args, **options)
                if here:
                    raise error
                return result

            patch.setattr(os, name, call)
        yield made


def copied(folder: Path, target: Path) -> Path:
    """The folder as it is on the disk, without the locks that this process has."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    return target
