"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def wait_until(condition: Callable[[], Any], seconds: float = 20, what: object = "the condition") -> Any:
    """The first true value of `condition`, which must come within `seconds`."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, f"expected within {seconds} s: {what}"
        time.sleep(0.005)
    return value
