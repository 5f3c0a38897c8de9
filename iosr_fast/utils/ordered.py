"""Work that threads do ahead of its consumer, in order and bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")


def map_ordered(items: Iterable[_T], work: Callable[[_T], _R], threads: int, ahead: int) -> Generator[_R, None, None]:
    """work(item) for each item in order, computed by `threads`; at most `ahead` are started and not yet consumed.

    An exception of `work` or `items` is raised in its place and ends the generator. When the generator ends, also by
    close(), it waits for running work and ends its threads.
    """
    waiting: deque[Future[_R]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="iosr-fast-ahead")
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
