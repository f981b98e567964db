"""Several contexts at a time: work in threads, results in order, input made only as it is needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(work: Callable[[T], R], items: Iterable[T], num_parallel: int) -> Iterator[R]:
    """Yield ``work(item)`` for each item, in order.

    Args:
        work: called in other threads; its error is raised here and ends the rest.
        items: taken one by one, never more than ``num_parallel`` ahead of the results.
        num_parallel: items at a time.
    """
    pending: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(num_parallel)
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            while len(pending) > num_parallel:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
