"""Work done by threads ahead of who takes its results, in order and within a bound."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")


def map_ordered(
    items: Iterable[_T], work: Callable[[_T], _R], threads: int, ahead: int, name: str = "iosr-fast-ahead"
) -> Generator[_R, None, None]:
    """work(item) of each item in order, computed by `threads`; at most `ahead` are begun or wait for who takes them.

    What `work` or `items` raises is raised in its place, and ends it. However it ends, by close() too, it first waits
    for what is being computed and then its threads are gone.
    """
    waiting: deque[Future[_R]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        waiting.clear()
        pool.shutdown(wait=True, cancel_futures=True)
