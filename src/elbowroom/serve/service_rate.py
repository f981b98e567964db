"""ServiceRate: how fast requests end while others wait; what Retry-After and predicted waits come from."""

from __future__ import annotations

import math
from collections import deque

WINDOW_S = 60.0
FEWEST_S, MOST_S = 1, 60
"""Bounds of Retry-After."""
ENOUGH = 10
"""Ended requests from which on the rate says something about the future."""


class ServiceRate:
    """Ends of requests over the seconds in which something waited, within the last minute.

    Only that time counts: what an idle server does not finish says nothing about how fast it is. Times are seconds of
    any clock, and come in order.
    """

    def __init__(self) -> None:
        self._spans: deque[tuple[float, float, int]] = deque()
        """End, seconds and ended requests of spans in which something waited."""
        self._last_s: float | None = None
        self._busy_s, self._num_ended = 0.0, 0

    def observe(self, now: float, is_waiting: bool, num_ended: int = 0) -> None:
        """Note whether something waits now, and how many requests have just ended."""
        if self._last_s is not None:
            seconds = min(now - self._last_s, WINDOW_S)
            self._spans.append((now, seconds, num_ended))
            self._busy_s += seconds
            self._num_ended += num_ended
        self._last_s = now if is_waiting else None
        self._forget(now)

    def retry_after_s(self, num_waiting: int) -> int:
        """Return the seconds in which the queue is served at the measured rate, from 1 to 60."""
        if self._busy_s <= 0.0:
            return FEWEST_S
        # Where nothing has ended yet, a request takes longer than what was seen.
        wait_s = num_waiting * self._busy_s / max(self._num_ended, 1)
        return min(max(math.ceil(wait_s), FEWEST_S), MOST_S)

    def predicted_s(self, num_waiting: int) -> float | None:
        """Return how long one more request would wait; None while too few have ended to say."""
        return None if self._num_ended < ENOUGH else (num_waiting + 1) * self._busy_s / self._num_ended

    def _forget(self, now: float) -> None:
        while self._spans and self._spans[0][0] <= now - WINDOW_S:
            _, seconds, num_ended = self._spans.popleft()
            self._busy_s -= seconds
            self._num_ended -= num_ended
        if not self._spans:
            self._busy_s, self._num_ended = 0.0, 0
